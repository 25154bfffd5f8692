// The front page's object as a picture: a state (scenes.js) -> shapes -> the markup of an SVG. No page is needed.
//
//              A (r, in), flat
//     B        s B A lies in front
//     (out, r) of W (out, in), which is grey
//
// Orange is above zero, blue below. An entry of W is the darker, the larger it is.

import { largest } from "./matrix.js";
import { total } from "./memory.js";

const CELL = 12, THIN = 7, MOST = 7; // a cell of W, the thickness of a row of A, and how many of them fit
const GAP = 6;
const [BEHIND, LEFT, TOP] = [2 * CELL, 4 + MOST * THIN + GAP, 22 + MOST * THIN + GAP];
export const [WIDTH, HEIGHT] = [LEFT + 28 * CELL + BEHIND + 2, TOP + 9 * CELL + BEHIND + 96];
const STRIP = HEIGHT - 66; // where the line of bars or curves begins

const ABOVE = "#e8743b", BELOW = "#4269d0", GREY = "#888", THIRD = "#2a9d6f";
const SHADES = 16;

const between = (a, b, t) => a + (b - a) * t;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const short = (value) => `${Number(value.toFixed(1))}`;

const shape = (tag, attributes, text = "") => ({ tag, attributes, text });

function words(x, y, text, { anchor = "start", size = 13, weight, opacity } = {}) {
  return shape("text", { x, y, "text-anchor": anchor, "font-size": size, "font-weight": weight, opacity }, text);
}

function frame(x, y, width, height, attributes = {}) {
  return shape("rect", { x, y, width, height, fill: "none", stroke: GREY, ...attributes });
}

// Cells of one shade are one path. `place(i, j)` has a cell's corner, `shade(value)` its colour and strength.
function cells({ rows, columns, data }, place, shade, wide = CELL, high = CELL, opacity = 1) {
  const paths = new Map();
  data.forEach((value, n) => {
    const { fill, strength } = shade(value), step = Math.round(strength * SHADES);
    if (!step) return;
    const key = `${fill} ${step}`, [x, y] = place(Math.floor(n / columns), n % columns);
    const square = `M${short(x)} ${short(y)}h${short(wide)}v${short(high)}h${short(-wide)}z`;
    paths.set(key, (paths.get(key) ?? "") + square);
  });
  return [...paths].map(([key, d]) => {
    const [fill, step] = key.split(" ");
    return shape("path", { d, fill, "fill-opacity": Number(((step / SHADES) * opacity).toFixed(3)) });
  });
}

// Orange or blue, in full from `most` on.
const signed = (most) => (value) => {
  return { fill: value > 0 ? ABOVE : BELOW, strength: Math.min(Math.abs(value) / most, 1) };
};

const grey = (value) => ({ fill: "currentColor", strength: clamp(0.28 + 0.55 * value, 0.07, 0.94) });

const grid = (x, y, wide = CELL, high = CELL) => (i, j) => [x + j * wide, y + i * high];

// --- the parts of the layer

function sheetOfW({ W, lift = 1 }) { // behind it is pale, so that one sees what lies in front
  const x = LEFT + lift * BEHIND, y = TOP + lift * BEHIND;
  const all = cells(W, grid(x, y), grey, CELL, CELL, between(1, 0.5, lift));
  return [...all, frame(x, y, W.columns * CELL, W.rows * CELL)];
}

function sheetInFront({ front, most = 1, faint = 1 }) {
  const box = [LEFT, TOP, front.columns * CELL, front.rows * CELL];
  return [...cells(front, grid(LEFT, TOP), signed(most), CELL, CELL, faint), frame(...box, { opacity: faint })];
}

// A factor lies at its place, or `away` from it by that many rows or columns: there its gradient stands.
function factorB(B, name, { most = largest(B), faint = 1, away = 0 }) {
  const x = LEFT - GAP - (B.columns + away) * THIN;
  return [
    ...cells(B, grid(x, TOP, THIN, CELL), signed(most), THIN, CELL, faint),
    frame(x, TOP, B.columns * THIN, B.rows * CELL, { opacity: faint }),
    words(x + (B.columns * THIN) / 2, TOP + B.rows * CELL + 14, name, { anchor: "middle", opacity: faint }),
  ];
}

function factorA(A, name, { most = largest(A), faint = 1, away = 0 }) {
  const y = TOP - GAP - (A.rows + away) * THIN;
  return [
    ...cells(A, grid(LEFT, y, CELL, THIN), signed(most), CELL, THIN, faint),
    frame(LEFT, y, A.columns * CELL, A.rows * THIN, { opacity: faint }),
    words(LEFT - 5, y + (A.rows * THIN) / 2 + 5, name, { anchor: "end", opacity: faint }),
  ];
}

const moving = (x, y, width, height) => { // the edge of what moves, even where all of it is zero
  return frame(short(x), short(y), short(width), short(height), { stroke: "currentColor", "stroke-dasharray": "3 3" });
};

