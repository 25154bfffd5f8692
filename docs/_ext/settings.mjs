// What _static/live/settings.js answers, as JSON: node settings.mjs < { data, inputs, configs, texts, numbers }
import { readFileSync } from "node:fs";

const { countNumbers } = await import("../_static/live/memory.js");
const { advise, gigabytes, judge, plain, readConfig, readInputs, readLosses } =
  await import("../_static/live/settings.js");
const { data, inputs = [], configs = [], texts = [], numbers = [] } = JSON.parse(readFileSync(0, "utf8"));
const answer = (fields, model) => {
  const { found, wrong } = readInputs(data, { ...data.defaults, ...fields }, model);
  return Object.keys(wrong).length ? { wrong } : advise(data, found);
};
console.log(JSON.stringify({
  answers: inputs.map((fields) => answer(fields, null)),
  configs: configs.map((text) => {
    const { model, says } = readConfig(data, text);
    return model ? { counted: countNumbers(model), ...answer({}, model) } : { says };
  }),
  judged: texts.map((text) => {
    const { runs, base, says } = readLosses(data, text);
    return says ? { says } : judge(data, runs, base);
  }),
  printed: numbers.map((number) => [plain(number, 2), gigabytes(number)]),
}));
