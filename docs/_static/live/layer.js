// The page where one layer trains: its controls, its pictures, its words. What is computed is in experiment.js.

import { checkLayer } from "./check.js";
import { CELL, add, bars, canvas, curves, heat } from "./draw.js";
import { Experiment, N_IN, N_OUT, TRUTHS, drawnFrom, spelled } from "./experiment.js";
import { largest } from "./matrix.js";
import { MISTAKES, STARTS, layerWith } from "./mistakes.js";
import { randomFrom } from "./random.js";
import { singularValues } from "./svd.js";

const SLIDERS = {
  rank: [1, 2, 3, 4, 5, 6, 7, 8],
  alpha: [1, 2, 4, 8, 16, 32],
  rate: [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1],
};
const LAST = 3000; // steps after which a run stops by itself

const root = document.querySelector('[data-live="layer"]');
const find = (selector) => root.querySelector(selector);
const control = (name) => find(`[name="${name}"]`);
let [experiment, running, seed, truth] = [null, false, 0, TRUTHS.face.draw()];
let before = []; // the losses of the run before this one, to compare with
let drawn = false; // whether a reader changed the truth

// --- the settings, as the controls have them

const chosen = (name) => SLIDERS[name][control(name).value];
const boxes = [];
const mistakes = () => boxes.filter((box) => box.checked).map((box) => box.dataset.mistake);

// Start training from the beginning. A run that goes on begins again with the new settings.
function begin() {
  const ran = running;
  stop();
  if (experiment?.steps > 4) before = experiment.history;
  experiment = new Experiment({
    rank: chosen("rank"), alpha: chosen("alpha"), rate: chosen("rate"), optimizer: control("optimizer").value,
    start: control("start").value, mistakes: mistakes(), truth, seed,
  });
  for (const name of Object.keys(SLIDERS)) {
    control(name).setAttribute("aria-valuetext", chosen(name));
    find(`output[for="live-${name}"]`).textContent = chosen(name);
  }
  check();
  show();
  say();
  remember();
  if (ran) run();
}

// --- the address has the settings, so that it can be sent, and a reload keeps them

const CHOICES = ["truth", "optimizer", "start"];
const PLAIN = { rank: "2", alpha: "4", rate: "0.03", truth: "face", optimizer: "adam", start: "peft" };

function remember() {
  const settings = new URLSearchParams();
  for (const name of [...Object.keys(SLIDERS), ...CHOICES]) {
    const value = name in SLIDERS ? `${chosen(name)}` : control(name).value;
    if (value !== PLAIN[name]) settings.set(name, value);
  }
  if (drawn) settings.set("cells", spelled(truth));
  if (seed) settings.set("seed", seed);
  if (mistakes().length) settings.set("mistakes", mistakes().join(","));
  const text = settings.toString();
  history.replaceState(null, "", `${location.pathname}${text ? `?${text}` : ""}${location.hash}`);
}

// Set the controls as the address says; what it says wrongly is left as it is.
function recall() {
  const settings = new URLSearchParams(location.search);
  for (const [name, values] of Object.entries(SLIDERS)) {
    const place = values.indexOf(Number(settings.get(name) ?? NaN));
    if (place >= 0) control(name).value = place;
  }
  for (const name of CHOICES) {
    const options = [...control(name).options].map((option) => option.value);
    if (options.includes(settings.get(name))) control(name).value = settings.get(name);
  }
  const wrong = (settings.get("mistakes") ?? "").split(",");
  for (const box of boxes) box.checked = wrong.includes(box.dataset.mistake);
  seed = Math.max(0, Math.trunc(Number(settings.get("seed"))) || 0);
  const own = drawnFrom(settings.get("cells") ?? "");
  truth = own ?? TRUTHS[control("truth").value].draw();
  drawn = own !== null;
}

// --- running

const outOfBounds = (loss) => !Number.isFinite(loss) || loss > 1e9;

function step() {
  experiment.step();
  if (outOfBounds(experiment.loss)) stop();
}

function frame() {
  if (!running) return;
  for (let i = 0; i < 2 && running; i += 1) step();
  if (experiment.steps >= LAST) stop();
  show();
  requestAnimationFrame(frame);
}

function run() {
  running = true;
  find("[data-do=run]").textContent = "Pause";
  say();
  requestAnimationFrame(frame);
}

function stop() {
  const ran = running;
  running = false;
  find("[data-do=run]").textContent = "Run";
  if (ran) say();
}

// --- what is seen

