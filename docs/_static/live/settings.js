// What fits, which runs to make, and what their losses say, for a reader's own numbers. Sizes, recipes and words are
// from docs/_ext/settings.json. The page's own tables come from here, too.

import { adapterNumbers, countNumbers, total, trainingMemory } from "./memory.js";

const BILLION = 1e9;

// --- printed numbers ---

// A number with so many significant digits, without an exponent; a half is rounded up.
export function plain(x, digits = 3) {
  if (!x) return "0";
  const [mantissa, power] = x.toExponential(digits - 1).split("e");
  const figures = mantissa.replace(".", ""), e = Number(power);
  const text = e < 0 ? `0.${"0".repeat(-e - 1)}${figures}`
    : e >= digits - 1 ? figures + "0".repeat(e - digits + 1) : `${figures.slice(0, e + 1)}.${figures.slice(e + 1)}`;
  return text.includes(".") ? text.replace(/0+$/, "").replace(/\.$/, "") : text;
}

const grouped = (whole) => String(whole).replace(/\B(?=(\d{3})+$)/g, ",");
const down = (x, y) => (x - (((x % y) + y) % y)) / y;  // divided and rounded, exact up to 2^53
const up = (x, y) => -down(-x, y);

// Bytes in units of 10^9: two decimals below 10, then one.
export function gigabytes(count) {
  const unit = count < 9995e6 ? 1e7 : 1e8, steps = down(count + unit / 2, unit), each = BILLION / unit;
  return `${grouped(down(steps, each))}.${String(steps % each).padStart(unit === 1e7 ? 2 : 1, "0")}`;
}

const fill = (words, values) => words.replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
const percent = (share) => `${Math.floor(100 * share + 0.5)} %`;

// --- what comes in ---

function number(text) {
  const word = text.trim();
  if (/^\d{1,3}(,\d{3})+(\.\d+)?$/.test(word)) return Number(word.replaceAll(",", ""));
  return /^(\d+(\.\d*)?|\.\d+)$/.test(word) ? Number(word) : null;
}

export function readInputs(data, fields, model = null) {
  const found = { model, key: "" }, wrong = {};
  if (!model) {
    if (Object.hasOwn(data.models, fields.model)) {
      found.model = data.models[fields.model];
      found.key = fields.model;
    } else wrong.model = data.refused.model;
  }
  for (const [name, [low, high]] of Object.entries(data.limits)) {
    const value = number(fields[name]);
    const whole = name === "memory" || (value ?? 0) % 1 === 0;
    if (value !== null && value >= low && value <= high && whole) found[name] = value;
    else wrong[name] = data.refused[name];
  }
  if (!Object.hasOwn(data.conventions, fields.convention)) wrong.convention = data.refused.convention;
  found.convention = fields.convention;
  found.rank = null;
  if (fields.rank.trim() && found.model) {
    const value = number(fields.rank);
    if (value === null || value % 1 || value < 1 || value > found.model.d) {
      wrong.rank = fill(data.refused.rank, { d: found.model.d });
    } else found.rank = value;
  }
  return { found, wrong };
}

export function readConfig(data, text) {
  const no = (name, values = {}) => ({ model: null, says: fill(data.refused[name], values) });
  let settings = null;
  try {
    settings = JSON.parse(text);
  } catch { /* no JSON: said below */ }
  if (settings === null || typeof settings !== "object" || Array.isArray(settings)) return no("json");
  const kind = settings.model_type;
  if (!data.kinds.includes(kind)) {
    return no("kind", { kind: typeof kind === "string" ? kind : "missing", kinds: data.kinds.join(", ") });
  }
  for (const name of ["attention_bias", "mlp_bias"]) {
    if (kind !== "qwen2" && settings[name] === true) return no("bias", { name });
  }
  const sizes = {};
  for (const [letter, [name, most]] of Object.entries(data.config)) {
    let value = settings[name] ?? null;
    if (value === null && letter === "K") value = sizes.H;
    if (value === null && letter === "D") value = kind === "qwen3" ? 128 : Math.floor(sizes.d / sizes.H);
    if (typeof value !== "number" || value % 1 || !(value >= 1 && value <= most)) {
      return no("size", { name, most: grouped(most) });
    }
    sizes[letter] = value;
  }
  if (sizes.H % sizes.K || sizes.D % 2) return no("heads", { H: sizes.H, K: sizes.K });
  const tied = settings.tie_word_embeddings ?? kind === "gemma";
  const family = { llama: "Llama", qwen2: "Qwen", qwen3: "Qwen" }[kind] ?? "";
  const besides = { tied: tied === true, family, biases: kind === "qwen2", normed: kind === "qwen3" };
  return { model: { kind, ...sizes, ...besides }, says: "" };
}

