// What docs/_static/numpy.js makes of some texts, as JSON: node numpy.mjs FILE < { names, texts }
import { readFileSync } from "node:fs";
import { runInThisContext } from "node:vm";

runInThisContext(readFileSync(process.argv[2], "utf8"));  // a plain script, as in the page: its functions are global
const { names, texts } = JSON.parse(readFileSync(0, "utf8"));
const { fromLists, entries, isArray } = numpyArrays;
const shown = (value) => {
  if (value?.items) return value.items.map(shown);
  return isArray(value) ? { shape: value.shape, data: entries(value).map(String) } : value;
};
console.log(JSON.stringify(texts.map((text) => {
  const own = Object.fromEntries(Object.entries(names).map(([name, value]) => [name, fromLists(value)]));
  try {
    const value = runNumpy(text, own, Object.keys(own));
    return { value: shown(value), after: Object.values(own).map(shown) };
  } catch (error) {
    return { error: error.message, kind: error.constructor.name };
  }
})));
