// The page where a language model is fine-tuned: its controls, its curves, its words. The work is done in worker.js.

import { curves } from "./draw.js";
import { MEASURED } from "./tuning.js";

const RANKS = [1, 2, 4, 8, 16], RATES = [0.0003, 0.001, 0.003, 0.01, 0.03];
const LATELY = 8, RISEN = 0.3; // batches that the loss is a mean of; nats above the first batch that are told
const root = document.querySelector('[data-live="model"]');
const find = (selector) => root.querySelector(selector);
const button = (name) => find(`[data-do=${name}]`);
const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
const ask = (what, more = {}) => worker.postMessage({ ask: what, ...more });
const say = (text) => { find(".says").textContent = text; };

let state = "empty"; // then loading, ready, beginning, begun, running
let [tuned, warned] = [false, false]; // whether the worker has an adapter; whether the reader was warned
let [losses, held, best] = [[], [], null]; // best: { step, loss }, the least that was measured on what is held out
let afterwards = () => {}; // what was asked for before the model was here, or before the beginning was made

function turn(next) {
  state = next;
  button("fetch").hidden = !["empty", "loading"].includes(state);
  button("fetch").disabled = state === "loading";
  find("progress").hidden = state !== "loading";
  for (const name of ["run", "step"]) button(name).disabled = state === "loading";
  for (const name of ["write", "save", "restart"]) button(name).disabled = !tuned;
  button("run").textContent = state === "running" ? "Pause" : "Fine-tune on this text";
  if (state !== "running") find("[data-last]").textContent = "";
}

// Begin with the text and the settings that stand in the page. What the page shows stays until the worker has begun: it
// may still tell of a step of the run before.
function begin(then = () => {}) {
  const chosen = (values, name) => values[find(`[name=${name}]`).value];
  afterwards = then;
  turn("beginning");
  const [text, prompt] = [find("[name=text]").value, find("[name=prompt]").value];
  ask("begin", { text, prompt, rank: chosen(RANKS, "rank"), rate: chosen(RATES, "rate") });
}

const number = (v) => v.toLocaleString("en-US");

const TOLD = {
  loading({ loaded, total }) {
    Object.assign(find("progress"), total ? { value: loaded, max: total } : {});
  },
  loaded() {
    turn("ready");
    say("The model is here. From now on nothing is fetched.");
    afterwards();
  },
  begun({ tokens, unknown, length, train, held: apart, trained, frozen }) {
    [losses, held, best, tuned, warned] = [[], [], null, true, false];
    find("[data-loss]").textContent = "";
    find("[data-step]").textContent = "0";
    for (const told of root.querySelectorAll(".told, [data-after], [data-best]")) told.textContent = "";
    if (state !== "beginning") return turn(state); // the text was edited meanwhile
    say([
      `Your text has ${number(tokens)} tokens.`,
      ...(unknown ? [`${number(unknown)} of them stand for letters that its tokenizer does not know.`] : []),
      `It is cut into windows of ${length}: ${train} to train on, ${apart} held out.`,
      ...(apart < MEASURED ? ["So few held-out windows can mislead: which step is best is partly luck."] : []),
      `${number(trained)} numbers train, beside ${number(frozen)} that stay as they are.`,
    ].join(" "));
    turn("begun");
    return afterwards();
  },
  before({ text }) { find(".told.before").textContent = text; },
  after({ text, step }) {
    find(".told.after").textContent = text;
    const when = step ? `after ${step} steps, the best so far` : "no step was better than none so far";
    find("[data-after]").textContent = when;
  },
  stepped({ step, loss, seconds, last: end }) {
    losses.push([step, loss]);
    const lately = losses.slice(-LATELY), mean = lately.reduce((sum, [, value]) => sum + value, 0) / lately.length;
    find("[data-loss]").textContent = mean.toFixed(3);
    find("[data-step]").textContent = step + 1;
    find("[data-seconds]").textContent = seconds.toFixed(2);
    const left = Math.ceil((end - step - 1) * seconds);
    if (state === "running") find("[data-last]").textContent = `step ${end}, in ${left} s, or later if it still learns`;
    show();
    const first = losses[0][1];
    if (warned || losses.length < LATELY || mean < first + RISEN) return;
    warned = true;
    const [from, to] = [first.toFixed(2), mean.toFixed(2)];
    say(`By step ${step + 1} the loss has risen from ${from} to ${to}: the rate is too large. Take a smaller one.`);
  },
  measured({ step, held: value, best: least }) {
    held.push([step, value]);
    best = least;
    find("[data-best]").textContent = `${best.loss.toFixed(2)} at step ${best.step}`;
    show();
  },
  stopped({ step }) {
    turn("begun");
    say([
      `Stopped at step ${step}. The loss on what is held out was least at step ${best.step}:`,
      `${best.loss.toFixed(2)} nats a token.`,
      "Since then the model learns your text by heart. Download gives the adapter of the best step.",
    ].join(" "));
  },
  saved({ zip, step, loss }) {
    say([
      `The adapter after ${step} steps, at ${loss.toFixed(2)} nats a token on what is held out.`,
      "It goes beside glassllm's English model alone: below stands how, in PEFT too.",
    ].join(" "));
    const href = URL.createObjectURL(zip);
    Object.assign(document.createElement("a"), { href, download: "adapter.zip" }).click();
    setTimeout(() => URL.revokeObjectURL(href), 60000);
  },
  failed({ message, kept = false }) {
    tuned = kept;
    turn(state === "loading" ? "empty" : "ready");
    say(state === "empty" ? `The model could not be fetched (${message}). Try again.` : message);
  },
};

