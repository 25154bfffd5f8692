// Questions that the page grades. Each form.question has its question, its verdict and, as JSON, what
// minilora.exercises judges an answer by: the build ran the experiment. Nothing is asked of a server. Answers stay in
// this browser, under one name, until they are forgotten.
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

// --- answers that a reload does not lose: by the form's id, what was written and whether it was checked

const keptAnswers = {
  NAME: "minilora.answers",
  all() {
    try {
      return JSON.parse(localStorage.getItem(this.NAME)) ?? {};
    } catch {  // no storage, as in a private window
      return {};
    }
  },
  set(id, answer) {
    try {
      localStorage.setItem(this.NAME, JSON.stringify({ ...this.all(), [id]: answer }));
    } catch { /* the answer is judged all the same */ }
  },
  forget() {
    try {
      localStorage.removeItem(this.NAME);
    } catch { /* there was nothing */ }
  },
};

// A form with an answer: `read` returns what is written, as text, `write` puts it there, and `judge` returns whether it
// is "right", "wrong" or "unread", and what to say to it.
function startAnswer(form, { read, write, judge }) {
  const show = (state, says) => {
    if (state) form.dataset.verdict = state;
    else delete form.dataset.verdict;
    form.querySelector(".verdict").textContent = says;
    document.dispatchEvent(new Event("answered"));
  };
  form.addEventListener("input", () => keptAnswers.set(form.id, { text: read(), checked: false }));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    show(...judge(read()));
    keptAnswers.set(form.id, { text: read(), checked: true });
  });
  document.addEventListener("forgotten", () => {
    form.reset();
    show("", "");
  });
  form.hidden = form.querySelector(".answer").hidden = false;  // now it does something
  const before = keptAnswers.all()[form.id];
  if (!before) return;
  write(before.text);
  if (before.checked) show(...judge(read()));
}

function startQuestion(form) {
  const sheet = JSON.parse(form.querySelector("script[type='application/json']").textContent);
  let wrong = 0;
  startAnswer(form, {
    read: () => new FormData(form).get("guess") ?? "",
    write: (text) => {
      const radio = [...form.querySelectorAll("input[type=radio]")].find(({ value }) => value === text);
      if (radio) radio.checked = true;
      else if (!sheet.choices.length) form.querySelector("input").value = text;
    },
    judge: (written) => {
      const { number, says: unread } = sheet.choices.length ? {} : typed(written);
      if (unread) return ["unread", unread];
      if (sheet.choices.length && !written) return ["unread", "Choose one of the answers."];
      const { right, says } = verdict(sheet, number ?? written, wrong);
      wrong = right ? 0 : wrong + 1;
      return [right ? "right" : "wrong", says];
    },
  });
}

// How many of the page's answers are right, and a way to forget them all.
function startKept(box) {
  const count = () => {
    const forms = [...document.querySelectorAll("form.question")];
    const right = forms.filter((form) => form.dataset.verdict === "right").length;
    box.querySelector("span").textContent = `${right} of ${forms.length} right. Your answers stay in this browser.`;
  };
  box.querySelector("button").addEventListener("click", () => {
    if (!window.confirm("Forget all answers?")) return;
    keptAnswers.forget();
    document.dispatchEvent(new Event("forgotten"));
  });
  document.addEventListener("answered", count);
  count();
  box.hidden = false;
}

if (typeof document !== "undefined") {
  document.querySelectorAll("p.kept-answers").forEach(startKept);
  document.querySelectorAll("form.question:not(.written)").forEach(startQuestion);
}
