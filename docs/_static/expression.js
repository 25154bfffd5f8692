// A gradient written as one NumPy expression, graded in the page. `evaluateExpression` reads the little of Python that
// such an expression needs, and nothing else: names of arrays, numbers, + - * / @ **, .T, sums, means and einsum. No
// text is ever run as code. `judgeExpression` finds out what is wrong as minilora/exercises/grading.py does.
"use strict";

// --- arrays: { shape, data }, of any number of dimensions up to two; a number is { shape: [], data: [v] }

const scalar = (v) => ({ shape: [], data: [v] });
const arrayOf = (rows) => ({ shape: [rows.length, rows[0].length], data: rows.flat() });
const said = ({ shape }) => (shape.length === 1 ? `(${shape[0]},)` : `(${shape.join(", ")})`);

function turned(a) {
  if (a.shape.length < 2) return a;
  const [n, m] = a.shape;
  return { shape: [m, n], data: Array.from({ length: n * m }, (_, i) => a.data[(i % n) * m + Math.floor(i / n)]) };
}

function entrywise(a, b, f, sign) {
  const dims = Math.max(a.shape.length, b.shape.length);
  const wide = (x) => [...Array(dims - x.shape.length).fill(1), ...x.shape];
  const [p, q] = [wide(a), wide(b)], shape = p.map((size, i) => Math.max(size, q[i]));
  if (p.some((size, i) => size !== q[i] && size !== 1 && q[i] !== 1)) {
    throw new Error(`the shapes ${said(a)} and ${said(b)} do not fit for ${sign}`);
  }
  const at = (x, own, place) => own.reduce((offset, size, i) => offset * size + (size === 1 ? 0 : place[i]), 0);
  const count = shape.reduce((product, size) => product * size, 1);
  const data = Array.from({ length: count }, (_, flat) => {
    const place = [];
    let rest = flat;
    for (let i = dims - 1; i >= 0; i -= 1) [place[i], rest] = [rest % shape[i], Math.floor(rest / shape[i])];
    return f(a.data[at(a, p, place)], b.data[at(b, q, place)]);
  });
  return { shape, data };
}

function matmul(a, b) {
  if (!a.shape.length || !b.shape.length) throw new Error("@ multiplies two arrays; a number takes *");
  const left = a.shape.length === 1 ? { ...a, shape: [1, ...a.shape] } : a; // a row
  const right = b.shape.length === 1 ? { ...b, shape: [...b.shape, 1] } : b; // a column
  const [n, k] = left.shape, [k2, m] = right.shape;
  if (k !== k2) throw new Error(`the shapes ${said(a)} and ${said(b)} do not fit for @: ${k} is not ${k2}`);
  const data = Array.from({ length: n * m }, (_, flat) => {
    let sum = 0;
    for (let j = 0; j < k; j += 1) sum += left.data[Math.floor(flat / m) * k + j] * right.data[j * m + (flat % m)];
    return sum;
  });
  return { shape: [...(a.shape.length === 1 ? [] : [n]), ...(b.shape.length === 1 ? [] : [m])], data };
}

function summed(a, axis = null) {
  if (axis === null || !a.shape.length) return scalar(a.data.reduce((sum, v) => sum + v, 0));
  const dims = a.shape.length, way = axis < 0 ? axis + dims : axis;
  if (way < 0 || way >= dims) throw new Error(`${said(a)} has no axis ${axis}`);
  if (dims === 1) return summed(a);
  const [n, m] = a.shape, [count, length] = way === 0 ? [m, n] : [n, m];
  const entry = (i, j) => a.data[way === 0 ? j * m + i : i * m + j];
  const data = Array(count).fill(0);
  data.forEach((_, i) => {
    for (let j = 0; j < length; j += 1) data[i] += entry(i, j);
  });
  return { shape: [count], data };
}

function mean(a, axis = null) {
  const whole = summed(a, axis), count = a.data.length / whole.data.length;
  return { shape: whole.shape, data: whole.data.map((v) => v / count) };
}

