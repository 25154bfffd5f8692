// The front page: its object is pinned, and the text drives it. What happens is in scenes.js, the picture in board.js.
// The build writes this file and all that it imports into the page (docs/_ext/front.py), so that it asks for no file.

import { HEIGHT, WIDTH, markup, picture } from "./board.js";
import { ask } from "./predict.js";
import { CHOICES, PLAIN, SCENES, after, begun, sceneAt, stateOf } from "./scenes.js";

const LABELS = {
  products: "rank r", rank: "rank r", alpha: "alpha", rate: "rate", apart: "apart", size: "change", model: "model",
  tokens: "tokens",
};
const SAID = {
  size: (value) => `${100 * value} %`,
  tokens: (value) => value.toLocaleString("en-US"),
};
const SLOW = 0.1; // seconds: after a longer gap, as behind another window, time has not passed

const figure = document.querySelector("figure.front");
const svg = figure.querySelector("svg");
let tale = begun({ still: matchMedia("(prefers-reduced-motion: reduce)").matches });
let [last, told] = [null, ""];

const make = (tag, attributes = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
};

// --- what is seen

function draw() {
  const shown = picture(stateOf(tale));
  svg.innerHTML = markup(shown);
  moment.value = Math.round(100 * tale.times[tale.scene]);
  const open = tale.open.includes(tale.scene), scene = SCENES.find(({ name }) => name === tale.scene);
  play.textContent = open ? (tale.running ? "Pause" : "Play") : "Show me";
  moment.disabled = !open;
  for (const [name, control] of Object.entries(controls)) {
    control.hidden = !open || !scene.controls.includes(name);
    const { input, output } = control, value = tale.settings[name];
    input.value = input.tagName === "SELECT" ? value : CHOICES[name].indexOf(value);
    output.textContent = SAID[name]?.(value) ?? value;
    input.setAttribute("aria-valuetext", output.textContent);
  }
  if (tale.running) says.textContent = told = ""; // it is said when it rests
  if (tale.running || shown.alt === told) return;
  told = shown.alt;
  svg.setAttribute("aria-label", told);
  says.textContent = told;
}

function happens(type, event = {}) {
  const before = tale;
  tale = after(tale, { type, ...event });
  if (tale === before) return;
  if (tale.running && !before.running) {
    last = null;
    requestAnimationFrame(passes);
  }
  draw();
}

function passes(now) {
  const seconds = last === null ? 0 : Math.min((now - last) / 1000, SLOW);
  last = now;
  happens("passed", { seconds });
  if (tale.running) requestAnimationFrame(passes);
}

// --- controls, below the picture

const play = make("button", { type: "button", className: "first" });
const moment = make("input", { type: "range", min: 0, max: 100, step: 1, autocomplete: "off" });
const says = make("p", { className: "says" });
const controls = Object.fromEntries(Object.keys(PLAIN).map((name) => [name, control(name)]));

function control(name) {
  const choice = name === "model", values = CHOICES[name], id = `front-${name}`;
  const input = choice
    ? make("select", { id, autocomplete: "off" }, ...values.map((value) => new Option(value, value)))
    : make("input", { id, type: "range", min: 0, max: values.length - 1, step: 1, autocomplete: "off" });
  const output = make("output", {}), label = make("label", { htmlFor: id, textContent: LABELS[name] });
  input.addEventListener("input", () => happens("set", { name, value: choice ? input.value : values[input.value] }));
  const row = make("div", { className: "control", hidden: true }, label, input, ...(choice ? [] : [output]));
  return Object.assign(row, { input, output });
}

play.addEventListener("click", () => {
  if (tale.open.includes(tale.scene)) happens("pressed");
  else questions[tale.scene].open = true;
});
moment.setAttribute("aria-label", "moment of the picture");
moment.addEventListener("input", () => happens("moved", { time: Number(moment.value) / 100 }));
says.setAttribute("aria-live", "polite");
const row = make("div", { className: "row" }, play, moment);
figure.querySelector(".controls").append(row, ...Object.values(controls), says);
figure.querySelector(".controls").hidden = false;

// --- the text: its sections, and its questions

const sections = SCENES.map(({ heading }) => heading && document.getElementById(heading).closest("section"));
const questions = {};

SCENES.forEach(({ name }, k) => {
  const answer = sections[k]?.querySelector("details");
  if (answer && ask(answer, () => happens("answered", { scene: name }))) questions[name] = answer;
});

// --- pinned: the object stands beside the text, or above it where the window is narrow

const whole = figure.closest("section"), end = sections.at(-1).nextSibling;
const [opening, telling] = [make("div", { className: "opening" }), make("div", { className: "telling" })];
const pinned = make("div", { className: "pinned" }, opening, telling);
while (whole.firstChild !== figure) opening.append(whole.firstChild);
while (figure.nextSibling !== end) telling.append(figure.nextSibling);
whole.prepend(pinned);
telling.before(figure);

function look() {
  const box = figure.getBoundingClientRect(), beside = box.left > telling.getBoundingClientRect().left + 40;
  document.documentElement.style.setProperty("--board", beside ? "0px" : `${Math.round(box.height)}px`);
  const line = beside ? innerHeight * 0.55 : box.bottom + (innerHeight - box.bottom) * 0.5;
  const tops = sections.map((section) => (section ? section.getBoundingClientRect().top : -Infinity));
  happens("scrolled", { scene: sceneAt(tops, line) });
}

svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
addEventListener("scroll", look, { passive: true });
addEventListener("resize", look);
draw();
look();
if (tale.running) requestAnimationFrame(passes);
