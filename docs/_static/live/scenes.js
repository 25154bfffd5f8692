// The front page's scenes. Each is a function of (time from 0 to 1, settings) -> the state that board.js draws, and a
// sentence for whoever does not see it. A scene with a question rests at 0 until the reader has answered.

import { gigabytes, percent } from "./board.js";
import { Experiment } from "./experiment.js";
import { Matrix, largest } from "./matrix.js";
import { MODELS, adapterNumbers, total, trainingMemory } from "./memory.js";
import { inFourBits } from "./nf4.js";
import { gaussian, randomFrom } from "./random.js";
import { strongest } from "./svd.js";

const WORD = [
  "............................",
  ".#..............####....#...",
  ".#..............#...#..#.#..",
  ".#......###.....#...#.#...#.",
  ".#.....#...#....####..#...#.",
  ".#.....#...#....#.#...#####.",
  ".#.....#...#....#..#..#...#.",
  ".#####..###.....#...#.#...#.",
  "............................",
];
const [ROWS, COLUMNS] = [WORD.length, WORD[0].length];
export const FROZEN = ROWS * COLUMNS;
const inked = (i) => WORD[Math.floor(i / COLUMNS)][i % COLUMNS] === "#";
export const TRUTH = Matrix.filled(ROWS, COLUMNS, (_, i) => (inked(i) ? 1 : 0));
export const W = Matrix.filled(ROWS, COLUMNS, gaussian(randomFrom(4))).scaled(0.25);

export const CHOICES = {
  products: [1, 2, 3, 4, 5, 6, 7],
  rank: [1, 2, 3, 4, 5, 6, 7],
  alpha: [1, 2, 4, 8, 16, 32],
  rate: [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5],
  apart: [0, 0.25, 0.5, 0.75, 1],
  size: [0.01, 0.03, 0.05, 0.1, 0.3, 1],
  model: Object.keys(MODELS),
  tokens: [512, 1024, 2048, 4096, 8192, 16384, 32768],
};
export const PLAIN = {
  products: 7, rank: 2, alpha: 8, rate: 0.05, apart: 0, size: 0.03, model: "Llama-2-7B", tokens: 4096,
};

const numbers = (rank) => rank * (ROWS + COLUMNS);
const squares = (matrix) => matrix.data.reduce((sum, value) => sum + value * value, 0);
const within = (t, from, to) => Math.min(Math.max((t - from) / (to - from), 0), 1); // how much of a part of the time
const eased = (t) => t * t * (3 - 2 * t);

export const learned = (change) => 1 - squares(TRUTH.minus(change)) / squares(TRUTH);

// --- trainings, each run once and kept: the factors after each step

const LAST = 90; // steps after which a training's picture ends
const runs = new Map();

export function training({ rank, alpha = 2 * rank, rate = PLAIN.rate, optimizer = "adam" }) {
  const key = [rank, alpha, rate, optimizer].join();
  if (!runs.has(key)) runs.set(key, new Run({ rank, alpha, rate, optimizer }));
  return runs.get(key);
}

class Run {
  constructor(settings) {
    this.experiment = new Experiment({ ...settings, truth: TRUTH });
    this.steps = [];
    this.keep();
  }

  keep() {
    const { lora_A, lora_B, scaling } = this.experiment.layer.adapter, { whole, dA, dB } = this.experiment.flow();
    this.steps.push({ A: lora_A.copy(), B: lora_B.copy(), s: scaling, loss: this.experiment.loss, G: whole, dA, dB });
  }

  at(step) {
    while (this.steps.length <= step) {
      this.experiment.step();
      this.keep();
    }
    const found = this.steps[step];
    return { ...found, change: found.B.scaled(found.s).times(found.A) };
  }

  losses(step) {
    this.at(step);
    return this.steps.slice(0, step + 1).map(({ loss }) => loss);
  }

  get least() { return this.experiment.least; }
}

// --- the scenes

const trains = (rank) => `${numbers(rank)} numbers train, ${FROZEN} stay`;
const bars = (rank) => ({ kind: "numbers", truth: TRUTH, frozen: FROZEN, trained: numbers(rank) });

const SHOWN = [1, 2, 4];

// Adapters of three ranks, one after another, each trained from the start.
function hero(t) {
  const turn = Math.min(Math.floor(t * SHOWN.length), SHOWN.length - 1), rank = SHOWN[turn];
  const step = Math.round(LAST * within(t * SHOWN.length - turn, 0.04, 0.72));
  const { A, B, change } = training({ rank }).at(t === 1 ? LAST : step), share = percent(learned(change));
  return {
    front: change, A, B, W, strip: bars(rank),
    names: { title: `W + s B A`, note: `rank ${rank}: ${share} learned` },
    alt: `W, grey, and in front of it s B A, which learns to spell LoRA: B, tall, at its left, and A, flat, above. ` +
      `At rank ${rank}, ${trains(rank)}, and ${share} is learned.`,
  };
}