function show() {
  const { layer, history, least, values } = experiment, { lora_A, lora_B, rank } = layer.adapter;
  const delta = layer.adapter.delta(), left = truth.minus(delta), now = history.at(-1);
  find("[data-step]").textContent = experiment.steps;
  find("[data-loss]").textContent = experiment.loss.toPrecision(4);
  const most = Math.max(1, largest(truth)), wide = N_IN * CELL + 2, high = N_OUT * CELL + 2;

  canvas(find("[data-map=W]"), wide, high, `W, frozen: ${N_OUT} by ${N_IN}`);
  heat(find("[data-map=W]"), experiment.W, { most: largest(experiment.W) });
  canvas(find("[data-map=left]"), wide, high, `What is left of the truth, of length ${left.norm().toPrecision(3)}`);
  heat(find("[data-map=left]"), left, { most });
  showTruth(most);

  // B to the left of the change and A above it: each entry of the change is a row of B with a column of A.
  const product = find("[data-map=product]"), aside = (rank + 1) * CELL;
  const sizes = `B, ${N_OUT} by ${rank}, times A, ${rank} by ${N_IN}`;
  canvas(product, wide + aside, high + aside, `${sizes}: the learned change, of length ${delta.norm().toPrecision(3)}`);
  heat(product, lora_A, { x: 1 + aside, most: largest(lora_A) });
  heat(product, lora_B, { y: 1 + aside, most: largest(lora_B) });
  heat(product, delta, { x: 1 + aside, y: 1 + aside, most });
  add(product, "text", { x: aside - 6, y: 13, "text-anchor": "end" }, "A");
  add(product, "text", { x: 2, y: aside - 4 }, "B");

  // What comes back has the same places: dB beside B, dA above.
  const { whole, dA, dB } = experiment.flow(), back = find("[data-map=back]");
  const lengths = `dB, of length ${dB.norm().toPrecision(3)}, and dA, of length ${dA.norm().toPrecision(3)}`;
  canvas(back, wide + aside, high + aside, `What comes back: ${lengths}`);
  heat(back, dA, { x: 1 + aside, most: largest(dA) });
  heat(back, dB, { y: 1 + aside, most: largest(dB) });
  heat(back, whole, { x: 1 + aside, y: 1 + aside, most: largest(whole) });
  add(back, "text", { x: aside - 6, y: 13, "text-anchor": "end" }, "dA");
  add(back, "text", { x: 2, y: aside - 4 }, "dB");

  const told = values.map((v) => v.toFixed(2)).join(", ");
  bars(find("[data-map=values]"), singularValues(delta), values, `Singular values. True: ${told}`);
  const along = (key, run = history) => run.map((entry, t) => [t, entry[key]]);
  curves(find("[data-map=losses]"), {
    curves: [{ name: "ghost", values: along("loss", before) }, { name: "ink", values: along("loss") }],
    level: least,
    log: true,
    alt: `The loss by step, now ${experiment.loss.toPrecision(4)}`,
    title: [
      { name: "ink", label: "loss" }, ...(before.length ? [{ name: "ghost", label: "the run before" }] : []),
      ...(least > 1e-9 ? [{ name: "dashed", label: `best of rank ${rank}` }] : []),
    ],
  });
  curves(find("[data-map=moved]"), {
    curves: [{ name: "below", values: along("A") }, { name: "above", values: along("B") }],
    alt: `How far A has moved, ${now.A.toPrecision(3)}, and the length of B, ${now.B.toPrecision(3)}`,
    title: [{ name: "below", label: "|A − A0|" }, { name: "above", label: "|B|" }],
  });
}

function say() {
  const { steps, loss, least, layer } = experiment, { rank, scaling, lora_A, lora_B } = layer.adapter;
  const count = lora_A.data.length + lora_B.data.length, s = Number(scaling.toPrecision(3));
  const sizes = `Rank ${rank}, s = ${s}: ${count} numbers train in place of ${N_IN * N_OUT}.`;
  const bound = least > 1e-9
    ? `No adapter of this rank gets below ${least.toPrecision(4)}.`
    : "An adapter of this rank can learn all of this change.";
  const after = `After ${steps} ${steps === 1 ? "step" : "steps"} the loss`;
  let now = running ? "It trains." : `${after} is ${loss.toPrecision(4)}.`;
  if (outOfBounds(loss)) now = `${after} is out of bounds: the rate is too large for this scaling and optimizer.`;
  find(".says").textContent = [sizes, bound, now].join(" ");
  for (const box of boxes) { // beside its switch, where the eye is
    box.parentElement.nextElementSibling.textContent = box.checked ? MISTAKES[box.dataset.mistake].says : "";
  }
}

function check() {
  const { make, start } = layerWith(mistakes(), control("start").value);
  const found = checkLayer(make, (n_in, n_out, rank, alpha) => start(n_in, n_out, rank, alpha, randomFrom(2)));
  for (const [array, { right, error, says }] of Object.entries(found)) {
    const row = find(`[data-check="${array}"]`);
    row.dataset.verdict = right ? "right" : "wrong";
    [row.cells[1].textContent, row.cells[2].textContent] = [says, error ? error.toExponential(0) : "0"];
    row.cells[3].textContent = right ? "right" : "wrong";
  }
}