// --- what fits ---

const sum = (numbers) => numbers.reduce((total, one) => total + one, 0);
const weightsOf = (model) => sum(countNumbers(model));

function whatFits(data, model, memory, tokens, rank) {
  const ways = [];
  for (const [name, bits] of data.ways) {
    for (const recompute of [false, true]) {
      const parts = trainingMemory(model, { tokens, recompute, ...(bits ? { rank, bits } : {}) });
      const grows = parts.activations + parts.logits, all = total(parts);
      const free = Math.floor(memory * BILLION + 0.5) - (all - grows);
      const most = Math.max(0, down(free, grows / tokens));
      ways.push({
        way: recompute ? `${name}, recomputed` : name,
        weights: gigabytes(parts.weights), trained: gigabytes(parts.trained + parts.gradients + parts.Adam),
        activations: gigabytes(parts.activations), logits: gigabytes(parts.logits),
        total: gigabytes(all), bytes: all, fits: most >= tokens,
        most: grouped(most), one: gigabytes(all - grows + grows / tokens),
      });
    }
  }
  return ways;
}

function chooseWay(data, ways, memory, tokens) {
  const adapters = ways.filter(({ way }) => way.includes("bits")), first = adapters.find(({ fits }) => fits);
  if (first) return fill(data.words.fits, { way: first.way, total: first.total, memory });
  const least = adapters.at(-1);
  if (least.most === "0") return fill(data.words["too large"], { way: least.way, total: least.one });
  return fill(data.words["fewer tokens"], { way: least.way, tokens: grouped(tokens), most: least.most });
}

// --- which runs ---

function tinkerRate(data, { family, d }) {
  const { rate, width, power } = data.tinker;
  return Object.hasOwn(power, family) ? rate * (width / d) ** power[family] : null;
}

function recipesOf(data, key, model) {
  const tables = { torchtune: data.torchtune, LitGPT: data.litgpt }, small = weightsOf(model) < data.qlora["up to"];
  const found = [];
  for (const [name, source, madeFor, ...set] of data.recipes) {
    let words = madeFor, [rank, alpha, rate] = set;
    if (tables[name]) {
      if (!Object.hasOwn(tables[name], key)) continue;
      words = key;
      [rank, alpha, rate] = tables[name][key];
    } else if (name === "QLoRA") {
      words = small ? "LLaMA 7B, 13B" : "LLaMA 33B, 65B";
      ({ rank, alpha } = data.qlora);
      rate = small ? data.qlora.rate : data.qlora.above;
    } else if (name === "Tinker") {
      rate = tinkerRate(data, model);
      if (rate === null) continue;
      words = `a ${model.family} of this width`;
      ({ rank, alpha } = data.tinker);
    }
    found.push({ name, source, for: words, rank, alpha, s: alpha / rank, rate, product: (alpha / rank) * rate });
  }
  return found;
}