const SHARES = CHOICES.products.map((rank) => {
  const { B, A } = strongest(TRUTH, rank);
  return learned(B.times(A));
});

// The strongest outer product; once the question is answered the others, and then as many as the slider says.
function rank(t, { products: chosen }) {
  const shown = 1 + Math.floor(6 * t), count = t < 1 ? shown : chosen;
  const { B, A } = strongest(TRUTH, count), change = B.times(A), share = percent(learned(change));
  const products = count === 1 ? "one outer product" : `the sum of ${count} outer products`;
  return {
    front: change, A, B, W, strip: { kind: "shares", shares: SHARES, shown, rank: count },
    names: { title: products, note: `${share} of the word`, front: "B A" },
    alt: `B A is ${products}, and has ${share} of the word. ${trains(count)}.`,
  };
}

const ONE = { rank: 1, alpha: 4, rate: 0.15, optimizer: "descent" };
const MANY = 22; // steps after which the picture ends

// One step, and what comes back before it and after it: dy^T x folds into dB, to the left, and into dA, upwards.
// `parts` says when: what comes back, its fold to the left, its fold upwards, and what then moves.
function step(t) {
  const found = training(ONE), second = t >= 0.55, at = found.at(second ? 1 : 0);
  const part = (from, to) => within(second ? within(t, 0.55, 0.88) : within(t, 0, 0.46), from, to);
  const base = { W, A: at.A, B: at.B, mostA: largest(found.at(0).A), mostB: largest(found.at(1).B), strip: bars(1) };
  if (t === 0) {
    return {
      ...base, front: at.change, names: { title: "before the first step", note: "s B A = 0" },
      alt: "A is random, B is zero, and so is s B A: the layer answers as W alone.",
    };
  }
  if (t > 0.46 && !second) { // B goes where dB sends it, and s B A appears
    const one = found.at(1), B = one.B.scaled(within(t, 0.46, 0.5));
    return {
      ...base, B, front: one.change.scaled(within(t, 0.46, 0.5)), most: largest(one.change),
      names: { title: "step 1", note: "B has moved: rows are multiples of A" },
      alt: "After one step B has moved and A has not. Each row of s B A is a multiple of A's random row.",
    };
  }
  if (t > 0.88) {
    const steps = 1 + Math.round((MANY - 1) * within(t, 0.88, 1)), { A, B, change } = found.at(steps);
    return {
      front: change, A, B, W, strip: bars(1),
      names: { title: `step ${steps}`, note: `${percent(learned(change))} learned` },
      alt: `After ${steps} steps A and B have both turned to the word: ${percent(learned(change))} of it is learned.`,
    };
  }
  const [left, up] = [part(0.25, 0.55), part(0.6, 0.9)];
  const what = [
    [part(0, 0.25) < 1, "dyᵀx, which all of W would get"],
    [left < 1, "its columns, times A, add up to dB"],
    [up < 1, "its rows, times B, add up to dA"],
    [true, second ? "dB at the left, dA above" : "dB at the left; dA is zero"],
  ].find(([is]) => is)[1];
  const fold = {
    G: at.G, A: at.A, B: at.B, s: at.s,
    mostB: largest(found.at(0).dB), mostA: largest(found.at(1).dA),
    left: left > 0 && left < 1 ? eased(left) : -1,
    up: up > 0 && up < 1 ? eased(up) : -1,
    dB: left === 1 ? at.dB : null,
    dA: up === 1 ? at.dA : null,
  };
  return {
    ...base, fold, front: at.G, most: largest(found.at(0).G),
    names: { title: second ? "step 2" : "step 1", note: what, front: "dyᵀx" },
    alt: `What comes back before ${second ? "the second" : "the first"} step, on the word's place: ${what}.`,
  };
}

// A training at the rank of the slider; once it runs, with the least loss of that rank.
function run(t, { rank: r }) {
  const at = Math.round(LAST * t), found = training({ rank: r }), { A, B, change } = found.at(at);
  const losses = found.losses(at), share = percent(learned(change)), loss = losses.at(-1).toPrecision(3);
  return {
    front: change, A, B, W, strip: { kind: "curve", losses, level: t > 0 ? found.least : null, last: LAST },
    names: { title: `step ${at}, loss ${loss}`, note: `rank ${r}: ${share} learned` },
    alt: `After ${at} steps at rank ${r} the loss is ${loss}, and ${share} of the word is learned.` +
      (t > 0 ? ` No adapter of this rank gets below ${found.least < 1e-9 ? 0 : found.least.toPrecision(3)}.` : ""),
  };
}

