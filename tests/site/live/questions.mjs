// What docs/_static/questions.js says to answers, as JSON:
// node questions.mjs FILE < { cases: [[sheet, guess, earlier]], texts: [] }
import { readFileSync } from "node:fs";
import { runInThisContext } from "node:vm";

runInThisContext(readFileSync(process.argv[2], "utf8"));  // a plain script, as in the page: its functions are global
const { cases, texts } = JSON.parse(readFileSync(0, "utf8"));
const verdicts = cases.map(([sheet, guess, earlier]) => {
  const { right, says } = verdict(sheet, guess, earlier);
  return [right, says];
});
console.log(JSON.stringify({ verdicts, typed: texts.map(typed) }));
