// The page where a language model is fine-tuned: its controls, its curves, its words. The work is done in worker.js.

import { curves } from "./draw.js";

const RANKS = [1, 2, 4, 8, 16], RATES = [0.0003, 0.001, 0.003, 0.01, 0.03], LATELY = 8;
const root = document.querySelector('[data-live="model"]');
const find = (selector) => root.querySelector(selector);
const button = (name) => find(`[data-do=${name}]`);
const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
const ask = (what, more = {}) => worker.postMessage({ ask: what, ...more });
const say = (text) => { find(".says").textContent = text; };

let [state, losses, held] = ["empty", [], []]; // empty, loading, ready, begun or running
let afterwards = () => {}; // what was asked for before the model was here

function turn(next) {
  state = next;
  button("fetch").hidden = !["empty", "loading"].includes(state);
  button("fetch").disabled = state === "loading";
  find("progress").hidden = state !== "loading";
  for (const name of ["run", "step"]) button(name).disabled = state === "loading";
  for (const name of ["write", "save", "restart"]) button(name).disabled = !["begun", "running"].includes(state);
  button("run").textContent = state === "running" ? "Pause" : "Fine-tune on this text";
}

// Begin with the text and the settings that stand in the page.
function begin() {
  const chosen = (values, name) => values[find(`[name=${name}]`).value];
  [losses, held] = [[], []];
  find("[data-loss]").textContent = "";
  find("[data-step]").textContent = "0";
  for (const told of root.querySelectorAll(".told")) told.textContent = "";
  turn("begun");
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
    say([
      `Your text has ${number(tokens)} tokens.`,
      ...(unknown ? [`${number(unknown)} of them stand for letters that its tokenizer does not know.`] : []),
      `It is cut into windows of ${length}: ${train} to train on, ${apart} held out.`,
      `${number(trained)} numbers train, beside ${number(frozen)} that stay as they are.`,
    ].join(" "));
  },
  before({ text }) { find(".told.before").textContent = text; },
  after({ text }) { find(".told.after").textContent = text; },
  stepped({ step, loss, seconds }) {
    losses.push([step, loss]);
    const lately = losses.slice(-LATELY), mean = lately.reduce((sum, [, value]) => sum + value, 0) / lately.length;
    find("[data-loss]").textContent = mean.toFixed(3);
    find("[data-step]").textContent = step + 1;
    find("[data-seconds]").textContent = seconds.toFixed(2);
    show();
  },
  measured({ step, held: value }) {
    held.push([step, value]);
    show();
  },
  saved({ zip }) {
    const href = URL.createObjectURL(zip);
    Object.assign(document.createElement("a"), { href, download: "adapter.zip" }).click();
    setTimeout(() => URL.revokeObjectURL(href), 60000);
  },
  failed({ message }) {
    turn(state === "loading" ? "empty" : "ready");
    say(state === "empty" ? `The model could not be fetched (${message}). Try again.` : message);
  },
};

function show() {
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
  if (state === "ready") begin();
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
  if (state === "ready") begin();
  return ask("step");
}

button("fetch").addEventListener("click", () => fetchModel());
button("run").addEventListener("click", () => (state === "running" ? pause() : run()));
button("step").addEventListener("click", step);
button("restart").addEventListener("click", begin);
button("write").addEventListener("click", () => ask("write", { prompt: find("[name=prompt]").value }));
button("save").addEventListener("click", () => ask("save"));

// A new text or setting asks for a new beginning, which comes with the next click.
function changed() {
  if (state !== "begun" && state !== "running") return;
  pause();
  turn("ready");
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
find(".still").hidden = true;
find(".works").hidden = false;
turn("empty");
show();
