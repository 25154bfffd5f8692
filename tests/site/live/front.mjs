// What the front page's object computes, as JSON: node front.mjs LIVE < { name of a function below: [its arguments] }
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const from = (name) => import(pathToFileURL(join(process.argv[2], name)).href);
const { Matrix } = await from("matrix.js");
const memory = await from("memory.js");
const { inFourBits } = await from("nf4.js");
const { HEIGHT, WIDTH, markup, picture } = await from("board.js");
const { answerTo } = await from("predict.js");
const scenes = await from("scenes.js");
const { strongest } = await from("svd.js");

const matrix = (rows) => new Matrix(rows.length, rows[0].length, Float64Array.from(rows.flat()));
const rowsOf = ({ rows, columns, data }) =>
  Array.from({ length: rows }, (_, i) => [...data.slice(i * columns, (i + 1) * columns)]);

const drawn = (tale) => {
  const shown = picture(scenes.stateOf(tale));
  return { alt: shown.alt, inside: markup(shown) };
};

const FUNCTIONS = {
  scenes: () => scenes.SCENES.map(({ name, heading, seconds, controls }) => ({ name, heading, seconds, controls })),
  settings: () => [scenes.PLAIN, scenes.CHOICES],
  word: () => [rowsOf(scenes.TRUTH), rowsOf(scenes.W), WIDTH, HEIGHT],
  // What happens, one event after another: each tale with its picture.
  told: (still, events) => {
    let tale = scenes.begun({ still });
    return [tale, ...events.map((event) => (tale = scenes.after(tale, event)))].map((now) => [now, drawn(now)]);
  },
  place: (tops, line) => scenes.sceneAt(tops.map((top) => top ?? -Infinity), line),
  answer: (question, choice) => answerTo(question, choice),
  // A training's steps: its arrays and what comes back.
  trained: (settings, steps) => {
    const run = scenes.training(settings), { X, Y, W } = run.experiment;
    const all = steps.map((step) => Object.entries(run.at(step)));
    const found = all.map((entries) => entries.map(([name, value]) => [name, value.data ? rowsOf(value) : value]));
    return { X: rowsOf(X), Y: rowsOf(Y), W: rowsOf(W), steps: found.map(Object.fromEntries), least: run.least };
  },
  merged: (size) => {
    const { stored, seen, kept, noise } = scenes.mergedInFourBits(size);
    return { stored: rowsOf(stored), seen: rowsOf(seen), kept, noise };
  },
  models: () => memory.MODELS,
  counted: (model, rank) => [...memory.countNumbers(model), memory.adapterNumbers(model, rank)],
  memory: (model, options) => memory.trainingMemory(model, options),
  nf4: (rows) => rowsOf(inFourBits(matrix(rows))),
  strongest: (rows, rank) => {
    const { B, A } = strongest(matrix(rows), rank);
    return [rowsOf(B), rowsOf(A)];
  },
};

const asked = JSON.parse(readFileSync(0, "utf8"));
const answered = ([name, calls]) => [name, calls.map((given) => FUNCTIONS[name](...given))];
console.log(JSON.stringify(Object.fromEntries(Object.entries(asked).map(answered))));
