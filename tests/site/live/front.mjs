// What the front page's object computes, as JSON: node front.mjs LIVE < { name of a function below: [its arguments] }
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const from = (name) => import(pathToFileURL(join(process.argv[2], name)).href);
const { Matrix } = await from("matrix.js");
const memory = await from("memory.js");
const { inFourBits } = await from("nf4.js");
const { strongest } = await from("svd.js");

const matrix = (rows) => new Matrix(rows.length, rows[0].length, Float64Array.from(rows.flat()));
const rowsOf = ({ rows, columns, data }) =>
  Array.from({ length: rows }, (_, i) => [...data.slice(i * columns, (i + 1) * columns)]);

const FUNCTIONS = {
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
