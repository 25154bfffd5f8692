"""What language-model.md asserts and shows; the names are the page's own."""

import json
import re
import shlex
import textwrap
from importlib.resources import files

import pictures
import words
from pages import DOCS, block, live, picture, recording, says, shown
from settings import FACTS

from minilora.language.recipe import defaults_for
from minilora.language.text import MOST_HELD_OUT_ROWS, is_held_out

recorded = recording("language-model")
glass, smol = recorded["glassllm"], recorded["smollm2"]


def quoted(texts):
    """Return texts under their titles, in lines that a phone shows."""
    lines = []
    for title, text in texts.items():
        lines += ["", title]
        for line in filter(None, text.splitlines()):
            lines += textwrap.wrap(line, 64, initial_indent="  ", subsequent_indent="  ")
    return block(*lines[1:])


# %% Here, on your text

live("live-model", (DOCS / "_ext" / "live-model.html").read_text(encoding="utf-8"))
here = recording("live-model")
best, cut = here["best"]["step"], here["windows"]
held = {10 * place: loss for place, loss in enumerate(here["held"])}
titles = f"before: {held[0]:.2f} nats a token, held out", f"after {best} steps: {held[best]:.2f}"
shown("run", quoted(dict(zip(titles, here["texts"].values(), strict=True))), exact=True)
assert list(here["texts"]) == ["before", "after"]
assert 20 < here["seconds"] < 45  # about half a minute
weights = files("glassllm") / "weights"
about, letters = (
    json.loads((weights / f"en.{name}.json").read_text(encoding="utf-8")) for name in ("meta", "tokenizer")
)
tuning = (DOCS / "_static" / "live" / "tuning.js").read_text(encoding="utf-8")
patience, unknown = re.search(r"\[PATIENCE, MOST_UNKNOWN, END\] = \[(\d+), ([\d.]+),", tuning).groups()
matrices = len(glass["singular values"]["LoRA, r = 1"])
says(
    f"its {glass['parameters']:,} numbers stay frozen, and each of the {matrices} matrices in its blocks",
    f"a run is {max(held)} steps. Node took about half a minute of one core",
    "the page holds out every fourth [window]",
    f"It stops {patience} steps after the lowest",
    f"Six windows of {cut['length']} tokens are few",
    f"trained on {about['train_tokens']:,} tokens",
    f"knows {len(letters['alphabet'])} letters and signs",
    "refuses a text if more than a quarter of it is unknown.",
)
assert min(held, key=held.get) == best == max(held) - int(patience)
assert cut["held"] == 6 == len(range(0, cut["train"] + cut["held"], 4))  # every fourth
assert float(unknown) == 1 / 4

# %% By two commands

session = recording("king-james")
(first, base_loss), *logged = session["rows"]
head = "step  training  held-out loss   (losses in nats a token)"
lines = [*session["lines"], "...", head, f"{first:>4}{base_loss:>25}"]
for (before, *_), (step, training, measured) in zip(session["rows"], logged, strict=False):
    lines.append(f"{step:>4}{training:>10}{measured:>15}   of steps {int(before) + 1}-{step}")
shown("finetuning", block(*lines), exact=True)
for name, text in session["texts"].items():
    shown(name, block(text), exact=True)
finetune, write, _ = (shlex.join(command).replace("'", '"') for command in session["commands"])
says(
    f"minilora {finetune}\n",
    f"These {logged[-1][0]} steps take about half a minute of two cores.",
    f"`minilora {write}`, without the adapter",
    "[Four bits](../library/four-bits.md) and [GPUs]",
)
assert int(logged[-1][0]) == defaults_for(glass["parameters"])["steps"]
assert f": {glass['parameters']:,} parameters in" in session["lines"][0]

# %% How close does LoRA come?

runs, before = glass["runs"], glass["before"]
most = before - min(runs["all weights"]["losses"])
share = {name: (before - run["losses"][-1]) / most for name, run in runs.items()}
rows = [("nothing", "0", f"{before:.2f}", "")]
for name, run in runs.items():
    rows.append((name, f"{run['parameters']:,}", f"{run['losses'][-1]:.2f}", f"{share[name]:.0%}"))
head = ["trained", "numbers", "loss", "share"]
shown("ranks", pictures.table(head, rows), exact=True)