function fourRuns(data, key, model, convention, wanted) {
  const [words, usual, fixed, multiple, root] = data.conventions[convention];
  let first = usual, times = multiple, own = null;
  if (convention === "torchtune" && Object.hasOwn(data.torchtune, key)) {
    const [rank, alpha, rate] = data.torchtune[key];
    [first, times, own] = [rank, alpha / rank, rate];
  } else if (convention === "qlora") own = weightsOf(model) < data.qlora["up to"] ? data.qlora.rate : data.qlora.above;
  else if (convention === "tinker") own = tinkerRate(data, model);
  const rank = wanted || first;
  const strength = (r) => {
    const alpha = fixed || times * r;
    return [alpha, alpha / (root ? Math.sqrt(r) : r)];
  };
  const rate = Number(plain(own ?? data.start / strength(rank)[1], 2));
  const runs = [[rank, rate / 2], [rank, rate], [rank, 2 * rate], [2 * rank, rate]].map(([r, lr]) => {
    const [alpha, s] = strength(r);
    return { rank: r, alpha, s, rate: lr, product: s * lr };
  });
  const name = words.split(":")[0], unknown = ["torchtune", "tinker"].includes(convention) ? "no recipe" : "start";
  if (own !== null) return [runs, fill(data.words["own rate"], { name, rate: plain(own) })];
  return [runs, fill(data.words[unknown], { name, start: plain(data.start) })];
}

function printed(row) {
  const shown = { rank: String(row.rank), at: xOf(row.product) };
  for (const name of ["alpha", "s", "rate", "product"]) shown[name] = plain(row[name]);
  return { ...row, ...shown };
}

export function advise(data, { model, key, memory, rows, length, tokens, convention, rank: wanted }) {
  const others = recipesOf(data, key, model);
  const [runs, why] = fourRuns(data, key, model, convention, wanted), rank = runs[0].rank;
  const ways = whatFits(data, model, memory, tokens, rank);
  const text = rows * length, each = adapterNumbers(model, 1), need = up(text, each);
  return {
    ways,
    fits: chooseWay(data, ways, plain(memory, 9), tokens),
    data: fill(data.words.data, {
      rows: grouped(rows), length: grouped(length), all: grouped(text), steps: grouped(up(text, tokens)),
      tokens: grouped(tokens),
    }),
    capacity: fill(data.words[rank >= need ? "holds" : "short"], {
      rank, numbers: grouped(rank * each), need: grouped(need),
    }),
    recipes: others.map(printed), runs: runs.map(printed), why,
    axis: axis(others.map(printed), runs.map(printed)),
  };
}

// --- the axis ---

const LEFT = 96, RIGHT = 322, LOWEST = -6, DECADES = 5;
const xOf = (product) => (LEFT + ((RIGHT - LEFT) * (Math.log10(product) - LOWEST)) / DECADES).toFixed(1);

function axis(others, runs) {
  const low = 18, foot = 18 + 20 * (others.length + 1), band = runs.map(({ at }) => Number(at));
  const from = Math.min(...band), to = Math.max(...band);
  const parts = [`<rect x="${from.toFixed(1)}" y="${low - 8}" width="${(to - from).toFixed(1)}" `
    + `height="${foot - low + 8}" fill="#e8743b" opacity="0.15"/>`];
  for (let power = LOWEST; power <= LOWEST + DECADES; power++) {
    const x = (LEFT + ((RIGHT - LEFT) * (power - LOWEST)) / DECADES).toFixed(1);
    parts.push(`<path d="M${x} ${low - 8}V${foot}" stroke="#888" stroke-opacity="0.3"/>`);
    const label = `0.${"0".repeat(-power - 1)}1`;
    if (power % 2) parts.push(`<text x="${x}" y="${foot + 14}" text-anchor="middle" font-size="10">${label}</text>`);
  }
  others.forEach((recipe, row) => {
    const y = low + 20 * row;
    parts.push(`<text x="0" y="${y + 4}">${recipe.name}</text>`);
    parts.push(`<circle cx="${recipe.at}" cy="${y}" r="4.5" fill="#4269d0"/>`);
  });
  const y = low + 20 * others.length;
  parts.push(`<text x="0" y="${y + 4}" font-weight="600">your runs</text>`);
  for (const { at } of runs) {
    parts.push(`<circle cx="${at}" cy="${y}" r="4.5" fill="none" stroke="#e8743b" stroke-width="2"/>`);
  }
  const says = others.map(({ name, product }) => `${name} ${product}`).join(", ");
  const mine = runs.map(({ product }) => product).join(", ");
  const label = `s times rate on a logarithmic axis. ${says}. Your four runs: ${mine}.`;
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 330 ${foot + 20}" role="img" aria-label="${label}" `
    + `font-family="sans-serif" font-size="12" fill="currentColor">${parts.join("")}</svg>`;
}

