// What the page with a language model computes: node model.mjs LIVE MODEL FOLDER < what is asked, in JSON
//
// { texts }                    the ids of texts, and the texts of these ids
// { pasted }                   why nothing can be learned from texts, "" where something can
// { ids, T, adapter }          FOLDER/answers.safetensors: logits, and gradients of A and B at this adapter's factors
// { text, steps, ... }         trains on a text, and writes the page's .zip: FOLDER/adapter.zip
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [live, model, folder] = process.argv.slice(2);
const from = (name) => import(pathToFileURL(join(live, name)).href);
const { Llama } = await from("llama.js");
const { crossEntropy } = await from("losses.js");
const { adapterFiles, zip } = await from("peft.js");
const { randomFrom } = await from("random.js");
const { readSafetensors, writeSafetensors } = await from("safetensors.js");
const { Tokenizer } = await from("tokenizer.js");
const { Tuning, generate, refusal, windows } = await from("tuning.js");
const asked = JSON.parse(readFileSync(0, "utf8"));

const read = (path) => {
  const bytes = readFileSync(path);
  return readSafetensors(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
};
const json = (name) => JSON.parse(readFileSync(join(model, name), "utf8"));
const tokenizer = new Tokenizer(json("en.tokenizer.json"));
const load = (rank, alpha) =>
  new Llama(json("config.json"), read(join(model, "model.safetensors")), { rank, alpha, random: randomFrom(0) });

function gradients({ ids, targets, T, rank, alpha, adapter }) {
  const llama = load(rank, alpha), given = read(adapter);
  for (const [name, { data }] of Object.entries(llama.trainable())) {
    data.set(given[`base_model.model.${name}.weight`].data);
  }
  const [logits, cache] = llama.forward(ids, T);
  const [loss, d_logits] = crossEntropy(logits, targets);
  writeFileSync(join(folder, "answers.safetensors"), writeSafetensors({ logits, ...llama.backward(d_logits, cache) }));
  // The same text a position at a time, as it is written.
  let [last, past] = llama.forward(ids.slice(0, 3), 3);
  for (const id of ids.slice(3, T)) [last, past] = llama.forward([id], 1, past);
  return { loss, last: [...last.data], whole: [...logits.data.slice((T - 1) * logits.columns, T * logits.columns)] };
}

async function train({ text, steps, rank, alpha, rate, prompt }) {
  const llama = load(rank, alpha), tuning = new Tuning(llama, tokenizer.encode(text), { rate, random: randomFrom(1) });
  const ids = tokenizer.encode(prompt), write = (count, temperature) =>
    [...generate(llama, ids, count, { temperature, random: randomFrom(0) })];
  const told = () => tokenizer.decode([...ids, ...write(60, 0.7)]), before = told(); // as worker.js asks for it
  const held = [tuning.measure(0)], losses = [], lasts = [tuning.last()];
  for (let t = 0; t < steps; t += 1) {
    losses.push(tuning.step());
    if (losses.length % 10) continue;
    held.push(tuning.measure(losses.length));
    lasts.push(tuning.last());
  }
  const { step, loss } = tuning.best, again = tuning.withBest(() => tuning.heldOutLoss());
  const best = { step, loss, again, after: tuning.heldOutLoss() };
  const written = zip(adapterFiles(llama.trainable(), { rank, alpha }));
  writeFileSync(join(folder, "adapter.zip"), new Uint8Array(await written.arrayBuffer()));
  const windows = { train: tuning.train.length, held: tuning.held.length, length: tuning.length };
  const texts = { before, after: tuning.withBest(told) };
  const seconds = process.cpuUsage().user / 1e6;
  return { losses, held, lasts, best, ids, said: write(20, 1e-6), windows, texts, seconds };
}

function thereAndBack(text) {
  const ids = tokenizer.encode(text);
  return [ids, tokenizer.decode(ids)];
}

function refused(text) {
  const ids = tokenizer.encode(text);
  return refusal(ids, tokenizer.unknown(ids));
}

const answer = asked.pasted ? asked.pasted.map(refused)
  : asked.texts ? asked.texts.map(thereAndBack)
    : asked.windows ? windows(...asked.windows)
    : asked.adapter ? gradients(asked) : await train(asked);
console.log(JSON.stringify(answer));