// --- drawing the truth, by pointer or by keys

const cursor = { row: 0, column: 0 };
const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function showTruth(most) {
  const svg = find("[data-map=truth]");
  canvas(svg, N_IN * CELL + 2, N_OUT * CELL + 2, "The true change, to draw in: arrow keys move, the space bar paints");
  heat(svg, truth, { most });
  const place = { x: 1 + cursor.column * CELL, y: 1 + cursor.row * CELL };
  add(svg, "rect", { ...place, width: CELL, height: CELL, class: "cursor" });
}

function paint(value) {
  const i = cursor.row * N_IN + cursor.column;
  truth.data[i] = value ?? (truth.data[i] ? 0 : 1);
  experiment.aim(truth);
  drawn = true;
  show();
  find(".painted").textContent = `Row ${cursor.row + 1}, column ${cursor.column + 1} is ${truth.data[i]}.`;
  return truth.data[i];
}

function cellAt(event) {
  const box = find("[data-map=truth]").getBoundingClientRect();
  const [across, down] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  const clamp = (part, count) => Math.min(Math.max(Math.floor(part * count), 0), count - 1);
  return { row: clamp(down, N_OUT), column: clamp(across, N_IN) };
}

// Paint from the last cell to this one: a quick stroke skips cells between two events.
function stroke({ row, column }, value) {
  const from = { ...cursor }, count = Math.max(Math.abs(row - from.row), Math.abs(column - from.column));
  for (let i = 1; i <= count; i += 1) {
    cursor.row = Math.round(from.row + (i / count) * (row - from.row));
    cursor.column = Math.round(from.column + (i / count) * (column - from.column));
    paint(value);
  }
}

function letDraw(svg) {
  let brush = null; // what a stroke paints: the opposite of the cell where it began
  let finger = null; // where a finger came down: up or down it scrolls, aside it paints, and lifted it paints a cell
  const end = () => {
    [brush, finger] = [null, null];
    say();
    remember();
  };
  svg.addEventListener("pointerdown", (event) => {
    Object.assign(cursor, cellAt(event));
    if (event.pointerType === "mouse") brush = paint(); else finger = event;
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => {
    const aside = finger && Math.abs(event.clientX - finger.clientX) > Math.abs(event.clientY - finger.clientY);
    if (aside) [brush, finger] = [paint(), null];
    if (brush !== null) stroke(cellAt(event), brush);
  });
  svg.addEventListener("pointerup", () => {
    if (finger) paint();
    end();
  });
  svg.addEventListener("pointercancel", end); // the browser scrolls
  svg.addEventListener("keydown", (event) => {
    const [down, across] = ARROWS[event.key] ?? [0, 0];
    const paints = event.key === " " || event.key === "Enter";
    if (!down && !across && !paints) return;
    event.preventDefault();
    cursor.row = Math.min(Math.max(cursor.row + down, 0), N_OUT - 1);
    cursor.column = Math.min(Math.max(cursor.column + across, 0), N_IN - 1);
    if (paints) { paint(); say(); remember(); } else show();
  });
}

// --- the page comes to life

function options(name, entries, first) {
  for (const [value, label] of entries) control(name).add(new Option(label, value, value === first, value === first));
}

options("truth", Object.entries(TRUTHS).map(([name, { label }]) => [name, label]), "face");
options("start", Object.entries(STARTS).map(([name, { label }]) => [name, label]), "peft");
options("optimizer", [["adam", "Adam (20) to (24)"], ["descent", "gradient descent"]], "adam");
for (const [name, { label }] of Object.entries(MISTAKES)) {
  const box = Object.assign(document.createElement("input"), { type: "checkbox", autocomplete: "off" });
  box.dataset.mistake = name;
  boxes.push(box);
  find(".mistakes").appendChild(document.createElement("label")).append(box, ` ${label}`);
  const why = find(".mistakes").appendChild(document.createElement("p"));
  Object.assign(why, { className: "why" }).setAttribute("aria-live", "polite");
}
const starts = boxes.filter((box) => MISTAKES[box.dataset.mistake].start); // a layer has one start
for (const input of root.querySelectorAll("input, select")) {
  input.addEventListener("input", () => {
    if (input.name === "truth") [truth, drawn] = [TRUTHS[input.value].draw(), false];
    if (starts.includes(input)) for (const box of starts) box.checked &&= box === input;
    begin();
  });
}
find("[data-do=run]").addEventListener("click", () => (running ? stop() : run()));
find("[data-do=step]").addEventListener("click", () => { stop(); step(); show(); say(); });
find("[data-do=restart]").addEventListener("click", begin);
find("[data-do=seed]").addEventListener("click", () => { seed += 1; begin(); });
letDraw(find("[data-map=truth]"));
find(".still").hidden = true;
find(".works").hidden = false;
recall();
begin();
