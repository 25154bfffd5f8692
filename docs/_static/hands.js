// Pictures in the reader's hands. Each figure.hands has its sliders, its drawing, its sentence and its data in the page.
// Moving a slider looks the numbers up and draws them again. Nothing is asked of a server.
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

  // --- curves in a frame with two axes

  function frame(parent, alt, x, y) {
    const [width, height, left, right, bottom, top] = [330, 230, 46, 14, 34, 22];
    const svg = drawing(parent, width, height, alt);
    const position = (axis, low, high) => (v) => low + ((v - axis.from) / (axis.to - axis.from)) * (high - low);
    const px = position(x, left, width - right), py = position(y, height - bottom, top);
    for (const [axis, p, at] of [[x, px, (v) => ({ x: v, y: height - bottom + 15, "text-anchor": "middle" })],
                                 [y, py, (v) => ({ x: left - 5, y: v + 4, "text-anchor": "end" })]]) {
      for (const tick of axis.ticks) add(svg, "text", { ...at(p(tick)), class: "tick" }, `${tick}`);
    }
    for (const tick of y.ticks) add(svg, "line", { x1: left, x2: width - right, y1: py(tick), y2: py(tick), class: "rule" });
    add(svg, "text", { x: (left + width) / 2, y: height - 3, "text-anchor": "middle" }, x.label);
    add(svg, "text", { x: 2, y: 13 }, y.label);
    return { svg, px, py };
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