// --- what held-out losses say ---

const real = (word) => (/^(\d{1,9}(\.\d{0,17})?|\.\d{1,17})(e[-+]?\d{1,2})?$/.test(word) ? Number(word) : null);

export function readLosses(data, text) {
  const no = (name, values = {}) => ({ runs: [], base: null, says: fill(data.refused[name], values) });
  const lines = text.split(/\r\n|\r|\n/), runs = [];
  let base = null;
  if (lines.length > 200) return no("many");
  for (const [n, whole] of lines.entries()) {
    const line = n + 1, words = whole.toLowerCase().replace(/^[ \t,;|]+|[ \t,;|]+$/g, "").split(/[ \t,;|]+/);
    if (words[0] === "" || words[0].startsWith("#") || words.join(" ") === "rank rate loss") continue;
    if (["base", "untouched"].includes(words[0])) {
      const value = words.length === 2 ? real(words[1]) : null;
      if (value === null || base !== null) return no("base", { line });
      base = value;
      continue;
    }
    if (words.length !== 3) return no("parts", { line, parts: words.length });
    if (!/^[1-9]\d{0,5}$/.test(words[0])) return no("line rank", { line, word: words[0] });
    const rate = real(words[1]), loss = real(words[2]);
    if (rate === null || !(rate > 0 && rate <= 1)) return no("line rate", { line, word: words[1] });
    const diverged = ["nan", "inf", "diverged"].includes(words[2]);
    if (loss === null && !diverged) return no("line loss", { line, word: words[2] });
    runs.push([Number(words[0]), rate, loss]);
  }
  return runs.length ? { runs, base, says: "" } : no("none");
}

const mean = (values) => sum(values) / values.length;

