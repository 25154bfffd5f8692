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

// What somebody typed, as a number; null where it is none. A keyboard may have a comma and no point.
function numberFrom(text) {
  const plain = text.trim().replace("\u2212", "-").replace(/^([^.,]*),([^.,]*)$/, "$1.$2");
  return plain !== "" && Number.isFinite(Number(plain)) ? Number(plain) : null;
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
    const guess = sheet.choices.length ? written : numberFrom(written);
    if (guess === null) return show("unread", "Write a number, such as 0.25 or 3e-4.");
    if (guess === "") return show("unread", "Choose one of the answers.");
    const { right, says: text } = verdict(sheet, guess, wrong);
    wrong = right ? 0 : wrong + 1;
    show(right ? "right" : "wrong", text);
  });
  form.querySelector(".answer").hidden = false;  // now it does something
}

if (typeof document !== "undefined") document.querySelectorAll("form.question").forEach(startQuestion);
