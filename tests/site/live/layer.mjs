// What the page with one layer computes, as JSON: node layer.mjs LIVE < { runs: [settings and a count of steps] }
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const from = (name) => import(pathToFileURL(join(process.argv[2], name)).href);
const { Matrix } = await from("matrix.js");
const { checkLayer } = await from("check.js");
const { Experiment, TRUTHS } = await from("experiment.js");
const { MISTAKES, STARTS, layerWith } = await from("mistakes.js");
const { randomFrom } = await from("random.js");
const { singularValues } = await from("svd.js");
const { runs = [], matrices = [] } = JSON.parse(readFileSync(0, "utf8"));

const rowsOf = ({ rows, columns, data }) =>
  Array.from({ length: rows }, (_, i) => [...data.slice(i * columns, (i + 1) * columns)]);
const matrix = (rows) => new Matrix(rows.length, rows[0].length, Float64Array.from(rows.flat()));

function check(mistakes, from) {
  const { make, start } = layerWith(mistakes, from);
  return checkLayer(make, (...sizes) => start(...sizes, randomFrom(2)));
}

const all = [[], ...Object.keys(MISTAKES).map((name) => [name])];
const checks = (from) => Object.fromEntries(all.map((mistakes) => [mistakes.join(), check(mistakes, from)]));

function run({ steps, truth, ...settings }) {
  const experiment = new Experiment({ mistakes: [], start: "peft", ...settings, truth: TRUTHS[truth].draw() });
  const { layer, X, Y, W, A0, least } = experiment, B0 = layer.adapter.lora_B.copy();
  for (let t = 0; t < steps; t += 1) experiment.step();
  const { lora_A, lora_B } = layer.adapter;
  const arrays = { X, Y, W, A0, B0, A: lora_A, B: lora_B, D: experiment.truth };
  const shown = Object.fromEntries(Object.entries(arrays).map(([name, m]) => [name, rowsOf(m)]));
  return { ...shown, least, values: experiment.values, history: experiment.history };
}

console.log(JSON.stringify({
  checks: Object.fromEntries(Object.keys(STARTS).map((from) => [from, checks(from)])),
  runs: runs.map(run),
  values: matrices.map((rows) => singularValues(matrix(rows))),
}));