export function judge(data, runs, base) {
  const lines = [], seen = data.evidence;
  const say = (what, values = {}) => {
    const [source, size] = data.seen[what];
    lines.push({ what, says: fill(data.words[what], values), source, seen: size });
  };
  const losses = runs.map((run) => run[2]);
  const settings = new Set(runs.map(([r, lr]) => `${r} ${lr}`));
  if (settings.size > 1 && !losses.includes(null) && new Set(losses).size === 1) {
    say("nothing moved", { loss: plain(losses[0], 9) });
    return lines;
  }
  const groups = new Map(), ascending = (a, b) => a[0] - b[0];
  for (const [rank, rate, loss] of runs) {
    if (!groups.has(rank)) groups.set(rank, new Map());
    const by = groups.get(rank);
    by.set(rate, [...(by.get(rate) ?? []), loss]);
  }
  let squares = 0, freedom = 0;
  for (const by of groups.values()) {
    for (const of of by.values()) {
      if (of.length < 2 || of.includes(null)) continue;
      const centre = mean(of);
      for (const value of of) squares += (value - centre) * (value - centre);
      freedom += of.length - 1;
    }
  }
  const spread = freedom ? Math.sqrt(squares / freedom) : seen.spread;
  const noise = (one, other) => 2 * spread * Math.sqrt(1 / one + 1 / other);
  const means = [...groups].sort(ascending).map(([rank, by]) => [rank,
    [...by].sort(ascending).map(([rate, of]) => [rate, of.includes(null) ? null : mean(of)])]);
  const finite = means.flatMap(([, by]) => by.map(([, loss]) => loss)).filter((loss) => loss !== null);
  if (base !== null && finite.length && Math.min(...finite) > base - noise(1, 1)) {
    say("nothing learned", { base: plain(base, 9), noise: plain(noise(1, 1), 2) });
    return lines;
  }
  if (base === null) say("no base");
  const found = [];  // of each rank the best rate, its loss, whether it is found
  for (const [rank, by] of means) {
    const alive = by.filter(([, loss]) => loss !== null);
    if (!alive.length) {
      say("all broke", { rank, next: plain(by[0][0] / 4) });
      continue;
    }
    const [best, loss] = alive.reduce((one, other) => (other[1] < one[1] ? other : one));
    const higher = by.filter(([rate]) => rate > best), lower = by.filter(([rate]) => rate < best);
    const worst = base === null ? Infinity : loss + (base - loss) * data.lost;
    const dead = higher.find(([, of]) => of === null || of > worst);
    if (dead) say("broke", { rank, at: plain(dead[0]) });
    let settled = false;
    if (by.length === 1) say("one rate", { rank, below: plain(best / 2), above: plain(best * 2) });
    else if (!lower.length) say("search lower", { rank, next: plain(best / 2) });
    else if (!higher.length) say("search higher", { rank, next: plain(best * 2) });
    else {
      const wide = [];
      if (best / lower.at(-1)[0] > data.far) wide.push(plain(best / 2));
      if (higher[0][0] / best > data.far) wide.push(plain(best * 2));
      settled = !wide.length;
      if (wide.length) say("search between", { rank, rate: plain(best), next: wide.join(" and ") });
      else {
        const [half, four] = [percent(seen.half), percent(seen.four)];
        say("rate found", { rank, rate: plain(best), loss: plain(loss, 4), half, four });
      }
    }
    found.push([rank, best, loss, settled]);
  }
  if (found.length === 1) {
    const [rank, rate] = found[0];
    say("one rank", { next: 2 * rank, rate: plain(rate), below: plain(rate / 2) });
  } else if (found.length) {
    const [[low, lowRate, lowLoss, lowSettled], [high, rate, loss, settled]] = found.slice(-2);
    const within = noise(groups.get(low).get(lowRate).length, groups.get(high).get(rate).length);
    if (!(lowSettled && settled)) say("cannot compare", { low, high });
    else if (lowLoss - loss > within) {
      const next = 2 * high, less = plain(lowLoss - loss, 2);
      say("limit", { low, high, less, next, rate: plain(rate), below: plain(rate / 2) });
    } else if (loss - lowLoss > within) say("worse", { low, high, more: plain(loss - lowLoss, 2) });
    else say("no limit", { low, high, noise: plain(within, 2), rate: plain(lowRate) });
  }
  say("noise", { noise: plain(noise(1, 1), 2), whose: freedom ? data.words.yours : data.words.ours });
  return lines;
}

// --- the page ---

const OTHER = "other", LONGEST = 4000; // letters of losses that an address takes

const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => ENTITIES[c]);

function tableOf(head, rows) {
  const line = (cells, tag) => `<tr>${cells.map((cell) => `<${tag}>${cell}</${tag}>`).join("")}</tr>`;
  const lines = [line(head, "th"), ...rows.map((row) => line(row, "td"))];
  return `<div class="table-wrapper"><table class="data">${lines.join("")}</table></div>`;
}

// Sizes as the config.json that says them: short enough for an address.
function configOf(data, model) {
  const named = Object.entries(data.config).map(([letter, [name]]) => [name, model[letter]]);
  return JSON.stringify({ model_type: model.kind, ...Object.fromEntries(named), tie_word_embeddings: model.tied });
}

