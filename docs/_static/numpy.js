// A few lines of Python with NumPy, read and computed in the page: what an answer to an exercise needs, nothing else.
// `runNumpy(text, names)` returns what the text gives: the value of its `return`, or of its last line. It reads
// assignments, def, return, for over a range, numbers, arrays with slices, tuples, and the functions of NumPy in the
// table below. No text is ever run as code. tests/site/test_numpy.py holds it against NumPy.
"use strict";

const { runNumpy, numpyArrays } = (() => {
  const STEPS = 3e6; // of entries computed: more than any answer needs, less than a second

  // --- arrays as NumPy has them: several may show the same data, in other strides. A number is one of no dimensions.

  const product = (sizes) => sizes.reduce((all, size) => all * size, 1);
  const rowMajor = (shape) => shape.map((_, i) => product(shape.slice(i + 1)));
  const view = (shape, data, strides = rowMajor(shape), offset = 0) => ({ shape, data, strides, offset });
  const scalar = (v) => view([], [v]);
  const isArray = (value) => Boolean(value?.strides);
  const said = (shape) => (shape.length === 1 ? `(${shape[0]},)` : `(${shape.join(", ")})`);
  const fail = (text) => {
    throw new Error(text.length > 160 ? `${text.slice(0, 157)}...` : text);
  };

  let steps = 0;
  function spend(count) {
    steps += count;
    if (steps > STEPS) fail("this takes too many steps for a page");
  }

  // Where the entries stand in the data, row by row.
  function places({ shape, strides, offset }) {
    let found = [offset];
    spend(product(shape));
    shape.forEach((size, axis) => {
      found = found.flatMap((place) => Array.from({ length: size }, (_, i) => place + i * strides[axis]));
    });
    return found;
  }
  const entries = (a) => places(a).map((place) => a.data[place]);
  const copied = (a) => view(a.shape, entries(a));
  const turned = (a) => view([...a.shape].reverse(), a.data, [...a.strides].reverse(), a.offset);

  // From the rows of a JSON file, or a number.
  function fromLists(value) {
    if (!Array.isArray(value)) return scalar(value);
    const shape = [];
    for (let part = value; Array.isArray(part); [part] = part) shape.push(part.length);
    return view(shape, value.flat(Infinity));
  }

  function stretched(a, shape) {
    // by broadcasting
    const more = shape.length - a.shape.length;
    const strides = shape.map((size, i) =>
      i < more || (a.shape[i - more] === 1 && size !== 1) ? 0 : a.strides[i - more],
    );
    return view(shape, a.data, strides, a.offset);
  }

  function entrywise(f, a, b, sign) {
    const dims = Math.max(a.shape.length, b.shape.length);
    const [p, q] = [a, b].map(({ shape }) => [...Array(dims - shape.length).fill(1), ...shape]);
    if (p.some((size, i) => size !== q[i] && size !== 1 && q[i] !== 1)) {
      fail(`the shapes ${said(a.shape)} and ${said(b.shape)} do not fit for ${sign}`);
    }
    const shape = p.map((size, i) => (size === 1 ? q[i] : size));
    const [x, y] = [a, b].map((each) => entries(stretched(each, shape)));
    return view(
      shape,
      x.map((v, i) => f(v, y[i])),
    );
  }

  function matmul(a, b) {
    if (!a.shape.length || !b.shape.length) fail("@ multiplies two arrays; a number takes *");
    if (a.shape.length > 2 || b.shape.length > 2) fail("@ of more than two axes is not read here");
    const left = a.shape.length === 1 ? [1, ...a.shape] : a.shape; // a row
    const right = b.shape.length === 1 ? [...b.shape, 1] : b.shape; // a column
    const [n, k] = left,
      [k2, m] = right;
    if (k !== k2) fail(`the shapes ${said(a.shape)} and ${said(b.shape)} do not fit for @: ${k} is not ${k2}`);
    const [x, y] = [entries(a), entries(b)];
    spend(n * m * k);
    const data = Array.from({ length: n * m }, (_, flat) => {
      let sum = 0;
      for (let j = 0; j < k; j += 1) sum += x[Math.floor(flat / m) * k + j] * y[j * m + (flat % m)];
      return sum;
    });
    return view([...(a.shape.length === 1 ? [] : [n]), ...(b.shape.length === 1 ? [] : [m])], data);
  }

  function einsum(pattern, arrays) {
    const read = /^\s*([a-z]+(?:\s*,\s*[a-z]+)*)\s*->\s*([a-z]*)\s*$/i.exec(pattern);
    const names = read ? read[1].split(",").map((name) => name.trim()) : [];
    if (!read || names.length !== arrays.length) {
      fail('einsum needs a pattern such as "no,nk->ok", one group for each array');
    }
    const sizes = {};
    names.forEach((name, i) => {
      if (name.length !== arrays[i].shape.length)
        fail(`einsum: "${name}" does not fit the shape ${said(arrays[i].shape)}`);
      [...name].forEach((letter, j) => {
        const size = arrays[i].shape[j];
        if ((sizes[letter] ?? 1) === 1) sizes[letter] = size;
        else if (size !== 1 && size !== sizes[letter]) fail(`einsum: ${letter} is ${sizes[letter]} and ${size}`);
      });
    });
    const out = [...read[2]],
      inner = Object.keys(sizes).filter((letter) => !out.includes(letter));
    if (out.some((letter) => !(letter in sizes))) fail("einsum: a letter behind the arrow stands in no group");
    if (new Set(out).size < out.length) fail("einsum: a letter stands twice behind the arrow");
    const all = [...out, ...inner],
      whole = all.map((letter) => sizes[letter]);
    spend(product(whole) * arrays.length);
    const parts = arrays.map((a, i) => {
      // each as if it had every letter, in one order
      const strides = all.map((letter) =>
        [...names[i]].reduce((sum, own, j) => sum + (own === letter && a.shape[j] > 1 ? a.strides[j] : 0), 0),
      );
      return entries(view(whole, a.data, strides, a.offset));
    });
    const shape = out.map((letter) => sizes[letter]),
      count = product(inner.map((letter) => sizes[letter]));
    const data = Array(product(shape)).fill(0);
    for (let i = 0; i < data.length * count; i += 1) {
      data[Math.floor(i / count)] += parts.reduce((all, part) => all * part[i], 1);
    }
    return view(shape, data);
  }

  const whole = (value, what) => {
    const number = isArray(value) && !value.shape.length ? entries(value)[0] : NaN;
    return Number.isInteger(number) ? number : fail(`${what} must be a whole number`);
  };
  const axisOf = (a, value) => {
    const axis = whole(value, "an axis"),
      dims = a.shape.length;
    return axis >= -dims && axis < dims ? (axis + dims) % dims : fail(`${said(a.shape)} has no axis ${axis}`);
  };

  // Fold along an axis, along several, or along all: f of the entries that are folded into one.
  function folded(f) {
    return (a, axis = null, keepdims = false) => {
      if (axis !== null && !a.shape.length) fail("an axis of a number is not read here");
      const axes = axis === null ? a.shape.map((_, i) => i) : (axis.items ?? [axis]).map((each) => axisOf(a, each));
      const kept = a.shape.map((_, i) => i).filter((i) => !axes.includes(i));
      const order = [...kept, ...axes],
        sizes = order.map((i) => a.shape[i]);
      const all = entries(
        view(
          sizes,
          a.data,
          order.map((i) => a.strides[i]),
          a.offset,
        ),
      );
      const count = product(axes.map((i) => a.shape[i]));
      const data = Array.from({ length: product(kept.map((i) => a.shape[i])) }, (_, i) =>
        f(all.slice(i * count, (i + 1) * count)),
      );
      return view(
        keepdims === true ? a.shape.map((size, i) => (axes.includes(i) ? 1 : size)) : kept.map((i) => a.shape[i]),
        data,
      );
    };
  }

  const shapeOf = (value) =>
    (value?.items ?? [value]).map((size) => {
      const count = whole(size, "a size");
      return count >= 0 ? count : fail("a size must not be negative");
    });
  const filled = (v) => (shape) => {
    const sizes = shapeOf(shape);
    spend(product(sizes));
    return view(sizes, Array(product(sizes)).fill(v));
  };

  function reshaped(a, ...sizes) {
    const shape = (sizes.length === 1 && sizes[0].items ? sizes[0].items : sizes).map((size) => whole(size, "a size"));
    const open = shape.indexOf(-1),
      rest = product(shape.filter((size) => size !== -1));
    if (open >= 0) shape[open] = product(a.shape) / rest;
    if (product(shape) !== product(a.shape) || shape.some((size) => !Number.isInteger(size)))
      fail(`${said(a.shape)} cannot be reshaped to ${said(shape)}`);
    const plain = `${a.strides}` === `${rowMajor(a.shape)}`;
    return plain ? view(shape, a.data, rowMajor(shape), a.offset) : view(shape, entries(a));
  }

  function diagonal(a) {
    const n = a.shape[0];
    if (a.shape.length === 1)
      return view(
        [n, n],
        entries(a).flatMap((v, i) => Array.from({ length: n }, (_, j) => (i === j ? v : 0))),
      );
    if (a.shape.length !== 2) fail("diag takes a row of numbers or a matrix");
    return copied(view([Math.min(...a.shape)], a.data, [a.strides[0] + a.strides[1]], a.offset));
  }

  function eye(rows, columns) {
    const [n, m] = shapeOf({ items: [rows, columns ?? rows] });
    spend(n * m);
    return view(
      [n, m],
      Array.from({ length: n * m }, (_, i) => Number(Math.floor(i / m) === i % m)),
    );
  }

  function norm(a, ord = null, axis = null, keepdims = false) {
    if (ord !== null && !(ord.strides && entries(ord)[0] === 2 && (axis !== null || a.shape.length === 1)))
      fail("norm reads axis and keepdims here");
    return folded((all) => Math.sqrt(all.reduce((sum, v) => sum + v * v, 0)))(a, axis, keepdims);
  }

  // By one-sided Jacobi rotations: turn pairs of rows until every two are orthogonal. Their lengths are the singular
  // values, their directions are Vt, and the same turns of the identity are U^T.
  function svd(a, full = true) {
    if (a.shape.length !== 2) fail("svd takes a matrix");
    const [n, m] = a.shape;
    if (n > m) {
      const {
        items: [U, S, Vt],
      } = svd(turned(a), full);
      return { items: [turned(Vt), S, turned(U)] };
    }
    const dot = (p, q) => p.reduce((sum, v, i) => sum + v * q[i], 0);
    const flat = entries(a),
      rows = Array.from({ length: n }, (_, i) => flat.slice(i * m, (i + 1) * m));
    const turns = Array.from({ length: n }, (_, i) => Array.from({ length: n }, (_, j) => Number(i === j)));
    for (let sweep = 0, turning = true; turning && sweep < 60; sweep += 1) {
      turning = false;
      spend(n * n * m);
      for (let p = 0; p < n; p += 1) {
        for (let q = p + 1; q < n; q += 1) {
          const [pp, qq, pq] = [dot(rows[p], rows[p]), dot(rows[q], rows[q]), dot(rows[p], rows[q])];
          if (!(Math.abs(pq) > 1e-15 * Math.sqrt(pp * qq))) continue;
          turning = true;
          const angle = Math.atan2(2 * pq, pp - qq) / 2,
            c = Math.cos(angle),
            s = Math.sin(angle);
          for (const each of [rows, turns]) {
            [each[p], each[q]] = [
              each[p].map((v, i) => c * v + s * each[q][i]),
              each[q].map((v, i) => c * v - s * each[p][i]),
            ];
          }
        }
      }
    }
    const lengths = rows.map((row) => Math.sqrt(dot(row, row)));
    const order = lengths.map((_, i) => i).sort((i, j) => lengths[j] - lengths[i]);
    const directions = order.filter((i) => lengths[i] > 0).map((i) => rows[i].map((v) => v / lengths[i]));
    for (let i = 0; directions.length < (full ? m : n); i += 1) {
      // more directions, orthogonal to those before
      let next = Array.from({ length: m }, (_, j) => Number(i === j));
      for (let again = 0; again < 2; again += 1) {
        for (const row of directions) {
          const along = dot(row, next);
          next = next.map((v, j) => v - along * row[j]);
        }
      }
      const length = Math.sqrt(dot(next, next));
      if (length > 1e-6) directions.push(next.map((v) => v / length));
    }
    const U = turned(
      view(
        [n, n],
        order.flatMap((i) => turns[i]),
      ),
    );
    return {
      items: [
        U,
        view(
          [n],
          order.map((i) => lengths[i]),
        ),
        view([directions.length, m], directions.flat()),
      ],
    };
  }

  // --- random numbers, from a seed: the generator mulberry32

  function generator(seed) {
    let state = seed >>> 0;
    const draw = () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let mixed = Math.imul(state ^ (state >>> 15), state | 1);
      mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
      return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
    };
    const gauss = () => Math.sqrt(-2 * Math.log(1 - draw())) * Math.cos(2 * Math.PI * draw());
    const many = (f) => (size) => {
      const shape = size === null ? [] : shapeOf(size);
      spend(product(shape));
      return view(shape, Array.from({ length: product(shape) }, f));
    };
    const moved = (f) => (a, b, size) =>
      entrywise(
        (v, w) => v + w,
        a,
        entrywise((v, w) => v * w, b, many(f)(size), "*"),
        "+",
      );
    return {
      methods: {
        random: [many(draw), { size: null }],
        standard_normal: [many(gauss), { size: null }],
        normal: [moved(gauss), { loc: scalar(0), scale: scalar(1), size: null }],
        uniform: [
          (low, high, size) =>
            moved(draw)(
              low,
              entrywise((v, w) => v - w, high, low, "-"),
              size,
            ),
          { low: scalar(0), high: scalar(1), size: null },
        ],
      },
    };
  }

  // --- NumPy's functions: each with its parameters by name, and their values where they are left out

  const needed = undefined;
  const each = (f) => [(a) => view(a.shape, entries(a).map(f)), { a: needed }];
  const both = (f, sign) => [(a, b) => entrywise(f, a, b, sign), { a: needed, b: needed }];
  const fold = (f) => [folded(f), { a: needed, axis: null, keepdims: false }];
  const remainder = (v, w) => (v % w && v % w < 0 !== w < 0 ? (v % w) + w : v % w); // with the divisor's sign
  const ARITHMETIC = {
    "+": (v, w) => v + w,
    "-": (v, w) => v - w,
    "*": (v, w) => v * w,
    "/": (v, w) => v / w,
    "//": (v, w) => Math.round((v - remainder(v, w)) / w),
    "%": (v, w) => remainder(v, w),
    "**": (v, w) => v ** w,
  };
  const METHODS = {
    sum: fold((all) => all.reduce((sum, v) => sum + v, 0)),
    mean: fold((all) => all.reduce((sum, v) => sum + v, 0) / all.length),
    prod: fold((all) => all.reduce((whole, v) => whole * v, 1)),
    max: fold((all) => (all.some(Number.isNaN) ? NaN : Math.max(...all))),
    min: fold((all) => (all.some(Number.isNaN) ? NaN : Math.min(...all))),
    dot: [
      (a, b) => (a.shape.length && b.shape.length ? matmul(a, b) : entrywise(ARITHMETIC["*"], a, b, "*")),
      { a: needed, b: needed },
    ],
    transpose: [turned, { a: needed }],
    reshape: [reshaped, null],
    copy: [copied, { a: needed }],
    ravel: [(a) => reshaped(a, scalar(-1)), { a: needed }],
    flatten: [(a) => view([product(a.shape)], entries(a)), { a: needed }],
  };
  const NUMPY = {
    ...METHODS,
    exp: each(Math.exp),
    log: each(Math.log),
    sqrt: each(Math.sqrt),
    abs: each(Math.abs),
    absolute: each(Math.abs),
    tanh: each(Math.tanh),
    square: each((v) => v * v),
    sign: each(Math.sign),
    negative: each((v) => -v),
    add: both(ARITHMETIC["+"], "+"),
    subtract: both(ARITHMETIC["-"], "-"),
    multiply: both(ARITHMETIC["*"], "*"),
    divide: both(ARITHMETIC["/"], "/"),
    power: both(ARITHMETIC["**"], "**"),
    maximum: both((v, w) => (Number.isNaN(v + w) ? NaN : Math.max(v, w)), "maximum"),
    minimum: both((v, w) => (Number.isNaN(v + w) ? NaN : Math.min(v, w)), "minimum"),
    matmul: [matmul, { a: needed, b: needed }],
    outer: [
      (a, b) =>
        einsum(
          "i,j->ij",
          [a, b].map((part) => reshaped(part, scalar(-1))),
        ),
      { a: needed, b: needed },
    ],
    zeros: [filled(0), { shape: needed }],
    ones: [filled(1), { shape: needed }],
    zeros_like: each(() => 0),
    ones_like: each(() => 1),
    eye: [eye, { N: needed, M: null }],
    diag: [diagonal, { a: needed }],
    einsum: [(pattern, ...arrays) => einsum(pattern?.text, arrays), null],
    expand_dims: [(a, axis) => indexed(a, before(whole(axis, "an axis"), a.shape.length)), { a: needed, axis: needed }],
    asarray: [(a) => a, { a: needed }],
    array: [copied, { a: needed }],
    norm: [norm, { a: needed, ord: null, axis: null, keepdims: false }],
    svd: [svd, { a: needed, full_matrices: true }],
  };

  // Call a function of a table with what is given, by place and by name. One without parameters takes any number.
  function call(name, [f, parameters], plain, options) {
    if (!parameters) return options.length ? fail(`${name} has no options here`) : f(...plain);
    const known = Object.keys(parameters);
    if (plain.length > known.length) fail(`${name} takes fewer values`);
    const values = { ...parameters };
    plain.forEach((value, i) => {
      values[known[i]] = value;
    });
    for (const [option, value] of options) {
      if (!known.includes(option)) fail(`${name} has no option ${option} here`);
      values[option] = value;
    }
    return f(
      ...known.map((parameter) => {
        const value = values[parameter];
        if (value === needed) fail(`${name} takes more values`);
        return ["a", "b"].includes(parameter) ? stacked(value) : value;
      }),
    );
  }

  const OWN = {
    // Python's
    len: (a) => {
      const sizes = a?.items ? [a.items.length] : (a?.shape ?? []);
      return sizes.length ? scalar(sizes[0]) : fail("a number has no length");
    },
    abs: (a) => NUMPY.abs[0](stacked(a)),
    float: (a) => a,
    int: (a) => scalar(Math.trunc(entries(stacked(a))[0])),
    range: (...ends) => {
      const [from, to, by] = ends.length === 1 ? [scalar(0), ...ends] : ends;
      const [a, b, step] = [from, to, by ?? scalar(1)].map((end) => whole(end, "an end of a range"));
      const count = step ? Math.max(0, Math.ceil((b - a) / step)) : fail("a range needs a step");
      spend(count);
      return { items: Array.from({ length: count }, (_, i) => scalar(a + i * step)) };
    },
  };

  function stacked(value) {
    // an array, also of a list of lists
    if (isArray(value)) return value;
    const parts = (value?.items ?? fail("a number or an array is missing")).map(stacked);
    const inner = parts[0]?.shape ?? [];
    if (parts.some(({ shape }) => `${shape}` !== `${inner}`)) fail("the rows have several lengths");
    return view([parts.length, ...inner], parts.flatMap(entries));
  }

  // --- an index: whole numbers, slices, None for a new axis, and ...

  const before = (axis, dims) => {
    const at = axis < 0 ? axis + dims + 1 : axis;
    return [...Array(at).fill({ slice: [null, null, null] }), null];
  };

  function sliced(size, [from, to, by]) {
    const [a, b, step] = [from, to, by].map((end) => (end === null ? null : whole(end, "an end of a slice")));
    const way = step ?? 1;
    if (way === 0) fail("a slice needs a step that is not zero");
    const [low, high] = way > 0 ? [0, size] : [-1, size - 1];
    const end = (v, open) => (v === null ? open : Math.min(Math.max(v < 0 ? v + size : v, low), high));
    const first = end(a, way > 0 ? low : high),
      last = end(b, way > 0 ? high : low);
    return [first, Math.max(0, Math.ceil((last - first) / way)), way];
  }

  function place(size, value) {
    const i = whole(value, "an index");
    return i >= -size && i < size ? (i + size) % size : fail(`the index ${i} is out of range: there are ${size}`);
  }

  function indexed(value, index) {
    if (value?.items) {
      if (index.length !== 1) fail("a tuple takes one index");
      if (!index[0]?.slice) return value.items[place(value.items.length, index[0])];
      const [first, count, way] = sliced(value.items.length, index[0].slice);
      return { items: Array.from({ length: count }, (_, i) => value.items[first + i * way]) };
    }
    if (!isArray(value)) fail("this has no entries");
    if (!value.shape.length) fail("an index of a number is not read here");
    const used = index.filter((part) => part !== null && part !== "...").length;
    if (used > value.shape.length) fail(`${used} indices are too many for the shape ${said(value.shape)}`);
    if (index.filter((part) => part === "...").length > 1) fail("an index has ... once at most");
    const dots = index.indexOf("..."),
      rest = Array(value.shape.length - used).fill({ slice: [null, null, null] });
    const all = dots < 0 ? [...index, ...rest] : [...index.slice(0, dots), ...rest, ...index.slice(dots + 1)];
    const shape = [],
      strides = [];
    let { offset } = value,
      axis = 0;
    for (const part of all) {
      if (part === null) {
        shape.push(1);
        strides.push(0);
        continue;
      }
      const size = value.shape[axis],
        stride = value.strides[axis];
      axis += 1;
      if (part.slice) {
        const [first, count, way] = sliced(size, part.slice);
        offset += first * stride;
        shape.push(count);
        strides.push(way * stride);
      } else if (isArray(part) && !part.shape.length) offset += place(size, part) * stride;
      else fail("an index is a whole number, a slice or None");
    }
    return view(shape, value.data, strides, offset);
  }

  function write(a, value) {
    // in place; axes of length 1 that the place lacks fall away
    let fits = value;
    while (fits.shape.length > a.shape.length && fits.shape[0] === 1) fits = indexed(fits, [scalar(0)]);
    fits = entrywise((_, v) => v, a, fits, "=");
    if (`${fits.shape}` !== `${a.shape}`) fail(`${said(value.shape)} does not fit into ${said(a.shape)}`);
    places(a).forEach((at, i) => {
      a.data[at] = fits.data[i];
    });
  }

  // --- reading: a token is a number, a name, a string or a sign; a line has its depth

  const KINDS = [
    /(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)/,
    /([A-Za-z_]\w*)/,
    /("""[^]*?"""|"[^"\n]*"|'[^'\n]*')/,
    /(\*\*=|\/\/=|\*\*|\/\/|->|[-+*/@%]=|\.\.\.|[-+*/@%().,=[\]:;<>!])/,
  ].map(({ source }) => source);

  function tokens(text) {
    const plain = text
      .replace(/\u2212/g, "-")
      .replace(/[\u00b7\u00d7\u22c5]/g, "*")
      .replace(/\u1d40/g, ".T")
      .replace(/\r\n?/g, "\n");
    const pattern = new RegExp(`[^\\S\\n]*(?:${KINDS.join("|")}|(\\n|#[^\\n]*))`, "y");
    const lines = [];
    let line = [],
      depth = 0;
    const finish = () => {
      if (line.length) lines.push(line);
      line = [];
    };
    for (let at = 0; plain.slice(at).trim(); ) {
      pattern.lastIndex = at;
      const match = pattern.exec(plain);
      if (!match) fail(`"${plain.slice(at).trim()[0]}" has no meaning here`);
      const [all, number, name, string, sign, rest] = match;
      if (!line.length) line.indent = all.length - all.trimStart().length;
      at = pattern.lastIndex;
      if (rest === "\n") {
        if (!depth) finish();
      } else if (sign === ";" && !depth) {
        const { indent } = line;
        finish();
        if (/^[^\S\n]*[^\s#]/.test(plain.slice(at))) line.next = indent;
      } else if (rest === undefined) {
        if ("([".includes(sign ?? " ")) depth += 1;
        if (")]".includes(sign ?? " ")) depth -= 1;
        if (!line.length && line.next !== undefined) line.indent = line.next;
        line.push(
          number
            ? { number: Number(number), text: number }
            : name
              ? { name, text: name }
              : string
                ? { string: string.replace(/^("""|["'])|("""|["'])$/g, ""), text: string }
                : { sign, text: sign },
        );
      }
    }
    finish();
    return lines;
  }

  // Returns statements, each a function of the names that are known. One that returns something ends its block.
  function read(lines) {
    let row = 0,
      line = [],
      at = 0;

    const is = (sign) => line[at]?.sign === sign;
    const named = (name) => line[at]?.name === name;
    function take(sign) {
      const found = line[at];
      if (!found) fail(`"${sign}" is missing at the end`);
      if (found.sign !== sign) {
        const lacks = found.sign ? `expected "${sign}"` : "a sign such as @ or * is missing";
        fail(`${lacks} before "${found.text}"`);
      }
      at += 1;
    }
    function word(what) {
      const found = line[at]?.name ?? fail(`${what} is missing`);
      at += 1;
      return found;
    }
    const calculated = (sign, left, right) => (names) => {
      const [a, b] = [left(names), right(names)];
      if (sign === "+" && a?.items && b?.items) return { items: [...a.items, ...b.items] };
      if ([a, b].some((value) => value?.items) && ![a, b].some((value) => value?.shape?.length)) {
        fail("a list is no array: np.array makes one of it");
      }
      return sign === "@" ? matmul(stacked(a), stacked(b)) : entrywise(ARITHMETIC[sign], stacked(a), stacked(b), sign);
    };

    function listed(closing) {
      // expressions between commas, and whether there is a comma
      const parts = [];
      let comma = false;
      while (at < line.length && !closing.some(is)) {
        parts.push(expression());
        comma ||= is(",");
        if (!is(",")) break;
        at += 1;
      }
      return [parts, comma];
    }

    function several(closing) {
      // one expression, or a tuple; null where there is none
      const [parts, comma] = listed(closing);
      if (!parts.length) return null;
      return comma ? (names) => ({ items: parts.map((part) => part(names)) }) : parts[0];
    }

    function expression() {
      if (named("lambda")) {
        at += 1;
        const parameters = [];
        while (!is(":")) {
          parameters.push(word("an argument"));
          if (!is(":")) take(",");
        }
        at += 1;
        const body = expression();
        return (names) => ({ parameters, run: (own) => ({ value: body(own) }), names });
      }
      return sum();
    }

    // Parts with signs of one strength between them, from left to right.
    const chained = (signs, part) => () => {
      let value = part();
      while (signs.some(is)) {
        const { sign } = line[at];
        at += 1;
        value = calculated(sign, value, part());
      }
      return value;
    };
    const products = chained(["*", "/", "@", "//", "%"], signed);
    const sum = chained(["+", "-"], products);

    function signed() {
      if (is("-") || is("+")) {
        const { sign } = line[at];
        at += 1;
        const value = signed();
        return sign === "+" ? value : calculated("*", () => scalar(-1), value);
      }
      const value = parts();
      if (!is("**")) return value;
      at += 1;
      return calculated("**", value, signed());
    }

    function index() {
      // behind a "["
      const found = [];
      while (!is("]")) {
        const ends = [];
        let colons = 0;
        if (is("...")) {
          at += 1;
          found.push(() => "...");
        } else {
          for (;;) {
            ends.push(is(":") || is("]") || is(",") ? () => null : expression());
            if (!is(":")) break;
            at += 1;
            colons += 1;
          }
          if (colons > 2) fail("a slice has at most two colons");
          const [from, to = () => null, by = () => null] = ends;
          found.push(colons ? (names) => ({ slice: [from(names), to(names), by(names)] }) : from);
        }
        if (!is("]")) take(",");
      }
      take("]");
      if (!found.length) fail("an index is missing");
      return (names) => found.map((part) => part(names));
    }

    function given() {
      // behind a "(": what a function is called with
      const plain = [],
        options = [];
      while (!is(")")) {
        if (line[at]?.name && line[at + 1]?.sign === "=") {
          const name = word("an option");
          at += 1;
          options.push([name, expression()]);
        } else plain.push(expression());
        if (!is(")")) take(",");
      }
      take(")");
      return (names) => [plain.map((part) => part(names)), options.map(([name, part]) => [name, part(names)])];
    }

    function parts() {
      let value = atom();
      for (;;) {
        if (is("[")) {
          at += 1;
          const [whole, places] = [value, index()];
          value = (names) => indexed(whole(names), places(names));
        } else if (is("(")) {
          at += 1;
          const [f, values] = [value, given()];
          value = (names) => run(f(names), ...values(names));
        } else if (is(".")) {
          at += 1;
          value = attribute(value, word('a name behind "."'));
        } else return value;
      }
    }

    function only(value, name) {
      // arrays have methods here; Python's numbers have none
      if (!isArray(value)) fail(`this has no ${name}`);
      if (!value.shape.length) fail(`the ${name} of a number is not read here`);
    }

    function attribute(whole, name) {
      if (is("(")) {
        at += 1;
        const values = given();
        return (names) => {
          const value = whole(names);
          if (value?.methods) {
            const method = Object.hasOwn(value.methods, name)
              ? value.methods[name]
              : fail(`rng.${name} is not read here; uniform and standard_normal are`);
            return call(name, method, ...values(names));
          }
          only(value, name);
          if (!Object.hasOwn(METHODS, name)) unread(name);
          const [plain, options] = values(names);
          return call(name, METHODS[name], [value, ...plain], options);
        };
      }
      return (names) => {
        const value = whole(names);
        only(value, name);
        if (name === "T") return turned(value);
        if (name === "shape") return { items: value.shape.map(scalar) };
        if (name === "size") return scalar(product(value.shape));
        return name === "ndim" ? scalar(value.shape.length) : unread(name);
      };
    }
    const unread = (name) => fail(`"${name}" is not read here; @, .T, * and a sum are enough`);

    function atom() {
      const token = line[at] ?? fail("something is missing at the end");
      at += 1;
      if (token.number !== undefined) return () => scalar(token.number);
      if (token.string !== undefined) return () => ({ text: token.string });
      if (token.sign === "(") {
        const value = several([")"]) ?? (() => ({ items: [] }));
        take(")");
        return value;
      }
      if (token.sign === "[") {
        const [found] = listed(["]"]);
        take("]");
        return (names) => ({ items: found.map((part) => part(names)) });
      }
      if (["True", "False"].includes(token.name)) return () => token.name === "True";
      if (token.name === "None") return () => null;
      if (["np", "numpy"].includes(token.name) && is(".")) return library();
      if (token.name && Object.hasOwn(OWN, token.name) && is("(")) {
        at += 1;
        const values = given();
        return (names) => OWN[token.name](...values(names)[0]);
      }
      if (token.name) {
        return (names) => {
          for (let own = names; own; own = own.outer) if (own.known.has(token.name)) return own.known.get(token.name);
          let all = names;
          while (all.outer) all = all.outer;
          return fail(`${token.name} is not given here; you have ${[...all.known.keys()].join(", ")}`);
        };
      }
      return fail(`"${token.text}" stands where a name or a number is expected`);
    }

    function library() {
      // behind "np"
      at += 1;
      let name = word('a name behind "np."');
      if (name === "linalg" && is(".")) {
        at += 1;
        name = word('a name behind "linalg."');
        if (!["norm", "svd"].includes(name)) unread(name);
      } else if (["norm", "svd"].includes(name)) fail(`it is np.linalg.${name}`);
      if (name === "newaxis") return () => null;
      if (name === "pi") return () => scalar(Math.PI);
      if (!Object.hasOwn(NUMPY, name)) unread(name);
      take("(");
      const values = given();
      return (names) => call(name, NUMPY[name], ...values(names));
    }

    // --- statements

    function target(end) {
      // what is assigned to, up to a sign: a name, an entry, or several of them
      const sets = [],
        open = is("(");
      let comma = false;
      if (open) at += 1;
      while (!is(end) && !is(")")) {
        const name = word("a name");
        if (is("[")) {
          at += 1;
          const [whole, places] = [lookup(name), index()];
          sets.push((names, value) => write(indexed(whole(names), places(names)), stacked(value)));
        } else sets.push((names, value) => names.known.set(name, value));
        comma ||= is(",");
        if (!is(",")) break;
        at += 1;
      }
      if (open) take(")");
      take(end);
      if (!comma) return sets[0];
      return (names, value) => {
        const rows = value?.shape?.length
          ? Array.from({ length: value.shape[0] }, (_, i) => indexed(value, [scalar(i)]))
          : null;
        const items = value?.items ?? rows ?? fail("one value cannot be taken apart");
        if (items.length !== sets.length) fail(`${items.length} values do not fit ${sets.length} names`);
        sets.forEach((set, i) => set(names, items[i]));
      };
    }
    const lookup = (name) => {
      const [kept, place] = [line, at];
      line = [{ name, text: name }];
      at = 0;
      const found = atom();
      [line, at] = [kept, place];
      return found;
    };

    function block(indent) {
      // the lines that stand deeper than this one, or what stands behind the colon
      if (at < line.length) return [statement()];
      const found = [],
        depth = lines[row + 1]?.indent ?? 0;
      if (!(depth > indent)) fail("a line that stands deeper is missing behind the colon");
      while (row + 1 < lines.length && lines[row + 1].indent > indent) {
        if (lines[row + 1].indent !== depth) fail("the lines of a block must begin in one column");
        next();
        found.push(statement());
      }
      return found;
    }

    function next() {
      row += 1;
      line = lines[row];
      at = 0;
    }

    // The last line's value: of an expression, or what was assigned.
    const keep = (names, value) => Object.assign(names, { last: undefined, assigned: value });

    const sequence = (all) => (names) => {
      for (const each of all) {
        const done = each(names);
        if (done?.value !== undefined) return done;
      }
      return undefined;
    };

    function statement() {
      const found = begun();
      if (at < line.length) fail(`a sign such as @ or * is missing before "${line[at].text}"`);
      return found;
    }

    function begun() {
      const { indent } = line;
      if (named("def")) {
        at += 1;
        const name = word("the function's name"),
          parameters = [];
        take("(");
        while (!is(")")) {
          const parameter = word("an argument");
          if (parameters.includes(parameter)) fail(`the argument ${parameter} stands there twice`);
          parameters.push(parameter);
          if (!is(")")) take(",");
        }
        take(")");
        take(":");
        const body = sequence(block(indent));
        return (names) => {
          const made = { parameters, run: body, names };
          names.known.set(name, made);
          keep(names, made);
        };
      }
      if (named("for")) {
        at += 1;
        const end = line.findIndex((token, i) => i >= at && token.name === "in");
        if (end < 0) fail('"in" is missing');
        line[end] = { sign: "in", text: "in" };
        const set = target("in"),
          over = several([":"]) ?? fail("a range is missing");
        take(":");
        const body = sequence(block(indent));
        return (names) => {
          const items = over(names)?.items ?? fail("for takes a range");
          for (const item of items) {
            set(names, item);
            const done = body(names);
            if (done?.value !== undefined) return done;
          }
          return undefined;
        };
      }
      if (named("return")) {
        at += 1;
        const value = several([]) ?? (() => null);
        return (names) => ({ value: value(names) });
      }
      if (named("pass") && line.length === 1) {
        at += 1;
        return () => undefined;
      }
      if (named("import") && line.map(({ text }) => text).join(" ") === "import numpy as np") {
        at = line.length;
        return () => undefined;
      }
      const refused = ["import", "from", "if", "while", "class", "with", "try", "del", "global"].find(named);
      if (refused) fail(`"${refused}" is not read here; NumPy is there as np`);
      const assigned = line.findIndex(({ sign }, i) => i >= at && sign?.endsWith("=") && depthAt(i) === 0);
      if (assigned < 0) {
        const value = several([]);
        return (names) => {
          names.last = value(names);
        };
      }
      const { sign } = line[assigned];
      if (sign === "=") {
        const sets = [];
        while (line.some((token, i) => i >= at && token.sign === "=" && depthAt(i) === 0)) sets.push(target("="));
        const value = several([]) ?? fail("a value is missing behind =");
        return (names) => {
          const found = value(names);
          sets.forEach((set) => set(names, found));
          keep(names, found);
        };
      }
      const name = word("a name"),
        old = lookup(name),
        places = is("[") ? ((at += 1), index()) : null;
      take(sign);
      const value = several([]) ?? fail(`a value is missing behind ${sign}`);
      return (names) => {
        // in place where it is an array
        const whole = old(names),
          a = places ? indexed(whole, places(names)) : whole;
        const result = calculated(sign.slice(0, -1), () => a, value)(names);
        if (places || (isArray(a) && a.shape.length)) {
          if (a.shape.length && `${result.shape}` !== `${a.shape}`)
            fail(`${said(result.shape)} does not fit into ${said(a.shape)}`);
          write(a, result);
        } else names.known.set(name, result);
        keep(names, places || (isArray(a) && a.shape.length) ? whole : result);
      };
    }
    const depthAt = (i) =>
      line
        .slice(0, i)
        .reduce((depth, { sign }) => depth + ("([".includes(sign ?? " ") ? 1 : ")]".includes(sign ?? " ") ? -1 : 0), 0);

    function run(f, plain, options) {
      // a function of the answer's own
      if (!f?.parameters) fail("this is no function");
      if (options.length || plain.length !== f.parameters.length)
        fail(`the function takes ${f.parameters.length} values, by place`);
      const own = { known: new Map(f.parameters.map((name, i) => [name, plain[i]])), outer: f.names };
      spend(1);
      return f.run(own)?.value ?? null;
    }

    const all = [];
    for (row = -1; row + 1 < lines.length; ) {
      next();
      if (line.indent > (lines[0]?.indent ?? 0)) fail("a line begins too far to the right");
      all.push(statement());
    }
    return { run: sequence(all), call: run };
  }

  // Returns the value of a text, given names and their arrays. Where it ends with a function, that is called with those
  // that `order` names. `results` are names to look for where no value is returned.
  function runNumpy(text, names, order = [], results = []) {
    steps = 0;
    if (text.length > 10_000) fail("this is too long for a page");
    const lines = tokens(text);
    if (!lines.length) fail("write an expression");
    const program = read(lines);
    const known = new Map(Object.entries(names)),
      own = { known, outer: null };
    const done = program.run(own);
    if (done) return done.value;
    const value = own.last === undefined ? own.assigned : own.last;
    if (value?.parameters)
      return program.call(
        value,
        order.map((name) => names[name]),
        [],
      );
    const found = results.filter((name) => known.has(name) && !(name in names));
    if (own.last !== undefined || !found.length) return value ?? null;
    return found.length === 1 ? known.get(found[0]) : { items: found.map((name) => known.get(name)) };
  }

  return {
    runNumpy,
    numpyArrays: { fromLists, entries, generator, isArray, said, stacked, view },
  };
})();

if (typeof globalThis !== "undefined") Object.assign(globalThis, { runNumpy, numpyArrays });
