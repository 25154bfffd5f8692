// Fine-tuning on a text, and text from the model: of minilora's language/text.py, training.py
// and language/generation.py what the page needs.

import { crossEntropy } from "./losses.js";
import { Adam } from "./optim.js";

export const [LENGTH, BATCH, LEAST, MEASURED] = [64, 4, 17, 8];
const [PATIENCE, MOST_UNKNOWN, END] = [20, 0.25, 3]; // steps without a lower held-out loss; a share of tokens; an id

// Say why nothing can be learned from a text, or "".
export function refusal(ids, unknown) {
  if (ids.length < LEAST) return `The text has ${ids.length} tokens. Paste at least ${LEAST}, a sentence or two.`;
  if (unknown <= MOST_UNKNOWN * ids.length) return "";
  return [
    `${unknown} of the text's ${ids.length} tokens stand for letters that this model does not know:`,
    "to it they are all the same. Paste a text in English, or in another language with Latin letters.",
  ].join(" ");
}

// Cut a text's ids into windows of one length, each with the ids that follow, and hold every tenth of them out. Of a
// text so short that this gives fewer than are measured, every fourth.
export function windows(ids, length) {
  const count = Math.floor((ids.length - 1) / length), every = count < 10 * MEASURED ? 4 : 10;
  const all = Array.from({ length: count }, (_, i) => ids.slice(i * length, (i + 1) * length + 1));
  const held = (i) => (all.length - 1 - i) % every === 0; // counted from the end, so that there is always one
  return { train: all.filter((_, i) => !held(i)), held: all.filter((_, i) => held(i)).slice(0, MEASURED) };
}

export class Tuning {
  constructor(model, ids, { rate, random }) {
    this.length = Math.min(LENGTH, Math.floor((ids.length - 1) / 2));
    Object.assign(this, { model, random, ...windows(ids, this.length) });
    this.optimizer = new Adam(model.trainable(), rate);
    this.queue = [];
  }

  // One step on a batch; each window comes once before any comes again. Returns the loss before the step.
  step() {
    const batch = Array.from({ length: Math.min(BATCH, this.train.length) }, () => this.next());
    const [logits, targets, cache] = this.scored(batch);
    const [loss, d_logits] = crossEntropy(logits, targets);
    this.optimizer.step(this.model.backward(d_logits, cache));
    return loss;
  }

  next() {
    if (!this.queue.length) this.queue = [...this.train];
    const [window] = this.queue.splice(Math.floor(this.random() * this.queue.length), 1);
    return window;
  }

  heldOutLoss() {
    const [logits, targets] = this.scored(this.held);
    return crossEntropy(logits, targets)[0];
  }

  // Measure what is held out after this many steps, and keep the factors where it is the least so far.
  measure(step) {
    const loss = this.heldOutLoss();
    if (!(loss >= this.best?.loss)) this.best = { step, loss, factors: copied(this.model.trainable()) };
    return loss;
  }

  // The step after which a run that began there stops, if no lower loss is measured before.
  last(began = 0) { return Math.max(this.best.step, began) + PATIENCE; }

  // Do something with the best factors in place; then training's own stand there again.
  withBest(then) {
    const own = this.model.trainable(), last = copied(own);
    const put = (factors) => { for (const [name, { data }] of Object.entries(own)) data.set(factors[name].data); };
    put(this.best.factors);
    try {
      return then(own);
    } finally {
      put(last);
    }
  }

  scored(some) {
    const [logits, cache] = this.model.forward(some.flatMap((window) => window.slice(0, -1)), this.length);
    return [logits, some.flatMap((window) => window.slice(1)), cache];
  }
}

const copied = (arrays) => Object.fromEntries(Object.entries(arrays).map(([name, matrix]) => [name, matrix.copy()]));

// Yield the ids that follow a prompt, each drawn at this temperature: token v with a probability of q_v.
export function* generate(model, prompt, tokens, { temperature, random }) {
  let [logits, past] = model.forward(prompt, prompt.length);
  for (let i = 0; i < tokens; i += 1) {
    const token = drawn(logits.data.subarray(-logits.columns), temperature, random);
    if (token === END) return;
    yield token;
    [logits, past] = model.forward([token], 1, past);
  }
}

function drawn(z, c, random) {
  const most = z.reduce((a, b) => Math.max(a, b)); // subtracted, which leaves q as it is, and exp finite
  const e = Array.from(z, (z_v) => Math.exp((z_v - most) / c)), total = e.reduce((a, b) => a + b);
  const q = e.map((e_v) => e_v / total); // eq. (gen.1)
  let left = random();
  for (let v = 0; v < q.length; v += 1) {
    left -= q[v];
    if (left < 0) return v;
  }
  return e.indexOf(1); // where rounding left something over: the likeliest
}