function einsum(pattern, arrays) {
  const read = /^\s*([a-z]+(?:\s*,\s*[a-z]+)*)\s*->\s*([a-z]*)\s*$/.exec(pattern);
  const names = read ? read[1].split(",").map((name) => name.trim()) : [];
  if (!read || names.length !== arrays.length) {
    throw new Error('einsum needs a pattern such as "no,nk->ok", one group for each array');
  }
  const sizes = {};
  names.forEach((name, i) => {
    if (name.length !== arrays[i].shape.length) {
      throw new Error(`einsum: "${name}" does not fit the shape ${said(arrays[i])}`);
    }
    [...name].forEach((letter, j) => {
      const size = arrays[i].shape[j];
      if ((sizes[letter] ??= size) !== size) throw new Error(`einsum: ${letter} is ${sizes[letter]} and ${size}`);
    });
  });
  const out = [...read[2]], inner = Object.keys(sizes).filter((letter) => !out.includes(letter));
  if (out.some((letter) => !(letter in sizes))) throw new Error("einsum: a letter behind the arrow stands in no group");
  const shape = out.map((letter) => sizes[letter]), data = Array(shape.reduce((p, s) => p * s, 1)).fill(0);
  const all = [...out, ...inner], place = {};
  const walk = (depth) => {
    if (depth < all.length) {
      for (place[all[depth]] = 0; place[all[depth]] < sizes[all[depth]]; place[all[depth]] += 1) walk(depth + 1);
      return;
    }
    const at = (letters) => letters.reduce((offset, letter) => offset * sizes[letter] + place[letter], 0);
    data[at(out)] += arrays.reduce((product, a, i) => product * a.data[at([...names[i]])], 1);
  };
  walk(0);
  return { shape, data };
}

// --- reading: a token is a number, a name, a string or a sign

function tokens(text) {
  const kinds = [
    /(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+)/,
    /([A-Za-z_]\w*)/,
    /("[^"]*"|'[^']*')/,
    /(\*\*|->|[-+*/@().,=[\]])/,
  ];
  const pattern = new RegExp(`\\s*(?:${kinds.map(({ source }) => source).join("|")})`, "y");
  const found = [];
  for (pattern.lastIndex = 0; text.slice(pattern.lastIndex).trim();) {
    const at = pattern.lastIndex, match = pattern.exec(text);
    if (!match) throw new Error(`"${text.slice(at).trim()[0]}" has no meaning here`);
    const [, number, name, string, sign] = match;
    if (number) found.push({ number: Number(number) });
    else if (string) found.push({ string: string.slice(1, -1) });
    else found.push(name ? { name } : { sign });
  }
  return found;
}

function evaluateExpression(text, names) {
  const plain = text.replaceAll("\u2212", "-").replaceAll("\u00b7", "*"); // as a phone may write them
  const all = tokens(plain.replace(/^\s*(return\s+|[A-Za-z_]\w*\s*=(?!=))/, "")); // dB = ... is an answer, too
  let place = 0;
  const is = (sign) => all[place]?.sign === sign;
  const take = (sign) => {
    const found = place < all.length && Object.values(all[place])[0];
    if (!is(sign)) throw new Error(found ? `expected "${sign}" before "${found}"` : `"${sign}" is missing at the end`);
    place += 1;
  };
  const number = (value, what) => {
    if (value.shape?.length !== 0) throw new Error(`${what} must be a number`);
    return value.data[0];
  };

  function sum() {
    let value = products();
    while (is("+") || is("-")) {
      const { sign } = all[place];
      place += 1;
      value = entrywise(value, products(), sign === "+" ? (a, b) => a + b : (a, b) => a - b, sign);
    }
    return value;
  }

  function products() {
    let value = signed();
    while (is("*") || is("/") || is("@")) {
      const { sign } = all[place];
      place += 1;
      const other = signed();
      const f = sign === "*" ? (a, b) => a * b : (a, b) => a / b;
      value = sign === "@" ? matmul(value, other) : entrywise(value, other, f, sign);
    }
    return value;
  }

  function signed() {
    if (is("-")) { place += 1; return entrywise(scalar(-1), signed(), (a, b) => a * b, "*"); }
    if (is("+")) { place += 1; return signed(); }
    const value = parts();
    if (!is("**")) return value;
    place += 1;
    return entrywise(value, signed(), (a, b) => a ** b, "**");
  }

  function parts() {
    let value = atom();
    while (is(".")) {
      place += 1;
      const name = all[place]?.name;
      place += 1;
      if (name === "T") { value = turned(value); continue; }
      if (name === "shape") {
        take("[");
        const index = number(sum(), "an index"), { shape } = value;
        take("]");
        if (!(shape.at(index) > 0)) throw new Error(`the shape ${said(value)} has no place ${index}`);
        value = scalar(shape.at(index));
        continue;
      }
      if (name === "size") { value = scalar(value.data.length); continue; }
      value = call(name, [value, ...given()]);
    }
    return value;
  }

  function given() { // what stands in a call's parentheses
    const values = [];
    take("(");
    while (!is(")")) {
      if (all[place]?.name === "axis" && all[place + 1]?.sign === "=") place += 2;
      if (all[place]?.string !== undefined) { values.push(all[place].string); place += 1; } else values.push(sum());
      if (!is(")")) take(",");
    }
    take(")");
    return values;
  }

  function call(name, values) {
    const [a, b] = values, axis = () => (b === undefined ? null : number(b, "an axis"));
    if (name === "sum") return summed(a, axis());
    if (name === "mean") return mean(a, axis());
    if (name === "transpose") return turned(a);
    if ((name === "dot" || name === "matmul") && values.length === 2) return matmul(a, b);
    if (name === "einsum" && typeof a === "string") return einsum(a, values.slice(1));
    throw new Error(`"${name ?? ""}" is not read here; @, .T, * and a sum are enough`);
  }

  function atom() {
    const token = all[place];
    place += 1;
    if (!token) throw new Error("something is missing at the end");
    if (token.number !== undefined) return scalar(token.number);
    if (token.sign === "(") {
      const value = sum();
      take(")");
      return value;
    }
    if (token.name === "np" && is(".")) {
      place += 2;
      return call(all[place - 1]?.name, given());
    }
    if (token.name === "len" && is("(")) return scalar(given()[0].shape[0]);
    if (token.name && Object.hasOwn(names, token.name)) return names[token.name];
    if (token.name) throw new Error(`${token.name} is not given here; you have ${Object.keys(names).join(", ")}`);
    throw new Error(`"${Object.values(token)[0]}" stands where a name or a number is expected`);
  }

  if (!all.length) throw new Error("write an expression");
  const value = sum();
  if (place < all.length) {
    throw new Error(`"${Object.values(all[place])[0]}" stands where a sign such as @ or * is expected`);
  }
  return value;
}