function start(root) {
  const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const find = (selector) => root.querySelector(selector), form = find("form"), losses = find("[name=losses]");
  const field = (name) => form.elements.namedItem(name);
  const linked = (source) => {
    const [name, address] = data.sources[source];
    return `<a href="${address}">${escaped(name)}</a>`;
  };
  const small = (of) => (of ? ` <small>(${linked(of[0])}; ${escaped(of[1])})</small>` : "");
  const options = (select, pairs) => pairs.forEach(([value, words]) => select.add(new Option(words, value)));
  options(field("model"), Object.keys(data.models).map((name) => [name, name]));
  options(field("model"), [[OTHER, "another: paste its config.json"]]);
  options(field("convention"), Object.entries(data.conventions).map(([key, [words]]) => [key, words]));

  const fields = () => Object.fromEntries(["model", ...Object.keys(data.limits), "convention", "rank"]
    .map((name) => [name, field(name).value]));

  let saving;

  function save(model) {
    const now = fields(), found = Object.entries(now).filter(([name, value]) => value !== data.defaults[name]);
    if (now.model === OTHER && model) found.push(["config", configOf(data, model)]);
    if (losses.value.trim() && losses.value.length <= LONGEST) found.push(["losses", losses.value]);
    const text = String(new URLSearchParams(found));
    history.replaceState(null, "", `${location.pathname}${text ? `?${text}` : ""}${location.hash}`);
  }

  function restore() {
    const kept = new URLSearchParams(location.search);
    for (const [name, value] of Object.entries(data.defaults)) {
      field(name).value = kept.get(name) ?? value;
      if (field(name).options && !field(name).value) field(name).value = value; // no such choice
    }
    field("config").value = kept.get("config") ?? "";
    losses.value = kept.get("losses") ?? "";
  }

  function showAnswer(model) {
    const { found, wrong } = readInputs(data, fields(), model);
    for (const name of Object.keys(fields())) field(name).setAttribute("aria-invalid", name in wrong);
    find(".wrong").textContent = Object.values(wrong).join(" ");
    find(".answer").hidden = Object.keys(wrong).length > 0;
    if (Object.keys(wrong).length) return;
    const answer = advise(data, found);
    for (const name of ["fits", "data", "capacity", "why"]) {
      find(`[data-says=${name}]`).innerHTML = escaped(answer[name]) + small(data.advised[name]);
    }
    field("rank").placeholder = answer.runs[0].rank;
    const named = ({ way, fits }) => (fits ? `${way}: <b>fits</b>` : way);
    find("[data-table=ways]").innerHTML = tableOf(
      ["GB", "weights", "trained, Adam", "activa&shy;tions", "logits", "in all", "most tokens"],
      answer.ways.map((way) => [
        named(way), way.weights, way.trained, way.activations, way.logits, way.total, way.most,
      ]),
    );
    find("[data-table=recipes]").innerHTML = tableOf(
      ["recipe", "r", "alpha", "s", "rate", "s &times; rate"],
      answer.recipes.map((of) => [
        `${escaped(of.name)}, ${linked(of.source)}: ${escaped(of.for)}`, of.rank, of.alpha, of.s, of.rate, of.product,
      ]),
    );
    find("[data-table=runs]").innerHTML = tableOf(
      ["run", "rank", "alpha", "s", "rate", "s &times; rate"],
      answer.runs.map((run, i) => [i + 1, run.rank, run.alpha, run.s, run.rate, run.product]),
    );
    find("[data-axis]").innerHTML = answer.axis;
    const such = ["2.43", "2.38", "2.41", "2.37"].map((loss, i) => [answer.runs[i].rank, answer.runs[i].rate, loss]);
    losses.placeholder = ["base 3.21", ...such.map((run) => run.join(" "))].join("\n");
  }

  function showLines() {
    const { runs, base, says } = readLosses(data, losses.value), empty = !losses.value.trim();
    find("[data-wrong=losses]").textContent = empty ? "" : says;
    find("[data-lines]").innerHTML = (says ? [] : judge(data, runs, base)).map((line) =>
      `<li>${escaped(line.says)}${small([line.source, line.seen])}</li>`).join("");
  }

  function show() {
    const other = field("model").value === OTHER;
    const { model, says } = other ? readConfig(data, field("config").value) : { model: null };
    find("[data-if=other]").hidden = !other;
    if (other && !model) {
      find(".wrong").textContent = says;
      find(".answer").hidden = true;
    } else showAnswer(model);
    showLines();
    clearTimeout(saving); // a browser ignores addresses that change with every letter
    saving = setTimeout(save, 300, model);
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  root.addEventListener("input", show);
  restore();
  show();
  find(".still").hidden = true;
  find(".works").hidden = false;
}

if (typeof document !== "undefined") document.querySelectorAll("[data-live=settings]").forEach(start);
