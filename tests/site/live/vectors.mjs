// Answer `minilora vectors` with the site's JavaScript: node vectors.mjs LIVE VECTORS ANSWERS
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [live, vectors, answers] = process.argv.slice(2);
const from = (name) => import(pathToFileURL(join(live, name)).href);
const { Matrix } = await from("matrix.js");
const { Linear, LoRA, LoRALinear } = await from("lora.js");
const { Adam } = await from("optim.js");
const { matrixOf, readSafetensors, writeSafetensors } = await from("safetensors.js");

function linear(tensors) {
  const m = (name) => matrixOf(tensors[name]);
  const base = new Linear(m("weight"), tensors.bias?.data ?? null);
  const layer = new LoRALinear(base, new LoRA(m("lora_A"), m("lora_B"), tensors.alpha.data[0]));
  const [y, cache] = layer.forward(m("x"));
  const [dx, { lora_A: dA, lora_B: dB }] = layer.backward(m("dy"), cache);
  return { y, dx, dA, dB, merged: layer.merge().weight };
}

function adam(tensors) {
  const params = { A: matrixOf(tensors.begin_A), B: matrixOf(tensors.begin_B) };
  const optimizer = new Adam(params);
  for (let t = 0; t < tensors.grads_A.shape[0]; t += 1) {
    const grads = Object.entries(params).map(([name, { rows, columns }]) => {
      const size = rows * columns;
      return [name, new Matrix(rows, columns, tensors[`grads_${name}`].data.slice(t * size, (t + 1) * size))];
    });
    optimizer.step(Object.fromEntries(grads));
  }
  return { end_A: params.A, end_B: params.B };
}

mkdirSync(answers);
for (const file of readdirSync(vectors)) {
  const answer = { linear, adam }[file.split("-")[0]];
  if (!answer) continue;
  const bytes = readFileSync(join(vectors, file));
  const tensors = readSafetensors(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
  writeFileSync(join(answers, file), writeSafetensors(answer(tensors)));
}
