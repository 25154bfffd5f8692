// What the page with one layer trains, as JSON: node layer.mjs < { runs: [settings and a count of steps] }
import { readFileSync } from "node:fs";

const { MISTAKES } = await import("../_static/live/mistakes.js");
const { Experiment, N_IN, N_OUT, TRUTHS } = await import("../_static/live/experiment.js");

function run({ steps, truth, ...settings }) {
  const experiment = new Experiment({ ...settings, truth: TRUTHS[truth].draw() });
  experiment.step();
  const moved = experiment.layer.adapter.delta().norm(); // by the first step
  for (let t = 1; t < steps; t += 1) experiment.step();
  const { loss, least, values } = experiment;
  return { loss, least, moved, values: [...values] };
}

const { runs } = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify({ shape: [N_OUT, N_IN], mistakes: Object.keys(MISTAKES), runs: runs.map(run) }));