// dy^T x folds to the left: its columns, each times its entry of A, move to one column of dB and add up there.
function foldLeft({ G, A, s }, amount, away) {
  const most = largest(G.times(A.T)) * s, target = LEFT - GAP - (1 + away) * THIN, wide = between(CELL, THIN, amount);
  const weighed = G.map((value, n) => s * value * A.data[n % G.columns]);
  const place = (i, j) => [between(LEFT + j * CELL, target, amount), TOP + i * CELL];
  const [x, width] = [between(LEFT, target, amount), between(G.columns * CELL, THIN, amount)];
  const all = cells(weighed, place, signed(most), wide, CELL, between(1, 0.6, amount));
  return [...all, moving(x, TOP, width, G.rows * CELL)];
}

// And upwards: its rows, each times its entry of B, move to one row of dA.
function foldUp({ G, B, s }, amount, away) {
  const most = Math.max(largest(B.T.times(G)) * s, 1e-9), target = TOP - GAP - (1 + away) * THIN;
  const high = between(CELL, THIN, amount);
  const weighed = G.map((value, n) => s * value * B.data[Math.floor(n / G.columns)]);
  const place = (i, j) => [LEFT + j * CELL, between(TOP + i * CELL, target, amount)];
  const [y, height] = [between(TOP, target, amount), between(G.rows * CELL, THIN, amount)];
  const all = cells(weighed, place, signed(most), CELL, high, between(1, 0.6, amount));
  return [...all, moving(LEFT, y, G.columns * CELL, height)];
}

// --- the line below: what to learn and how many numbers, or bars, or curves

function numbersStrip({ truth, frozen, trained }) {
  const small = 3, x = truth.columns * small + 24, unit = (WIDTH - x - 8) / Math.max(frozen, trained);
  const bar = (y, count, fill, opacity, text) => [
    shape("rect", { x, y, width: short(Math.max(count * unit, 1)), height: 9, fill, "fill-opacity": opacity }),
    words(x, y + 21, text, { size: 12 }),
  ];
  return [
    ...cells(truth, grid(2, STRIP + 6, small, small), signed(1), small, small),
    frame(2, STRIP + 6, truth.columns * small, truth.rows * small),
    words(2, STRIP + 50, "to learn", { size: 12 }),
    ...bar(STRIP + 3, frozen, "currentColor", 0.35, `W: ${frozen} numbers${trained ? ", frozen" : ""}`),
    ...(trained ? bar(STRIP + 34, trained, ABOVE, 1, `A and B: ${trained} numbers, which train`) : []),
  ];
}

function sharesStrip({ shares, shown, rank }) {
  const wide = (WIDTH - 8) / shares.length, high = 34;
  return shares.slice(0, shown).flatMap((share, k) => { // how many there are is not said before
    const x = 4 + k * wide, tall = high * share, y = STRIP + 14 + high - tall;
    const bar = { x: x + 6, y: short(y), width: short(wide - 12), height: short(tall) };
    const look = { fill: ABOVE, "fill-opacity": k + 1 === rank ? 1 : 0.45 };
    return [
      shape("rect", { ...bar, ...look }), words(x + wide / 2, y - 3, percent(share), middle(12)),
      words(x + wide / 2, STRIP + 61, k ? `${k + 1}` : "rank 1", middle(12)),
    ];
  });
}

const middle = (size) => ({ anchor: "middle", size });
export const percent = (share) => `${Math.round(100 * share)} %`;

// Losses by step. The dashed line is the least of the rank.
const HIGH = 8;

function curveStrip({ losses, before = [], level, last }) {
  const [left, right, top, bottom] = [28, WIDTH - 6, STRIP + 2, STRIP + 48];
  const px = (step) => left + (step / last) * (right - left);
  const py = (loss) => bottom - (Number.isFinite(loss) ? clamp(loss / HIGH, 0, 1) : 1) * (bottom - top);
  const line = (run, look) => {
    const points = run.map((loss, step) => `${short(px(step))},${short(py(loss))}`).join(" ");
    return shape("polyline", { points, fill: "none", "stroke-width": 2, "stroke-linejoin": "round", ...look });
  };
  const across = (loss, look) => {
    return shape("line", { x1: left, x2: right, y1: short(py(loss)), y2: short(py(loss)), ...look });
  };
  const tick = (loss) => words(left - 5, py(loss) + 4, `${loss}`, { anchor: "end", size: 11 });
  return [
    ...[0, 4, 8].flatMap((loss) => [across(loss, { stroke: GREY, "stroke-opacity": 0.3 }), tick(loss)]),
    ...(level === null ? [] : [across(level, { stroke: "currentColor", "stroke-dasharray": "4 4" })]),
    ...(before.length ? [line(before, { stroke: GREY })] : []),
    line(losses, { stroke: ABOVE }),
    words(left, STRIP + 61, `loss by step${level === null ? "" : "; dashed: the least of this rank"}`, { size: 11 }),
    words(right, STRIP + 61, `${last}`, { anchor: "end", size: 11 }),
  ];
}

const STRIPS = { numbers: numbersStrip, shares: sharesStrip, curve: curveStrip };

