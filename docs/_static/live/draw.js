// Heat maps and curves in SVG, for the pages that train in the browser. The style sheet colours them for both themes.

const SVG = "http://www.w3.org/2000/svg";

export function add(parent, tag, attributes = {}, text = "") {
  const child = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) child.setAttribute(name, value);
  if (text) child.textContent = text;
  parent.append(child);
  return child;
}

// Empty an svg element, set its size, and say what it shows.
export function canvas(svg, width, height, alt) {
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("aria-label", alt);
}

export const CELL = 16;

// A matrix as cells from (x, y) on: orange above zero, blue below, full colour at `most`, nothing at zero.
export function heat(svg, { rows, columns, data }, { x = 1, y = 1, most = 1 } = {}) {
  add(svg, "rect", { x, y, width: columns * CELL, height: rows * CELL, class: "frame" });
  data.forEach((value, i) => {
    const strength = Math.min(Math.abs(value) / most, 1);
    if (strength < 0.01) return;
    const place = { x: x + (i % columns) * CELL, y: y + Math.floor(i / columns) * CELL, width: CELL, height: CELL };
    add(svg, "rect", { ...place, class: value > 0 ? "above" : "below", "fill-opacity": strength.toFixed(2) });
  });
}

function short(v) {
  const plain = v === 0 || (Math.abs(v) >= 0.01 && Math.abs(v) < 1e4);
  return plain ? `${Number(v.toPrecision(3))}` : v.toExponential(0).replace("e+", "e");
}

// Curves over the steps. Each is { name, values } with values of [step, value], and `title` has a { name, label } for
// each. `level` is a dashed line. With `log`, the axis shows powers of ten.
export function curves(svg, { curves: lines, level, log = false, alt, title }) {
  const [height, left, right, top, bottom] = [190, 44, 10, 22, 22];
  const width = Math.max(330, Math.round(svg.getBoundingClientRect().width)); // as wide as it stands in the page
  canvas(svg, width, height, alt);
  const last = Math.max(10, ...lines.map(({ values }) => values.at(-1)?.[0] ?? 0));
  const all = [...lines.flatMap(({ values }) => values.map(([, v]) => v)), ...(level > 0 ? [level] : [])];
  const finite = all.filter((v) => Number.isFinite(v) && (!log || v > 0));
  let [low, high] = finite.length ? [Math.min(...finite), Math.max(...finite)] : [log ? 0.1 : 0, 1];
  if (log) {
    [low, high] = [Math.max(low, high * 1e-9), high].map(Math.log10);
    [low, high] = [Math.floor(low + 1e-9), Math.max(Math.ceil(high), Math.floor(low) + 1)];
  } else {
    [low, high] = [Math.min(low, 0), high * 1.05 || 1];
  }
  const px = (t) => left + (t / last) * (width - left - right);
  const py = (v) => {
    const part = ((log ? Math.log10(Math.max(v, 1e-300)) : v) - low) / (high - low);
    return height - bottom - Math.min(Math.max(part, 0), 1) * (height - top - bottom);
  };
  const across = (v, name) => add(svg, "line", { x1: left, x2: width - right, y1: py(v), y2: py(v), class: name });
  const mark = (x, y, anchor, text) => add(svg, "text", { x, y, "text-anchor": anchor, class: "tick" }, text);
  const middle = (low + high) / 2;
  const ticks = log ? [low, Math.round(middle), high].map((k) => Number(`1e${k}`)) : [low, middle, high];
  for (const tick of new Set(ticks)) {
    across(tick, "rule");
    mark(left - 5, py(tick) + 4, "end", short(tick));
  }
  mark(px(0), height - 6, "start", "0");
  mark((left + width - right) / 2, height - 6, "middle", "step");
  mark(px(last), height - 6, "end", `${last}`);
  if (level > 0) across(level, "level");
  for (const { name, values } of lines) {
    const stride = Math.ceil(values.length / 300) || 1;
    const shown = values.filter(([, v], i) => Number.isFinite(v) && (i % stride === 0 || i === values.length - 1));
    const points = shown.map(([t, v]) => `${px(t).toFixed(1)},${py(v).toFixed(1)}`).join(" ");
    add(svg, "polyline", { points, class: `line ${name}` });
  }
  let x = 2;
  for (const { name, label } of title) {
    x += add(svg, "text", { x, y: 13, class: `key ${name}` }, label).getComputedTextLength() + 12;
  }
}

// Bars of singular values: outlines are the true ones, filled bars the learned ones.
export function bars(svg, learned, truth, alt) {
  const [width, height, left, top, bottom] = [230, 165, 34, 8, 20], count = truth.length;
  canvas(svg, width, height, alt);
  const most = Math.max(...truth, ...learned, 1e-12), wide = (width - left - 10) / count;
  const py = (v) => height - bottom - (v / most) * (height - top - bottom);
  const mark = (x, y, anchor, text) => add(svg, "text", { x, y, "text-anchor": anchor, class: "tick" }, text);
  for (const tick of [0, most]) mark(left - 5, py(tick) + 4, "end", short(tick));
  truth.forEach((value, i) => {
    const x = left + i * wide + 2, box = (v) => ({ x, width: wide - 4, y: py(v), height: height - bottom - py(v) });
    add(svg, "rect", { ...box(learned[i]), class: "above" });
    add(svg, "rect", { ...box(value), class: "outline" });
    mark(x + (wide - 4) / 2, height - 5, "middle", `${i + 1}`);
  });
}
