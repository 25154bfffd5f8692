// Questions that the page grades. Each form.question has its question, its verdict and, as JSON, what
// minilora.exercises judges an answer by: the build ran the experiment. Nothing is asked of a server.
"use strict";

// As minilora/exercises/questions.py has it.
function verdict(sheet, guess, earlier) {
  const off = (value) => {  // in tolerances
    if (typeof guess === "string" || typeof value === "string") return guess === value ? 0 : Infinity;
    return Math.abs(guess - value) / Math.max(sheet.tolerance * Math.abs(value), sheet.zero);
  };
  if (off(sheet.answer) <= 1) return { right: true, says: sheet.right };
  const near = sheet.known.reduce((best, pair) => (off(pair[0]) < off(best[0]) ? pair : best));
  return { right: false, says: `Not yet. ${off(near[0]) <= 1 ? near[1] : sheet.hints[Math.min(earlier, 1)]}` };
}

// What somebody typed: { number }, or { says } where it is none. A keyboard may have a comma and no point, so 0,25 is
// read. 1,000 is not: it could be a thousand or one.
function typed(text) {
  const parts = text.replaceAll("\u2212", "-").split("/").map((part) => part.trim());
  const grouped = (part) => /^[-+]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?$/.test(part);
  if (parts.some(grouped)) return { says: "Write it without commas." };
  const read = (part) => (part ? Number(part.replace(/^([^.,]*),([^.,]*)$/, "$1.$2")) : NaN);
  const [above, below = 1, ...more] = parts.map(read);
  const number = more.length ? NaN : above / below;
  return Number.isFinite(number) ? { number } : { says: "Write a number, such as 0.25, 1/4 or 3e-4." };
}

function startQuestion(form) {
  const sheet = JSON.parse(form.querySelector("script[type='application/json']").textContent);
  const says = form.querySelector(".verdict");
  let wrong = 0;
  const show = (name, text) => {
    form.dataset.verdict = name;
    says.textContent = text;
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const written = new FormData(form).get("guess") ?? "";
    const { number, says: unread } = sheet.choices.length ? {} : typed(written);
    if (unread) return show("unread", unread);
    if (sheet.choices.length && !written) return show("unread", "Choose one of the answers.");
    const { right, says: text } = verdict(sheet, number ?? written, wrong);
    wrong = right ? 0 : wrong + 1;
    show(right ? "right" : "wrong", text);
  });
  form.querySelector(".answer").hidden = false;  // now it does something
}

if (typeof document !== "undefined") document.querySelectorAll("form.question:not(.expression)").forEach(startQuestion);
