// The laboratory in the reader's hands: the loss against the rate, by rank, rule of scaling and length of the text. All
// numbers are recorded; they stand in the page. Below, what a position of the controls shows; then its drawing.

import { add, canvas } from "./draw.js";

const least = (values) => values.indexOf(Math.min(...values));

// The rates of a cell, each { lr, seeds, choice, new, steps, path }: [] where nothing is recorded.
export function tried(data, { windows, rule, rank }) {
  const s = rank === "full" ? 1 : data.scalings[rule][rank];
  return data.cells[`${rank}|${s}|${windows}`] ?? [];
}

// The one with the least mean loss on the windows that choose.
export function best(rates) {
  return rates[least(rates.map(({ choice }) => choice))];
}

// Which part of full fine-tuning's gain a loss is, each at its own best rate.
export function gain(data, windows, loss) {
  const full = best(tried(data, { windows, rank: "full" }));
  return full && (data.before.new - loss) / (data.before.new - full.new);
}

export const say = (number) => `${Number(number.toPrecision(3))}`;

function sentence(data, { windows, rule, rank, lr }, rates, here) {
  const s = rank === "full" ? 1 : data.scalings[rule][rank];
  const what = rank === "full" ? `Full fine-tuning at rate ${say(lr)}. `
    : `Rank ${rank}, ${rule}: s is ${say(s)}, and s times the rate is ${say(s * lr)}. `;
  if (!rates.length) return `${what}No training with these settings is recorded yet.`;
  const top = best(rates);
  const where = `The best recorded rate is ${say(top.lr)}.`;
  if (!here) return `${what}No training at this rate is recorded. ${where}`;
  const [first, last] = here.steps;
  if (last === 0) return `${what}No step was better than the untouched model: the rate is too large. ${where}`;
  const end = `The loss on held-out text ends at ${here.new.toFixed(2)}`;
  if (here.new > data.before.new) return `${what}${end}, above the untouched model's: the rate is too large. ${where}`;
  const when = `is least after ${first === last ? first : `${first} to ${last}`} steps:`;
  const share = gain(data, windows, here.new);
  const known = rank !== "full" && share !== undefined;
  const part = known ? `, ${Math.round(100 * share)}% of what full fine-tuning gains` : "";
  const seeds = here.seeds === 1 ? "one seed" : `${here.seeds} seeds`;
  return `${what}The loss on held-out text ${when} ${here.new.toFixed(2)}${part} (${seeds}). `
    + (here === top ? "This is the best recorded rate." : where);
}

// What a position of the controls shows.
export function state(data, position) {
  const { windows, rule, rank, lr } = position;
  const rates = tried(data, position);
  const here = rates.find((rate) => rate.lr === lr);
  const full = best(tried(data, { windows, rank: "full" }));
  const all = Object.entries(data.cells).filter(([name]) => name.endsWith(`|${windows}`)).flatMap(([, each]) => each);
  return {
    valleys: ["full", ...data.ranks].map((each) => {
      const found = tried(data, { windows, rule, rank: each });
      const points = found.map((rate) => [rate.lr, rate.new]);
      return { rank: each, chosen: each === rank, points, best: best(found)?.lr };
    }),
    paths: [{ name: "full", path: full?.path ?? [] }, { name: "chosen", path: here?.path ?? [] }],
    rates: [...new Set([...all.map((rate) => rate.lr), lr])].sort((a, b) => a - b),
    low: Math.min(...all.map((rate) => rate.new), data.before.new) - 0.1,
    high: data.before.new + 0.3,
    says: sentence(data, position, rates, here),
  };
}

// --- drawn -----------------------------------------------------------------------------------------------------------

const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [340, 250, 40, 14, 24, 36];