const AFTER = 10, USUAL = { rank: 2, alpha: 4, rate: 0.05 };

// The same start after ten steps, with what the sliders say; the grey curve is that of the usual settings.
function alpha(t, settings) {
  const { rank: r, alpha: own, rate } = settings, usual = training(USUAL);
  const found = t > 0 ? training({ rank: r, alpha: own, rate }) : usual, at = Math.ceil(AFTER * t);
  const { A, B, s, change } = found.at(at), far = (run) => run.at(1).change.norm();
  const told = `s = ${Number(s.toPrecision(3))}`, times = Number((far(found) / far(usual)).toPrecision(3));
  const [losses, level] = t > 0 ? [found.losses(LAST), found.least] : [found.losses(0), null];
  const curve = { losses, before: usual.losses(LAST), level, last: LAST };
  return {
    front: change, A, B, W, strip: { kind: "curve", ...curve },
    names: { title: `${told}, step ${at}`, note: t > 0 ? `first step: ${times} times as far` : "alpha 4, rank 2" },
    alt: `${told}. The first step moves the weight ${times} times as far as with alpha ${USUAL.alpha} at rank ` +
      `${USUAL.rank} and rate ${USUAL.rate}. The picture is that after ${at} steps.`,
  };
}

// The sheets come together, and A and B are gone; the slider takes them apart again.
function merge(t, { apart }) {
  const { A, B, change } = training({ rank: 4 }).at(LAST), lift = t < 1 ? 1 - eased(t) : apart;
  if (lift === 0) {
    return {
      W: W.plus(change), lift: 0, strip: bars(0),
      names: { title: "one weight, W + s B A", note: `${FROZEN} numbers`, W: "W + s B A" },
      alt: `A and B are gone. One weight is left, W + s B A, of ${FROZEN} numbers.`,
    };
  }
  return {
    front: change, A, B, W, lift, faint: 0.25 + 0.75 * lift, strip: bars(4),
    names: { title: lift < 1 ? "merging" : "W + s B A", note: trains(4) },
    alt: `s B A, of rank 4, lies in front of W. ${trains(4)}.`,
  };
}

// What merging into four bits leaves of a change of that size, beside what is in A and B.
export function mergedInFourBits(size) {
  const { change } = training({ rank: 4 }).at(LAST), stored = inFourBits(W);
  const scale = (size * stored.norm()) / change.norm();
  const wanted = change.scaled(scale), added = inFourBits(stored.plus(wanted)).minus(stored);
  const kept = added.data.reduce((sum, value, i) => sum + value * wanted.data[i], 0) / squares(wanted);
  const noise = added.minus(wanted.scaled(kept)).norm() / wanted.norm();
  return { stored, seen: added.scaled(1 / scale), kept, noise };
}

// W in four bits, A and B beside it; then the sum in four bits.
function bits(t, { size }) {
  const { A, B, change } = training({ rank: 4 }).at(LAST), { stored, seen, kept, noise } = mergedInFourBits(size);
  const told = `a change of ${percent(size)} of W`, lift = 1 - eased(within(t, 0, 0.6));
  if (t < 1) {
    return {
      front: change, A, B, W: stored, lift, faint: 0.25 + 0.75 * lift, strip: bars(4),
      names: { title: "W in four bits", note: t > 0 ? told : "A and B beside it, exact", W: "W, 16 greys" },
      alt: "W has 16 greys in each block of 64 numbers. A and B stand beside it in full.",
    };
  }
  return {
    front: seen, W: stored, strip: bars(0),
    names: {
      title: `merged: ${told}`, note: `${percent(kept)} kept, noise ${percent(noise)}`,
      front: "what is left of it", W: "W, 16 greys",
    },
    alt: `After merging ${told} into four bits, ${percent(kept)} of it is kept, with a noise of ${percent(noise)}.`,
  };
}

const RANK_OF_MEMORY = 16;

function waysToTrain({ model, tokens }) {
  const memory = (options) => trainingMemory(MODELS[model], { tokens, ...options }), lora = { rank: RANK_OF_MEMORY };
  return [
    { name: "all weights", parts: memory({}) },
    { name: `LoRA, rank ${RANK_OF_MEMORY}`, parts: memory(lora) },
    { name: "LoRA, W in four bits", parts: memory({ ...lora, bits: 4 }) },
    { name: "and activations recomputed", parts: memory({ ...lora, bits: 4, recompute: true }) },
  ];
}