// --- memory: a bar for each way to train, in three parts

const KINDS = [
  { label: "weights", parts: ["weights"], fill: "currentColor", opacity: 0.35 },
  { label: "what trains, with gradients and Adam", parts: ["trained", "gradients", "Adam"], fill: ABOVE, opacity: 1 },
  { label: "activations", parts: ["activations", "logits"], fill: THIRD, opacity: 1 },
];
const CARDS = [8, 24, 80, 192, 640]; // a small card, a large one, and of a server's one, its double and its eight

export function gigabytes(bytes) {
  const value = bytes / 1e9;
  if (value < 0.95) return `${Number((bytes / 1e6).toPrecision(2))} MB`;
  return `${value >= 100 ? Math.round(value).toLocaleString("en-US") : Number(value.toPrecision(2))} GB`;
}

function memory({ ways, shown, file }) {
  const sums = ways.map(({ parts }) => total(parts));
  const unit = (WIDTH - 12) / Math.max(...sums), place = (size) => 4 + size * 1e9 * unit;
  const seen = CARDS.filter((size) => place(size) > 44 && place(size) < WIDTH - 40).slice(-2);
  const rows = ways.flatMap(({ name, parts }, k) => {
    const y = 36 + k * 50;
    if (k >= shown) return [words(4, y, `${name}: ?`, { opacity: 0.6 })];
    let x = 4;
    const bars = KINDS.map((kind) => {
      const width = unit * kind.parts.reduce((sum, part) => sum + parts[part], 0);
      x += width;
      const box = { x: short(x - width), y: y + 7, width: short(Math.max(width, 0.1)), height: 18 };
      return shape("rect", { ...box, fill: kind.fill, "fill-opacity": kind.opacity });
    });
    return [words(4, y, `${name}: ${gigabytes(sums[k])}`, { weight: k === shown - 1 ? 600 : 400 }), ...bars];
  });
  const cards = seen.flatMap((size) => {
    const x = short(place(size)), line = { stroke: "currentColor", "stroke-dasharray": "2 2" };
    const ticks = ways.map((_, k) => shape("line", { x1: x, x2: x, y1: 40 + k * 50, y2: 64 + k * 50, ...line }));
    return [...ticks, words(x, 13, `${size} GB`, { anchor: "middle", size: 12 })];
  });
  const keys = KINDS.flatMap(({ label, fill, opacity }, k) => {
    const x = 4 + [0, 74, 318][k], box = { x, y: HEIGHT - 20, width: 10, height: 10, fill, "fill-opacity": opacity };
    return [shape("rect", box), words(x + 14, HEIGHT - 11, label, { size: 12 })];
  });
  return [...rows, ...cards, words(4, HEIGHT - 38, file), ...keys];
}

// --- all of it

function layer(state) {
  const { names = {}, fold = null, faint = 1, strip, A, B } = state;
  const key = (x, fill, opacity, text) => [
    shape("rect", { x, y: STRIP - 20, width: 10, height: 10, fill, "fill-opacity": opacity }),
    words(x + 14, STRIP - 11, text, { size: 12 }),
  ];
  const away = A ? A.rows + 2 : 0; // where the gradients stand
  return [
    words(2, 14, names.title ?? "", { weight: 600 }),
    words(WIDTH - 2, 14, names.note ?? "", { anchor: "end" }),
    ...sheetOfW(state),
    ...(state.front ? sheetInFront(state) : []),
    ...(B ? factorB(B, "B", { faint, most: state.mostB }) : []),
    ...(A ? factorA(A, "A", { faint, most: state.mostA }) : []),
    ...(fold?.left >= 0 ? foldLeft(fold, fold.left, away) : []),
    ...(fold?.up >= 0 ? foldUp(fold, fold.up, away) : []),
    ...(fold?.dB ? factorB(fold.dB, "dB", { away, most: fold.mostB }) : []),
    ...(fold?.dA ? factorA(fold.dA, "dA", { away, most: fold.mostA }) : []),
    ...(state.front ? key(2, ABOVE, 1, names.front ?? "s B A, which trains") : []),
    ...key(WIDTH - 96, "currentColor", 0.4, names.W ?? "W, frozen"),
    ...(strip ? STRIPS[strip.kind](strip) : []),
  ];
}

// A state as a picture: its size, the text that stands for it, and its shapes.
export function picture(state) {
  const parts = state.ways ? memory(state) : layer(state);
  return { width: WIDTH, height: HEIGHT, alt: state.alt, parts };
}

const escaped = (text) => `${text}`.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll('"', "&quot;");

// What stands inside the svg element.
export function markup({ parts }) {
  return parts.map(({ tag, attributes, text }) => {
    const given = Object.entries(attributes).filter(([, value]) => value !== undefined);
    const look = given.map(([name, value]) => ` ${name}="${escaped(value)}"`).join("");
    return text ? `<${tag}${look}>${escaped(text)}</${tag}>` : `<${tag}${look}/>`;
  }).join("");
}
