"""Checks and computed contents of laboratory.md; its parts see the page's own names."""

import re
from itertools import product

import numpy as np
import pictures
import valley
import words
from laboratory import BATCH, LENGTH, STEPS
from pages import picture, recording, says, shown
from recordings import RULES
from words import RANKS, WINDOWS

RECORDING = recording("laboratory")
recorded, earlier = words.laboratory(), words.earlier()
SAID = {"alpha = 2r": r"$\alpha = 2r$", "alpha/sqrt(r)": r"$\alpha = 4$, over $\sqrt r$", "alpha/r": r"$\alpha = 8$"}
HEAD = ["full fine-tuning", "r = 16", "r = 4", "r = 1"]


def span(values, form="{:g}"):
    """Return the range of some values, or their common value."""
    low, high = (form.format(value) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def way(rank, scaling=2.0):
    """Return a rank's method as arguments for the recordings; rank None is full fine-tuning."""
    return {"way": "LoRA", "rank": rank, "scaling": scaling} if rank else {"way": "full"}


picture("valley", valley.chart(recorded))

# %% How it was made

chosen, reported = RECORDING["held out"].values()
least = re.search(r"or more, after (\d+) steps at the earliest, or after (\d+) steps", " ".join(RECORDING["about"]))
says(
    f"glassllm's: {RECORDING['numbers']:,} parameters, {words.GLASSLLM.hidden_size} wide.",
    f"in windows of {LENGTH} tokens: all {WINDOWS[2]}, or the first {WINDOWS[1]} or {WINDOWS[0]} of them.",
    f"A training draws {STEPS} batches of {BATCH} windows,",
    f"adapts all {7 * words.GLASSLLM.num_hidden_layers} linear layers.",
    f"Of these, {chosen} choose the rate",
    f"The other {reported} report the loss,",
    f"after {least[1]} steps at the earliest, or otherwise after {least[2]}.",
)
assert round((chosen + reported) / (chosen + reported + WINDOWS[2]), 2) == 0.1  # one window in ten
[equal] = (rank for rank in RANKS if {rule(rank) for rule in RULES.values()} == {2})
says(f"At rank {equal} each gives $s = 2$.")
assert recorded.moments[-1] == STEPS == int(least[2]) and int(least[1]) in recorded.moments
assert {name: [rule(rank) for rank in RANKS] for name, rule in RULES.items()} == {
    name: list(of.values()) for name, of in RECORDING["scalings"].items()
}
cells = {"full": way(None)} | {f"{SAID['alpha = 2r']}, r = {rank}": way(rank) for rank in (16, 4, 1)}
for name in ("alpha/sqrt(r)", "alpha/r"):
    cells |= {f"{SAID[name]}, r = {rank}": way(rank, RULES[name](rank)) for rank in (16, 1)}
rows = [(name, *(words.say(recorded.best(**of, windows=windows)) for windows in WINDOWS)) for name, of in cells.items()]
shown("made", pictures.table(["best rate", *(f"{windows} windows" for windows in WINDOWS)], rows))
assert {recorded.tried(**of, windows=windows) for of, windows in product(cells.values(), WINDOWS)} == {3}
says(f"There are {len(recorded.points)} trainings. Each of {len(cells) * len(WINDOWS)} cells has three seeds")

# %% The rate

says(
    f"LoRA's best rate is {span(words.rate_ratios())} times that of full fine-tuning (three seeds each).",
    f"Half the best rate, or twice it, loses at most {100 * words.most_lost(recorded, 1 / 2, 2):.0f} % of what training gains",
    f"Another seed moves a loss by about {recorded.spread:.3f} nats.",
    f"Here the model is {words.GLASSLLM.hidden_size} wide",
)

# %% The rule of scaling

rows = [
    (windows, SAID[rule], *(f"{words.say(one.rate)} ({one.moves:g}): {one.loss:.2f}" for one in of))
    for (windows, rule), of in words.scaled().items()
]
shown("rules", pictures.table(["windows", "rule", *(f"r = {rank}" for rank in RANKS)], rows))
times, apart = words.apart()
low, *_, high = RANKS
says(
    f"the rules' best $s$ times the rate agree within a factor of {times:g}, and their losses within {apart:.2f} nats.",
    f"From rank {low} to {high} the best *rate* falls by a factor of {span(words.falls('alpha = 2r'))} under $\\alpha = 2r$, of {span(words.falls('alpha/sqrt(r)'))} under $\\alpha = 4$ over $\\sqrt r$, "
    f"and of {span(words.falls('alpha/r'))} under a fixed alpha;",
)

# %% The length of the text

rows, apart = [], []
for windows in WINDOWS:
    line, ends = [], []
    for rank in (None, 16, 4, 1):
        of = way(rank) | {"windows": windows}
        ends.append(recorded.least(**of))
        share = f" ({100 * recorded.gain(rank, windows=windows):.0f} %)" if rank else ""
        line.append(f"{ends[-1]:.2f}{share}, {span(recorded.seeds(**of, what='step')[recorded.best(**of)])}")
    apart.append(max(ends) - min(ends))
    rows.append((windows, *line))
shown("lengths", pictures.table(["windows", *HEAD], rows))
says(
    ", ".join(
        f"rank {rank} has {span([100 * of for of in shares], '{:.0f}')} %" for rank, shares in words.gains().items()
    )
    + "."
)
says(", ".join(f"{nats:.2f} nats with {windows} windows" for nats, windows in zip(apart, WINDOWS)) + ".")
says(f"{WINDOWS[-1]} windows have {WINDOWS[-1] * LENGTH:,} tokens.")
assert apart == sorted(apart)

# %% Earlier trainings

[length] = {of["steps"] for of, _ in earlier.trainings("full")}
measured = int(re.search(r"the loss on (\d+) held-out windows", RECORDING["earlier"]["about"][0])[1])
says(f"{length} steps of {BATCH} windows without a stop, and {measured} held-out windows")
says(f"and differences of {np.sqrt(2) * earlier.spread:.2f} nats mean nothing.")  # the difference between two seeds
says(f"the same {7 * words.GLASSLLM.num_hidden_layers} matrices train;")

# %% The variants

KINDS = ("LoRA", "LoRA+", "PiSSA", "DoRA", "DoRA, full gradient")
T95 = 2.776  # Student's t for a mean of five
angle = np.arctan(T95 / np.sqrt(4))
says(f"its {100 * np.sin(angle) * (1 + np.cos(angle) ** 2 / 2):.0f} % interval.")
tuned = {}
for kind in KINDS:
    lr = earlier.best(kind, 4, among=(0,))
    tuned[kind] = lr, np.array(earlier.seeds(kind, 4, among=range(5))[lr])
    assert len(tuned[kind][1]) == 5
half = {kind: T95 * losses.std(ddof=1) / np.sqrt(5) for kind, (_, losses) in tuned.items()}
mean = {kind: losses.mean() for kind, (_, losses) in tuned.items()}
rows = [(kind, f"{lr:g}", f"{mean[kind]:.3f} ± {half[kind]:.3f}") for kind, (lr, _) in tuned.items()]
shown("variants", pictures.table(["rank 4", "best rate of four", "held-out loss"], rows))
assert max(abs(mean[kind] - mean["LoRA"]) for kind in ("LoRA+", "PiSSA")) < 0.005 < min(half.values())
doras = [1 - mean[kind] / mean["LoRA"] for kind in ("DoRA", "DoRA, full gradient")]
for kind in ("DoRA", "DoRA, full gradient"):
    assert mean[kind] + half[kind] < mean["LoRA"] - half["LoRA"]
assert abs(mean["DoRA"] - mean["DoRA, full gradient"]) < min(half["DoRA"], half["DoRA, full gradient"])
plus = {run["lr"]: run["ratio"] for run, _ in earlier.trainings("LoRA+", 4)}
at_one = [earlier.seeds(kind, 4, among=(0,))[max(plus)][0] for kind in ("LoRA+", "DoRA")]
outputs, inputs = (128, 64, 64, 128, 341, 341, 128), (128, 128, 128, 128, 128, 128, 341)
magnitudes = sum(outputs) / (4 * sum(outputs + inputs))
says(
    f"DoRA ends {100 * min(doras):.1f} to {100 * max(doras):.1f} % lower",
    f"DoRA also trains {100 * magnitudes:.0f} % more parameters",
    f"at {max(plus):g}, where LoRA+'s B has {max(plus) * plus[max(plus)]:g}, it is {at_one[0] - at_one[1]:.2f} nats behind DoRA.",
)
# Facts from elsewhere: Lee et al. 2026, which the page cites.
says("within 1 to 2 % of LoRA")