// --- what is wrong: as grading.py finds it out

const near = (a, b) => Math.abs(a - b) <= 1e-12 + 1e-9 * Math.abs(b);
const alike = (a, b) => Boolean(a && b) && `${a.shape}` === `${b.shape}` && a.data.every((v, i) => near(v, b.data[i]));

// By which number `other` must be multiplied to give `value`, or null.
function ratioOf(value, other) {
  if (!value || !other || `${value.shape}` !== `${other.shape}`) return null;
  if (alike(value, other)) return 1;
  const dot = (a, b) => a.data.reduce((sum, v, i) => sum + v * b.data[i], 0);
  const ratio = dot(other, value) / dot(other, other);
  return ratio && alike(value, { shape: other.shape, data: other.data.map((v) => ratio * v) }) ? ratio : null;
}

function factorsOf(ratio, scales, at) {
  if (ratio === 1) return "";
  const some = scales.filter(({ values }) => values[at] !== null);
  const choose = (count, left) => { // all ways to take so many of those that are left
    if (!count) return [[]];
    return left.flatMap((scale, i) => choose(count - 1, left.slice(i + 1)).map((rest) => [scale, ...rest]));
  };
  for (const count of [1, 2, 3]) {
    for (const chosen of choose(count, some)) {
      const product = chosen.reduce((whole, { values }) => whole * values[at], 1);
      if (near(product, ratio)) return chosen.map(({ hint }) => hint).join("; and ");
    }
  }
  return `a wrong factor in front: yours is ${Number(ratio.toPrecision(7))} times what it should be`;
}

function identified(value, { forms, scales }, at) {
  for (const { values, hint } of forms) {
    const ratio = values[at] && ratioOf(value, arrayOf(values[at]));
    if (!ratio || (ratio === 1 && !hint)) continue;
    return [hint, factorsOf(ratio, scales, at)].filter(Boolean).join("; and ");
  }
  return "";
}

function judgeExpression(sheet, text) {
  const found = [], stopped = [];
  for (const at of [0, 1]) { // sizes that all differ, then sizes that are all equal
    const value = (values) => (typeof values[at] === "number" ? scalar(values[at]) : arrayOf(values[at]));
    const names = Object.fromEntries(Object.entries(sheet.inputs).map(([name, values]) => [name, value(values)]));
    try {
      found[at] = evaluateExpression(text, names);
    } catch (error) {
      stopped[at] = error.message;
    }
  }
  const right = arrayOf(sheet.forms[0].values[0]);
  if (alike(found[0], right)) return { right: true, says: sheet.praise };
  const hint = identified(found[0], sheet, 0) || identified(found[1], sheet, 1);
  if (hint) return { right: false, says: `Not yet. ${sheet.result}: ${hint}` };
  if (stopped[0]) return { right: false, says: `Not yet. ${stopped[0]}.` };
  if (`${found[0].shape}` !== `${right.shape}`) {
    const shapes = `${sheet.result} must be ${sheet.shape}, here ${said(right)}; yours is ${said(found[0])}`;
    return { right: false, says: `Not yet. Wrong shape: ${shapes}.` };
  }
  return { right: false, says: `Not yet. ${sheet.result}: the right shape, the wrong values; write out an entry` };
}

function startExpression(form) {
  const sheet = JSON.parse(form.querySelector("script[type='application/json']").textContent);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = form.querySelector("input").value;
    const { right, says } = judgeExpression(sheet, text);
    form.dataset.verdict = right ? "right" : text.trim() ? "wrong" : "unread";
    form.querySelector(".verdict").textContent = says;
  });
  form.querySelector(".answer").hidden = false;
}

if (typeof document !== "undefined") document.querySelectorAll("form.expression").forEach(startExpression);