// The memory of a step, one way after another.
function memory(t, settings) {
  const ways = waysToTrain(settings), shown = 1 + Math.floor(3 * t);
  const file = `The adapter's file: ${gigabytes(2 * adapterNumbers(MODELS[settings.model], RANK_OF_MEMORY))}.`;
  return {
    ways, shown, file,
    alt: `A step of ${settings.model} on ${settings.tokens.toLocaleString("en-US")} tokens: ` +
      `${ways.slice(0, shown).map((way) => `${way.name} ${gigabytes(total(way.parts))}`).join("; ")}. ${file}`,
  };
}

// In the order of the page. `heading` is the section's address, `seconds` how long the scene moves, and `still` when it
// shows most: there it stands for a reader who wants less motion.
export const SCENES = [
  { name: "hero", heading: null, draw: hero, seconds: 9, controls: [] },
  { name: "rank", heading: "a-column-times-a-row", draw: rank, seconds: 5, controls: ["products"] },
  { name: "step", heading: "the-first-step", draw: step, seconds: 16, still: 0.87, controls: [] },
  { name: "run", heading: "many-steps", draw: run, seconds: 3, controls: ["rank"] },
  { name: "alpha", heading: "alpha-and-the-rate", draw: alpha, seconds: 2, controls: ["rank", "alpha", "rate"] },
  { name: "merge", heading: "merging", draw: merge, seconds: 3, controls: ["apart"] },
  { name: "bits", heading: "four-bits", draw: bits, seconds: 3, controls: ["size"] },
  { name: "memory", heading: "the-memory-of-your-model", draw: memory, seconds: 4, controls: ["model", "tokens"] },
];

// --- what has happened to the object: a tale, and what each event makes of it. Nothing else changes what is drawn.

// Begun at the top: which scene, how far each one is, which are open, what the sliders say, whether time runs, and
// whether the reader wants things to stay still.
export function begun({ still = false } = {}) {
  const times = Object.fromEntries(SCENES.map(({ name }) => [name, 0]));
  const tale = { scene: "hero", times, open: ["hero"], settings: { ...PLAIN }, running: !still, still };
  return still ? { ...tale, times: { ...times, hero: 1 } } : tale;
}

const sceneOf = (tale) => SCENES.find(({ name }) => name === tale.scene);
const at = (tale, time) => ({ ...tale, times: { ...tale.times, [tale.scene]: time } });
const known = (list, name) => (list.includes(name) ? list : [...list, name]);

const EVENTS = {
  // The reader scrolled. What was seen to its end stays so.
  scrolled: (tale, { scene }) => {
    if (scene === tale.scene) return tale;
    const time = tale.times[scene];
    return { ...tale, scene, running: !tale.still && tale.open.includes(scene) && time < 1 };
  },
  // A question was answered, or its answer opened. With less motion it stands still at once.
  answered: (tale, { scene }) => {
    const told = { ...tale, scene, open: known(tale.open, scene) };
    if (tale.open.includes(scene)) return told;
    return tale.still ? at(told, sceneOf(told).still ?? 1) : { ...at(told, 0), running: true };
  },
  // Play or pause; from the end, again.
  pressed: (tale) => {
    if (tale.running) return { ...tale, running: false };
    const again = tale.times[tale.scene] === 1 ? at(tale, 0) : tale;
    return { ...again, running: true };
  },
  // Time went by, in seconds.
  passed: (tale, { seconds }) => {
    if (!tale.running) return tale;
    const time = Math.min(tale.times[tale.scene] + seconds / sceneOf(tale).seconds, 1);
    return { ...at(tale, time), running: time < 1 };
  },
  // The reader holds time in the hand.
  moved: (tale, { time }) => ({ ...at(tale, time), running: false }),
  // Or one of the settings.
  set: (tale, { name, value }) => {
    return { ...at(tale, 1), running: false, settings: { ...tale.settings, [name]: value } };
  },
};

export function after(tale, { type, ...event }) {
  return EVENTS[type](tale, event);
}

// What is drawn: before its question is answered a scene's beginning, whatever the time.
export function stateOf(tale) {
  const { scene, times, open, settings } = tale;
  return sceneOf(tale).draw(open.includes(scene) ? times[scene] : 0, settings);
}

// --- where the reader is, and what the reader said

// The scene whose section the reading line is in, by the sections' upper edges; the first scene's is -Infinity.
export function sceneAt(tops, line) {
  return SCENES[tops.reduce((found, top, k) => (top <= line ? k : found), 0)].name;
}
