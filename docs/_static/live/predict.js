// A prediction is a list of choices above a folded answer. The choices become buttons. Each is answered in the words
// of the answer itself: in bold it has the right choice, and in a list others, each with what is to be said of it.

const text = (element) => element.textContent.trim();

// What to say to a choice.
export function answerTo({ right, remarks }, choice) {
  if (choice === right) return { right: true, says: "Yes." };
  return { right: false, says: `You said ${choice}. ${remarks[choice] ?? ""}`.trim() };
}

// Make buttons of the choices above an answer, and say whether there were some. `answered` runs when one is chosen, and
// when the answer is opened.
export function ask(answer, answered = () => {}) {
  const list = answer.previousElementSibling, right = answer.querySelector("strong");
  if (list?.tagName !== "UL" || !right || ![...list.children].some((item) => text(item) === text(right))) return false;
  const others = [...answer.querySelectorAll("li")].filter((item) => item.querySelector("em"));
  const remarks = others.map((item) => {
    const choice = text(item.querySelector("em"));
    return [choice, text(item).slice(choice.length).replace(/^[:,]\s*/, "")];
  });
  const question = { right: text(right), remarks: Object.fromEntries(remarks) };
  const verdict = Object.assign(document.createElement("p"), { className: "verdict" });
  verdict.setAttribute("role", "status");
  const buttons = [...list.children].map((item) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text(item) });
    button.addEventListener("click", () => {
      for (const other of buttons) {
        delete other.dataset.verdict;
        other.setAttribute("aria-pressed", other === button);
      }
      const { right, says } = answerTo(question, text(item));
      button.dataset.verdict = right ? "right" : "wrong";
      verdict.textContent = says;
      answer.open = true;
      answered();
    });
    return button;
  });
  const group = Object.assign(document.createElement("div"), { className: "choices" });
  group.append(...buttons);
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", "your prediction");
  list.replaceWith(group, verdict);
  answer.addEventListener("toggle", () => answer.open && answered());
  return true;
}
