// The language model, beside the page: it trains here, so that the page stays awake. Messages come as { ask: ... }, and
// go as { told: ... }. What it computes is in llama.js and tuning.js.

import { Llama } from "./llama.js";
import { adapterFiles, zip } from "./peft.js";
import { randomFrom } from "./random.js";
import { readSafetensors } from "./safetensors.js";
import { Tokenizer } from "./tokenizer.js";
import { Tuning, generate, refusal } from "./tuning.js";

const [TOKENS, CONTEXT, TEMPERATURE, EVERY] = [60, 128, 0.7, 10];
let [config, tensors, tokenizer, tuning, settings, steps, running, began] = [null, null, null, null, null, 0, false, 0];

const tell = (told, more = {}) => postMessage({ told, ...more });

const ASKED = {
  async load({ folder }) {
    const get = async (name) => {
      const response = await fetch(new URL(name, folder));
      if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
      return response;
    };
    config = await (await get("config.json")).json();
    tokenizer = new Tokenizer(await (await get("en.tokenizer.json")).json());
    tensors = readSafetensors(await counted(await get("model.safetensors")));
    tell("loaded");
  },

  // Begin with a new adapter on a text.
  begin({ text, rank, rate, prompt }) {
    running = false;
    const ids = tokenizer.encode(text), unknown = tokenizer.unknown(ids), refused = refusal(ids, unknown);
    if (refused) throw new Error(refused);
    settings = { rank, alpha: 2 * rank, prompt };
    steps = 0;
    const model = new Llama(config, tensors, { ...settings, random: randomFrom(0) });
    tuning = new Tuning(model, ids, { rate, random: randomFrom(1) });
    const count = (arrays) => Object.values(arrays).reduce((sum, { data }) => sum + data.length, 0);
    const { length, train, held } = tuning;
    tell("begun", {
      tokens: ids.length, unknown, length, train: train.length, held: held.length,
      trained: count(model.trainable()), frozen: count(tensors),
    });
    measured();
    tell("before", { text: written() });
  },

  run() {
    if (running) return;
    running = true;
    began = steps; // who goes on after a stop gets as many steps again
    loop();
  },

  pause() {
    running = false;
    measured();
    wrote();
  },

  step() { step(); },

  write({ prompt }) {
    settings.prompt = prompt;
    wrote();
  },

  save() {
    measured();
    const { step, loss } = tuning.best;
    tell("saved", { zip: tuning.withBest((factors) => zip(adapterFiles(factors, settings))), step, loss });
  },
};

function step() {
  const start = performance.now(), loss = tuning.step(), seconds = (performance.now() - start) / 1000;
  if (!Number.isFinite(loss)) {
    tuning = null; // nor is the adapter
    throw new Error("The loss is no longer a number: the rate is too large. Begin again with a smaller one.");
  }
  tell("stepped", { step: steps, loss, seconds, last: tuning.last(began) });
  steps += 1;
  if (steps % EVERY) return;
  if (measured()) wrote();
  if (steps < tuning.last(began) || !running) return;
  running = false;
  tell("stopped", { step: steps });
}

// Measure what is held out, and tell whether it is the best so far.
function measured() {
  const held = tuning.measure(steps), { step, loss } = tuning.best;
  tell("measured", { step: steps, held, best: { step, loss } });
  return step === steps;
}

// Tell what the best adapter so far writes.
function wrote() {
  const { step } = tuning.best;
  tell("after", { text: tuning.withBest(() => written()), step });
}

function loop() {
  if (!running) return;
  guarded(step);
  setTimeout(loop); // between two steps, messages are read
}

// The prompt and what follows it, drawn with the same random numbers each time.
function written() {
  const ids = tokenizer.encode(settings.prompt || "\n").slice(-CONTEXT + TOKENS);
  const more = generate(tuning.model, ids, TOKENS, { temperature: TEMPERATURE, random: randomFrom(0) });
  return tokenizer.decode([...ids, ...more]);
}

// The bytes of a response, with word of how many have come.
async function counted(response) {
  const total = Number(response.headers.get("content-length")), parts = [];
  let loaded = 0;
  for (let reader = response.body.getReader(), part; !(part = await reader.read()).done;) {
    parts.push(part.value);
    tell("loading", { loaded: loaded += part.value.length, total });
  }
  return new Blob(parts).arrayBuffer();
}

async function guarded(f) {
  try {
    await f();
  } catch (error) {
    running = false;
    tell("failed", { message: error.message, kept: tuning !== null });
  }
}

addEventListener("message", ({ data }) => {
  const possible = tuning || ["load", "begin"].includes(data.ask); // a run can have failed
  if (possible) guarded(() => ASKED[data.ask](data));
});