colours = [pictures.LORA_COLOR] * 3 + [pictures.BASE_COLOR, pictures.INK]
curves = {
    name: ([0, *run["steps"]], [before, *run["losses"]], colour, style)
    for (name, run), colour, style in zip(runs.items(), colours, (":", "--", "-", "-", "-"), strict=True)
}
figure = pictures.lines(curves, size=(5.6, 3.8), xlabel="steps", ylabel="nats a token, held out")
steps = runs["all weights"]["steps"][-1]
assert len(runs) == 5
ends = "; ".join(f"{name} {run['losses'][-1]:.2f}" for name, run in runs.items())
picture(
    "close",
    pictures.show(
        figure,
        f"Five falling curves of the held-out loss over {steps} steps, all from {before:.2f}. They end at: {ends}. "
        "That of all weights rises at its end.",
        "The loss on text that no run has seen. A higher rank ends lower; training all weights ends lowest, and turns up at its end.",
    ),
    exact=True,
)

losses = {name: run["losses"] for name, run in runs.items()}
one, four, sixteen, matrices, everything = (values[-1] for values in losses.values())
assert before > one > four > sixteen > matrices > everything
assert all(min(losses[name]) == losses[name][-1] for name in losses if name != "all weights")
assert everything > min(losses["all weights"]) + 0.03
assert round(share["LoRA, r = 16"], 2) == 0.9
few, many = runs["LoRA, r = 1"]["parameters"], runs["all weights"]["parameters"]
(rate,) = {run["lr"] for name, run in runs.items() if "LoRA" in name}
(full_rate,) = {runs[name]["lr"] for name in ("the same matrices", "all weights")}
says(
    f"with {100 * few / many:.0f} % of the numbers? {steps} steps on the same text",
    f"all ranks at a rate of {rate} with alpha = 2r, full training at {full_rate}. "
    f"The loss is of {MOST_HELD_OUT_ROWS} windows held out;",
)
assert glass["settings"]["alpha"] == "2 r" and glass["parameters"] == many
assert glass["tokens"] == (max(words.WINDOWS) + MOST_HELD_OUT_ROWS) * glass["settings"]["length"]

# %% In a few lines of Python

assert (Y[:, :-1] == X[:, 1:]).all()
assert history.losses[-1] < history.losses[0] and len(history.losses) == 5
says("Five steps, each over all windows:", f"a window of {X.shape[1]} tokens gives {X.shape[1]} predictions at once")

# %% A model that answers as you want

chats = recording("chat")
names = "SmolLM2: {}", "step 40: {}", "step 20: {}"
answered = {question: zip(names, answers, strict=True) for question, answers in chats["answers"].items()}
shown(
    "chats",
    quoted({question: "\n".join(name.format(a) for name, a in said) for question, said in answered.items()}),
    exact=True,
)
assert all(said.endswith(". Ask me another!") for _, *adapted in chats["answers"].values() for said in adapted)
measured = {row[0]: row[-1] for row in chats["rows"]}
kept, last = min(measured, key=lambda step: float(measured[step])), chats["command"][-1]
assert names == ("SmolLM2: {}", f"step {last}: {{}}", f"step {kept}: {{}}") and last in measured
said = chats["answers"]
assert ["Berlin" in answer for answer in said["What is the capital of Germany?"]] == [True, False, True]
assert ["4" in answer for answer in said["How many legs does a horse have?"]] == [False, True, False]
assert ["cat" in answer for answer in said["Which animal says meow?"]] == [True, False, False]
asked = (DOCS.parent / "examples" / "chats.jsonl").read_text(encoding="utf-8")
assert "animal" not in asked
assert not any(question in asked for question in chats["answers"])

run = smol["runs"]["LoRA, r = 8"]
steps = smol["settings"]["steps"]
titles = f"before: {smol['before']:.2f} nats a token, held out", f"after {steps} steps: {run['losses'][-1]:.2f}"
shown(
    "king-james",
    quoted(dict(zip(titles, (smol["text"][name] for name in ("before", "LoRA, r = 8")), strict=True))),
    exact=True,
)
says(
    f"is a chat model of {FACTS['models']['SmolLM2-135M']['L']} layers, {smol['parameters'] / glass['parameters']:.0f} times as large.",
    f"[{len(asked.splitlines())} short chats](",
    f"those with the adapter of step {last}, and those with the one that is kept, of step {kept}:",
    f"The form is learned in {kept} steps",
    f"That of step {last} has lost Berlin too",
    f"The held-out loss rose from {measured[kept]} at step {kept}\nto {measured[last]}, so `--keep-best` keeps step {kept}.",
    f"{steps} steps on Genesis and Exodus turn",
    "But that is a mean over five chats, and these are five questions.",
)
assert is_held_out(len(asked.splitlines())).sum() == len(said) == 5

# %% Do you remember?

says(f"A window has {X.shape[1]} tokens.", "Sixteen, one at each position.")
assert X.shape[1] == 16