function frame(parent, { alt, from, to, ticks, low, high, label }) {
  const svg = add(parent, "svg", { role: "img" });
  canvas(svg, WIDTH, HEIGHT, alt);
  const px = (x) => LEFT + ((x - from) / (to - from)) * (WIDTH - LEFT - RIGHT);
  const py = (y) => TOP + ((high - Math.min(y, high)) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  for (let y = Math.ceil(2 * low) / 2; y <= high; y += 0.5) {
    add(svg, "line", { x1: LEFT, x2: WIDTH - RIGHT, y1: py(y), y2: py(y), class: "rule" });
    add(svg, "text", { x: LEFT - 5, y: py(y) + 4, "text-anchor": "end", class: "tick" }, y.toFixed(1));
  }
  const below = { y: HEIGHT - BOTTOM + 15, "text-anchor": "middle", class: "tick" };
  for (const [x, text] of ticks) add(svg, "text", { x: px(x), ...below }, text);
  add(svg, "text", { x: 2, y: 13 }, "held-out loss");
  add(svg, "text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, label);
  const placed = (points) => points.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(" ");
  const line = (points, name) => add(svg, "polyline", { points: placed(points), class: `line ${name}` });
  return { svg, px, py, line };
}

const colour = (chosen, full) => (chosen ? "above" : full ? "below" : "ghost");

function draw(board, data, position) {
  const { valleys, paths, rates, low, high, says } = state(data, position);
  board.replaceChildren();
  const ends = { from: Math.log2(rates[0]) - 2.2, to: Math.log2(rates.at(-1)) + 0.3 };
  const ticks = rates.filter((lr) => Math.round(Math.log2(1000 * lr)) % 2 === 0).map((lr) => [Math.log2(lr), say(lr)]);
  const left = frame(board, { alt: `The loss against the rate. ${says}`, ...ends, ticks, low, high, label: "rate" });
  const untouched = left.py(data.before.new);
  add(left.svg, "line", { x1: LEFT, x2: WIDTH - RIGHT, y1: untouched, y2: untouched, class: "level" });
  for (const { rank, chosen, points, best: lr } of [...valleys].sort((a, b) => a.chosen - b.chosen)) {
    if (!points.length) continue;
    const name = colour(chosen, rank === "full");
    left.line(points.map(([x, y]) => [Math.log2(x), y]), name);
    const [x, y] = points.find(([rate]) => rate === lr);
    const dot = { cx: left.px(Math.log2(x)), cy: left.py(y), r: 3.5 };
    add(left.svg, "circle", { ...dot, class: name === "ghost" ? "frame" : name });
    const [first, height] = points[0];
    const beside = { x: left.px(Math.log2(first)) - 5, y: left.py(height) + 4, "text-anchor": "end" };
    add(left.svg, "text", { ...beside, class: `key ${name}` }, rank === "full" ? "full" : `r = ${rank}`);
  }
  const now = left.px(Math.log2(position.lr));
  add(left.svg, "line", { x1: now, x2: now, y1: TOP, y2: HEIGHT - BOTTOM, class: "rule" });
  if (!data.moments.length) return says;
  const steps = [0, ...data.moments], last = steps.at(-1);
  const right = frame(board, {
    alt: "The loss as it trains, beside full fine-tuning at its best rate", from: 0, to: last,
    ticks: [0, last / 4, last / 2, (3 * last) / 4, last].map((t) => [t, `${t}`]), low, high, label: "step",
  });
  for (const { name, path } of paths) {
    if (!path.length) continue;
    const whole = [data.before.choice, ...path], at = least(whole), look = name === "full" ? "below" : "above";
    right.line(whole.map((loss, i) => [steps[i], loss]), look);
    add(right.svg, "circle", { cx: right.px(steps[at]), cy: right.py(whole[at]), r: 3.5, class: look });
  }
  return says;
}

function start(figure) {
  const data = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
  const inputs = [...figure.querySelectorAll("input[type=range]")];
  const show = () => {
    const position = {};
    for (const input of inputs) {
      const value = data.values[input.name][input.value];
      position[input.name] = value;
      input.setAttribute("aria-valuetext", typeof value === "number" ? say(value) : value);
      figure.querySelector(`output[for="${input.id}"]`).textContent = typeof value === "number" ? say(value) : value;
    }
    figure.querySelector(".says").textContent = draw(figure.querySelector(".drawing"), data, position);
  };
  for (const input of inputs) input.addEventListener("input", show);
  show();
  figure.className = "hands live recorded";  // the style sheet shows the sliders now that they do something
  figure.querySelector(".controls").hidden = false;
}

if (typeof document !== "undefined") document.querySelectorAll("figure[data-live='valley']").forEach(start);
