// What docs/_static/live/settings.js answers, as JSON: node settings.mjs FILE < { data, inputs, configs, texts }
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const { advise, judge, readConfig, readInputs, readLosses } = await import(pathToFileURL(process.argv[2]).href);
const { data, inputs, configs, texts } = JSON.parse(readFileSync(0, "utf8"));
const answer = (fields, model) => {
  const { found, wrong } = readInputs(data, fields, model);
  return Object.keys(wrong).length ? { wrong } : advise(data, found);
};
console.log(JSON.stringify({
  answers: inputs.map((fields) => answer(fields, null)),
  configs: configs.map(([text, fields]) => {
    const { model, says } = readConfig(data, text);
    return model ? answer(fields, model) : { says };
  }),
  judged: texts.map((text) => {
    const { runs, base, says } = readLosses(data, text);
    return says ? { says } : judge(data, runs, base);
  }),
}));