function show() {
  find("[data-map=losses]").parentElement.hidden = !losses.length && !held.length;
  const last = (values) => values.at(-1)?.[1].toFixed(2) ?? "not yet known";
  curves(find("[data-map=losses]"), {
    curves: [{ name: "above", values: losses }, { name: "below", values: held }],
    alt: `Nats a token by step: on the text ${last(losses)}, on what is held out ${last(held)}`,
    title: [
      { name: "above", label: "trained on" }, { name: "below", label: "held out" },
      { name: "dashed", label: "nats a token" },
    ],
  });
}

worker.addEventListener("message", ({ data }) => TOLD[data.told](data));
worker.addEventListener("error", () => TOLD.failed({ message: "the worker did not start" }));

function fetchModel(then = () => {}) {
  afterwards = then;
  turn("loading");
  say("");
  ask("load", { folder: new URL("../glassllm/", import.meta.url).href });
}

function run() {
  if (state === "empty") return fetchModel(run);
  if (state === "ready") return begin(run);
  if (state !== "begun") return null;
  turn("running");
  return ask("run");
}

function pause() {
  turn("begun");
  ask("pause");
}

function step() {
  if (state === "empty") return fetchModel(step);
  if (state === "running") pause();
  if (state === "ready") return begin(step);
  return state === "begun" ? ask("step") : null;
}

button("fetch").addEventListener("click", () => fetchModel());
button("run").addEventListener("click", () => (state === "running" ? pause() : run()));
button("step").addEventListener("click", step);
button("restart").addEventListener("click", () => begin());
button("write").addEventListener("click", () => ask("write", { prompt: find("[name=prompt]").value }));
button("save").addEventListener("click", () => ask("save"));

// A new text or setting asks for a new beginning, which comes with the next click.
function changed() {
  if (!["beginning", "begun", "running"].includes(state)) return;
  const started = state !== "beginning";
  if (started) pause();
  turn("ready");
  if (tuned && started) say("The next run begins anew. The adapter of the run before can still be downloaded.");
}

for (const [name, values] of [["rank", RANKS], ["rate", RATES]]) {
  const input = find(`[name=${name}]`);
  const label = () => {
    find(`output[for="${input.id}"]`).textContent = values[input.value];
    input.setAttribute("aria-valuetext", values[input.value]);
  };
  input.addEventListener("input", () => { label(); changed(); });
  label();
}
find("[name=text]").addEventListener("input", changed);

// The address has the settings, so that it can be sent. The text stays in this tab, so that a reload keeps it.
const KEPT = "minilora.live-model.text";
function remember() {
  const settings = new URLSearchParams();
  for (const [name, values] of [["rank", RANKS], ["rate", RATES]]) {
    const input = find(`[name=${name}]`);
    if (input.value !== input.defaultValue) settings.set(name, values[input.value]);
  }
  const prompt = find("[name=prompt]");
  if (prompt.value !== prompt.defaultValue) settings.set("prompt", prompt.value);
  const text = settings.toString();
  history.replaceState(null, "", `${location.pathname}${text ? `?${text}` : ""}${location.hash}`);
  try { // a browser may refuse, as for a text that is too long
    const box = find("[name=text]");
    if (box.value === box.defaultValue) sessionStorage.removeItem(KEPT); else sessionStorage.setItem(KEPT, box.value);
  } catch { sessionStorage.removeItem(KEPT); }
}

function recall() {
  const settings = new URLSearchParams(location.search);
  for (const [name, values] of [["rank", RANKS], ["rate", RATES]]) {
    const place = values.indexOf(Number(settings.get(name) ?? NaN)), input = find(`[name=${name}]`);
    if (place < 0) continue;
    input.value = place;
    find(`output[for="${input.id}"]`).textContent = values[place];
    input.setAttribute("aria-valuetext", values[place]);
  }
  if (settings.has("prompt")) find("[name=prompt]").value = settings.get("prompt");
  const box = find("[name=text]");
  try { box.value = sessionStorage.getItem(KEPT) ?? box.value; } catch { /* none is kept */ }
}

recall();
for (const input of root.querySelectorAll("input, textarea")) input.addEventListener("input", remember);
find(".still").hidden = true;
find(".works").hidden = false;
addEventListener("resize", show);
turn("empty");
show();
