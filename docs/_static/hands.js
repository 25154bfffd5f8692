// Pictures in the reader's hands. Each figure.hands has its sliders, its drawing, its sentence and its data in the page.
// Moving a slider looks the numbers up, or adds up the products, and draws them again. Nothing is asked of a server.
"use strict";

(() => {
  const SVG = "http://www.w3.org/2000/svg";

  function add(parent, tag, attributes = {}, text = "") {
    const child = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) child.setAttribute(name, value);
    child.textContent = text;
    parent.append(child);
    return child;
  }

  function drawing(parent, width, height, alt) {
    const svg = add(parent, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": alt });
    svg.style.maxWidth = `${width}px`;
    return svg;
  }

  // --- a plane, the origin in its middle

  function plane(parent, alt, title) {
    const side = 230, svg = drawing(parent, side, side + 20, alt);
    const px = (v) => side / 2 + (v / 2.15) * (side / 2), py = (v) => 20 + side / 2 - (v / 2.15) * (side / 2);
    add(svg, "text", { x: 2, y: 13 }, title);
    add(svg, "line", { x1: 0, x2: side, y1: py(0), y2: py(0), class: "rule" });
    add(svg, "line", { x1: px(0), x2: px(0), y1: 20, y2: side + 20, class: "rule" });
    return { svg, px, py };
  }

  function segment({ svg, px, py }, from, to, name) {
    add(svg, "line", { x1: px(from[0]), y1: py(from[1]), x2: px(to[0]), y2: py(to[1]), class: `line ${name}` });
  }

  // --- curves and bars in a frame with two axes

  function frame(parent, alt, x, y) {
    const [width, height, left, right, bottom, top] = [330, 230, 46, 14, 34, 22];
    const svg = drawing(parent, width, height, alt);
    const position = (axis, low, high) => (v) => low + ((v - axis.from) / (axis.to - axis.from)) * (high - low);
    const px = position(x, left, width - right), py = position(y, height - bottom, top);
    for (const [axis, p, at] of [[x, px, (v) => ({ x: v, y: height - bottom + 15, "text-anchor": "middle" })],
                                 [y, py, (v) => ({ x: left - 5, y: v + 4, "text-anchor": "end" })]]) {
      for (const tick of axis.ticks) add(svg, "text", { ...at(p(tick)), class: "tick" }, axis.say ? axis.say(tick) : `${tick}`);
    }
    for (const tick of y.ticks) add(svg, "line", { x1: left, x2: width - right, y1: py(tick), y2: py(tick), class: "rule" });
    add(svg, "text", { x: (left + width) / 2, y: height - 3, "text-anchor": "middle" }, x.label);
    add(svg, "text", { x: 2, y: 13 }, y.label);
    return { svg, px, py, base: height - bottom };
  }

  function line({ svg, px, py }, xs, ys, name) {
    add(svg, "polyline", { points: xs.map((x, i) => `${px(x).toFixed(1)},${py(ys[i]).toFixed(1)}`).join(" "), class: `line ${name}` });
  }

  // --- the pictures: each takes its data and the places of its sliders, draws, and returns its sentence

  const DRAW = {
    circle(parent, data, { angle }) {
      const [x, y] = data.arrows[angle];
      const long = data.arrows.map(([, end]) => Math.hypot(...end));
      const ends = [long.indexOf(Math.max(...long)), long.indexOf(Math.min(...long))];
      [["x", data.circle, x, 0], ["M x", data.ellipse, y, 1]].forEach(([name, curve, arrow, side]) => {
        const f = plane(parent, `${name} is the arrow to ${arrow.join(", ")}`, name);
        for (const end of ends) segment(f, [0, 0], data.arrows[end][side], "thin");
        line(f, curve.map(([a]) => a), curve.map(([, b]) => b), "base");
        segment(f, [0, 0], arrow, "lora");
        add(f.svg, "circle", { cx: f.px(arrow[0]), cy: f.py(arrow[1]), r: 5, class: "lora" });
      });
      return data.says[angle];
    },

    line(parent, data, { line: place }) {
      const near = data.near[place], f = plane(parent, `The ellipse, and the line at ${data.angles[place]} degrees`, "M x, and the nearest on the line");
      line(f, data.ellipse.map(([a]) => a), data.ellipse.map(([, b]) => b), "base");
      data.points.forEach((point, i) => segment(f, point, near[i], "thin"));
      near.forEach(([a, b]) => add(f.svg, "circle", { cx: f.px(a), cy: f.py(b), r: 3, class: "lora" }));
      const e = frame(parent, `The error, now ${data.errors[place]}`,
        { from: 0, to: 170, ticks: [0, 60, 120], label: "direction of the line, degrees" },
        { from: 0, to: 5, ticks: [0, 1, 2, 3, 4], label: "squared error" });
      line(e, data.angles, data.errors, "lora");
      add(e.svg, "circle", { cx: e.px(data.angles[place]), cy: e.py(data.errors[place]), r: 5, class: "lora" });
      return data.says[place];
    },

    levels(parent, data, { bits }) {
      const book = data.books[bits], last = data.grid[data.grid.length - 1];
      const f = frame(parent, `A bell curve and ${book.length} levels under it`,
        { from: -last, to: last, ticks: [-1, 0, 1], label: "weight / the largest of its block" },
        { from: 0, to: 1.05, ticks: [0], label: "how often", say: () => "" });
      line(f, data.grid, data.bell, "ink");
      const height = (c) => data.bell[Math.round((c + last) / (2 * last) * (data.grid.length - 1))];
      for (const c of book) add(f.svg, "line", { x1: f.px(c), x2: f.px(c), y1: f.py(0), y2: f.py(height(c)), class: "line lora" });
      const most = Math.ceil(20 * Math.max(...data.shares[bits])) / 20;
      const bars = frame(parent, "The share of the weights that each level stands for",
        { from: -last, to: last, ticks: [-1, 0, 1], label: "level" },
        { from: 0, to: most, ticks: [0, most], say: (v) => `${Math.round(100 * v)} %`, label: "share of the weights at each level" });
      data.shares[bits].forEach((share, k) => {
        add(bars.svg, "line", { x1: bars.px(book[k]), x2: bars.px(book[k]), y1: bars.base, y2: bars.py(share), class: "line lora" });
      });
      return data.says[bits];
    },

    ledger(parent, data, { width, batch, r }) {
      const sizes = { w: +data.values.width[width], N: +data.values.batch[batch], r: +data.values.r[r] };
      const size = (letters) => [...letters].reduce((product, letter) => product * sizes[letter], 1);
      const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
      const tally = ({ products, shapes }) => {
        const trained = sum(shapes.map(size));
        const moved = sum(products.map(([m, k, n]) => size([m, k]) + size([k, n]) + size([m, n])));
        return { "multiply-adds": sum(products.map(size)), "bytes moved": 4 * (moved + 7 * trained), "bytes of Adam": 8 * trained };
      };
      const [full, lora] = [tally(data.full), tally(data.lora)];
      const millions = (v) => (v / 1e6).toLocaleString("en-US", { maximumSignificantDigits: 3 });
      for (const key of Object.keys(full)) {
        const svg = drawing(parent, 300, 66, `${key}: ${millions(full[key])} million in full, ${millions(lora[key])} with LoRA`);
        const most = Math.max(full[key], lora[key]);
        add(svg, "text", { x: 2, y: 14 }, `${key}, millions`);
        [["base", "full", full[key]], ["lora", "LoRA", lora[key]]].forEach(([name, label, value], j) => {
          const y = 20 + j * 22, long = Math.max(190 * (value / most), 1);
          add(svg, "text", { x: 2, y: y + 14, class: "tick" }, label);
          add(svg, "rect", { x: 40, y, width: long, height: 18, class: name });
          add(svg, "text", { x: 46 + long, y: y + 14, class: "tick" }, millions(value));
        });
      }
      const share = (key) => `${(100 * lora[key] / full[key]).toLocaleString("en-US", { maximumSignificantDigits: 3 })} % of the ${key}`;
      return `Width ${sizes.w}, ${sizes.N} rows, rank ${sizes.r}: LoRA takes ${Object.keys(full).map(share).join(", ")}.`;
    },
  };

  function start(figure) {
    const data = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
    const inputs = [...figure.querySelectorAll("input[type=range]")];
    const [board, says] = [figure.querySelector(".drawing"), figure.querySelector(".says")];
    const show = () => {
      const places = Object.fromEntries(inputs.map((input) => [input.name, Number(input.value)]));
      for (const input of inputs) {
        const value = data.values[input.name][input.value];
        input.setAttribute("aria-valuetext", value);
        figure.querySelector(`output[for="${input.id}"]`).textContent = value;
      }
      board.replaceChildren();
      says.textContent = DRAW[figure.dataset.kind](board, data, places);
    };
    for (const input of inputs) input.addEventListener("input", show);
    show();
    figure.classList.add("live");  // the style sheet shows the sliders now that they do something
  }

  // --- the derivation's graph: an equation, a link to one or a button lights what it computes, and less what it reads

  const graph = document.querySelector("figure.graph");
  const edges = graph ? [...graph.querySelectorAll("g[data-eq], g[data-reads]")] : [];
  const bear = (edge, number, role = "eq") => (edge.dataset[role] ?? "").split(" ").includes(number);

  function light({ type, target }) {
    const at = target.closest("[data-eq], .equation, a[href*='#eq-']");
    if (!at && type !== "click") return;  // it stays lit until something else is
    const numbers = at ? (at.dataset.eq ?? (at.id || at.hash).replace(/^#?eq-/, "")).split(" ") : [];
    const bearing = (role) => edges.filter((edge) => numbers.some((number) => bear(edge, number, role)));
    const [lit, read] = [bearing("eq"), bearing("reads")];
    if (at && !lit.length) return;
    graph.classList.toggle("on", lit.length > 0);
    for (const edge of edges) {
      edge.classList.toggle("lit", lit.includes(edge));
      edge.classList.toggle("read", read.includes(edge));
    }
  }

  if (graph) {
    for (const type of ["pointerover", "focusin", "click"]) document.addEventListener(type, light);
    graph.querySelector(".steps").hidden = false;
    for (const number of document.querySelectorAll(".equation .number")) {  // it leads to the graph, where it is on it
      if (!edges.some((edge) => bear(edge, number.textContent.slice(1, -1)))) continue;
      const link = document.createElement("a");
      Object.assign(link, { href: "#graph", textContent: number.textContent, title: "in the graph", className: "to-graph" });
      number.replaceChildren(link);
    }
  }

  document.querySelectorAll("figure.hands:not(.live)").forEach(start);
})();
