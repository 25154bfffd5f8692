"""What laboratory.md shows of the recorded trainings, and says of them, however many there are so far."""

import math
from itertools import product

import numpy as np
import pictures
import valley
import words
from pages import picture, recording, shown
from recordings import RULES
from words import RANKS, WINDOWS

RECORDING = recording("laboratory")
recorded, earlier, source = words.anew(), words.earlier(), words.laboratory()
SAID = {"alpha = 2r": r"$\alpha = 2r$", "alpha/sqrt(r)": r"$\alpha = 4$, over $\sqrt r$", "alpha/r": r"$\alpha = 8$"}
NUMBERS = dict(enumerate(["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]))


def rate(lr):
    return f"{lr:.7f}".rstrip("0")


def span(values, form="{:g}"):
    """Return the range of some values, or the one that they are."""
    low, high = (form.format(value) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def listed(words):
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def percent(shares):
    return span([100 * share for share in shares], "{:.0f}") + " %"


def done(rank, windows, scaling=2.0):
    """Return how many seeds a cell's best rate and its neighbours have; rank None is full fine-tuning."""
    way, of = ("LoRA", {"scaling": scaling}) if rank else ("full", {})
    return recorded.tried(way, rank, windows=windows, **of)


def seeds(counts):
    """Say how many seeds stand behind some cells."""
    low, high = min(counts), max(counts)
    return f"{NUMBERS[high]} seed{'s' * (high > 1)}" if low == high else f"{NUMBERS[low]} to {NUMBERS[high]} seeds"


AT_TWO = [(rank, windows) for windows, rank in product(WINDOWS, (None, *RANKS))]
ready = source is recorded
FULL = source.full
NOTE = f"{seeds([source.tried('LoRA' if rank else 'full', rank, windows=of) for rank, of in AT_TWO])} each" + (
    "" if ready else ", of the [earlier trainings](#earlier-trainings)"
)
PAIRS = [(rank, windows) for windows, rank in product(WINDOWS, RANKS)]

picture("valley", valley.chart(source))

# %% How it was made

assert RECORDING["held out"] == {"choice": 54, "report": 53} and RECORDING["numbers"] == 852_608
assert recorded.moments[-1] == 200 and 60 in recorded.moments
assert {name: [rule(rank) for rank in RANKS] for name, rule in RULES.items()} == {
    name: list(of.values()) for name, of in RECORDING["scalings"].items()
}
cells = [("full", None, 2.0)] + [(SAID["alpha = 2r"] + f", r = {rank}", rank, 2.0) for rank in (16, 4, 1)]
for name in ("alpha/sqrt(r)", "alpha/r"):
    cells += [(f"{SAID[name]}, r = {rank}", rank, RULES[name](rank)) for rank in (16, 1)]
rows, counts = [], []
for name, rank, scaling in cells:
    way, line = ("LoRA", "full")[rank is None], []
    for windows in WINDOWS:
        counts.append(done(rank, windows, scaling))
        losses = recorded.losses(way, rank, windows=windows, scaling=scaling)
        best = rate(recorded.best(way, rank, windows=windows, scaling=scaling)) if counts[-1] else ""
        line.append(f"{best}, {seeds(counts[-1:])}" if best else "searching" if losses else "–")
    rows.append((name, *line))
whole, begun = counts.count(3), sum(count > 0 for count in counts)
state = (
    f"All {len(counts)} cells have three seeds at the best rate and its neighbours."
    if whole == len(counts)
    else f"**The recording is not complete.** Of {len(counts)} cells {begun or 'none'} {'has' if begun == 1 else 'have'} the best rate "
    f"between two worse ones, and {whole or 'none'} of these three seeds each. `python examples/measure/laboratory.py train docs/recordings/laboratory.json` goes on where it stopped."
)
if not ready:
    known = [of for of in PAIRS if done(*of) and done(None, of[1])]
    shares = listed(
        [f"{100 * recorded.gain(rank, windows=of):.0f} % at rank {rank} with {of} windows" for rank, of in known]
    )
    state += f" At $s = 2$ LoRA has, of what full fine-tuning gains, {shares}." * bool(known)
    state += " Until all twelve at $s = 2$ have a best rate, the sections below show what the [earlier trainings](#earlier-trainings) gave."
shown(
    "made",
    f"So far there are {len(recorded.points)} trainings. {state}\n\n"
    + pictures.table(["best rate", *(f"{windows} windows" for windows in WINDOWS)], rows),
)

# %% The rate

rows, times, parts = [], [], {1 / 2: [], 2.0: [], 4.0: []}
for windows in WINDOWS:
    full, line = source.best("full", windows=windows), []
    for rank in (16, 4, 1):
        best = source.best("LoRA", rank, windows=windows)
        times.append(best / full)
        line.append(f"{rate(best)}, × {best / full:g}")
        for factor, part in source.lost("LoRA", rank, windows=windows).items():
            if factor in parts:
                parts[factor].append(part)
    rows.append((windows, rate(full), *line))
shown("rates", pictures.table(["windows, at s = 2: best rate", FULL, "r = 16", "r = 4", "r = 1"], rows))
said = (
    f"At $s = 2$ LoRA's best rate is {span(times)} times that of {FULL} ({NOTE}). At another $s$ the multiple would be another. Half of the best "
    f"rate, or twice, loses at most {100 * max(parts[1 / 2] + parts[2.0]):.0f} % of what training gains: a search by factors of two is fine enough."
)
if parts[4.0]:
    said += f" Four times the best rate, where it was tried, loses {percent(parts[4.0])}."
if not math.isnan(source.spread):
    said += f" Another seed moves a loss by about {source.spread:.3f} nats."
shown("rates-say", said)

# %% The rule of scaling


def scaled(source, windows, **among):
    """Yield each rule that has all ranks at this length: its name, and {rank: (s, rate, loss)}."""
    for name in source.rules(windows, RANKS):
        found = {}
        for rank in RANKS:
            of = {"windows": windows, "scaling": RULES[name](rank)} | among
            found[rank] = of["scaling"], source.best("LoRA", rank, **of), source.least("LoRA", rank, **of)
        yield name, found


tables = [(str(windows), dict(scaled(recorded, windows))) for windows in WINDOWS if windows in recorded.windows]
compared = [(windows, of) for windows, of in tables if len(of) == 3]
from_earlier = not any(windows == "956" for windows, _ in compared)
if from_earlier:
    compared.append(("956, earlier", dict(scaled(earlier, 956, among=(0,)))))
rows = [
    (windows, SAID[name], *(f"{rate(lr)} ({s * lr:g}): {loss:.2f}" for s, lr, loss in of.values()))
    for windows, rules in compared
    for name, of in rules.items()
]
shown("rules", pictures.table(["windows", "rule", *(f"r = {rank}" for rank in RANKS)], rows))
moves, apart, falls = [], [], {name: [] for name in RULES}
for _, rules in compared:
    for rank in (1, 16):
        of_rank = [of[rank] for of in rules.values()]
        both = [s * lr for s, lr, _ in of_rank]
        moves.append(max(both) / min(both))
        losses = [loss for *_, loss in of_rank]
        apart.append(max(losses) - min(losses))
    for name, of in rules.items():
        falls[name].append(of[1][1] / of[16][1])
missing = [str(windows) for windows in WINDOWS if str(windows) not in [found for found, _ in compared]]
said = (
    f"At one rank, the rules' best $s$ times the rate lie within a factor of {max(moves):g}, and their losses within {max(apart):.2f} nats. "
    f"From rank 1 to 16 the best *rate* falls by a factor of {span(falls['alpha = 2r'])} under $\\alpha = 2r$, of {span(falls['alpha/sqrt(r)'])} over "
    f"the root, and of {span(falls['alpha/r'])} under a fixed alpha; below one, it rises. So a sentence about rank and rate needs its rule."
)
if missing:
    said += f" All three rules are not yet recorded with {listed(missing)} windows."
if from_earlier:
    said += " The rows marked *earlier* are one seed of the [earlier trainings](#earlier-trainings)."
shown("rules-say", said)

# %% The length of the text

rows, apart = [], {}
for windows in WINDOWS:
    line, ends = [], []
    for rank in (None, 16, 4, 1):
        way = "LoRA" if rank else "full"
        ends.append(source.least(way, rank, windows=windows))
        share = f" ({100 * source.gain(rank, windows=windows):.0f} %)" if rank else ""
        steps = ""
        if ready:
            best = source.best(way, rank, windows=windows)
            steps = f", {span(source.seeds(way, rank, windows=windows, what='step')[best])}"
        line.append(f"{ends[-1]:.2f}{share}{steps}")
    apart[windows] = max(ends) - min(ends)
    rows.append((windows, *line))
shown(
    "lengths",
    f"Each way at its own best rate, $s = 2$ ({NOTE}): the loss, and in brackets the share of what {FULL} gains"
    + ("; then the steps until the loss was least.\n\n" if ready else ".\n\n")
    + pictures.table(["windows", FULL, "r = 16", "r = 4", "r = 1"], rows),
)
still = [
    windows
    for windows in WINDOWS
    if ready
    and all(
        min(source.seeds(way, rank, windows=windows, what="step")[source.best(way, rank, windows=windows)])
        == recorded.moments[-1]
        for way, rank in (("full", None), *(("LoRA", rank) for rank in RANKS))
    )
]
gains = {rank: [source.gain(rank, windows=windows) for windows in WINDOWS] for rank in RANKS}
longer = "The longer the text, the more a rank is worth: t" if [*apart.values()] == sorted(apart.values()) else "T"
shown(
    "lengths-say",
    f"Of what {FULL} gains, "
    + ", ".join(f"rank {rank} has {percent(shares)}" for rank, shares in gains.items())
    + f". {longer}he four ways end within "
    + ", ".join(f"{nats:.2f} nats with {windows} windows" for windows, nats in apart.items())
    + "."
    + f" With {listed([str(windows) for windows in still])} windows all of them still learn at the last step."
    * bool(still),
)

# %% Forgetting

rows, more, less = [], [], []
for windows in WINDOWS:
    full = source.forgotten("full", windows=windows)
    line = [f"{full:.2f}"]
    for rank in (16, 4, 1):
        own = source.forgotten("LoRA", rank, windows=windows)
        at = source.losses("LoRA", rank, windows=windows, what=source.chooses)[
            source.best("LoRA", rank, windows=windows)
        ]
        then = source.forgotten_in_full(at, windows=windows)
        more.append(own > then.nats)
        less.append(own < full)
        line.append(f"{own:.2f} ({then.nats:.2f}{'*' * (then.loss < at)})")
    rows.append((windows, *line))
when = (
    "on its way, when its loss on the new text had fallen as far"
    if ready
    else "at a smaller rate, where it is as good on the new text"
)
star = "; with a star, when it was already better" if any("*" in cell for row in rows for cell in row[1:]) else ""
shown(
    "forgotten",
    f"Each way is at its own best rate, $s = 2$ ({NOTE}). In brackets stands what {FULL} had forgotten {when}{star}.\n\n"
    + pictures.table(["windows: forgotten", FULL, "r = 16", "r = 4", "r = 1"], rows),
)
shown(
    "forgotten-say",
    f"Each at its own best rate, LoRA forgets less than {FULL} in {sum(less)} of {len(less)} cells. But there it has also learned less. For the same "
    f"loss on the new text, LoRA forgets more in {sum(more)} of {len(more)}.",
)

# %% The batch

SIZES = (4, 16, 64)
ONE = {"among": (0,), "windows": 956}
batched = {
    "the same matrices": [
        (earlier.best("full", batch=size, **ONE), earlier.least("full", batch=size, **ONE)) for size in SIZES
    ],
    "LoRA, r = 16": [
        (earlier.best("LoRA", 16, batch=size, **ONE), earlier.least("LoRA", 16, batch=size, **ONE)) for size in SIZES
    ],
}
figure = pictures.new_figure(5.6, 3.4)
axes = figure.subplots()
for (name, ends), colour in zip(batched.items(), (pictures.BASE, pictures.LORA), strict=True):
    axes.plot(SIZES, [loss for _, loss in ends], color=colour, marker="o", markersize=4, label=name)
    for size, (lr, loss) in zip(SIZES, ends, strict=True):
        axes.annotate(f"{lr:g}", (size, loss), (0, 6), textcoords="offset points", ha="center")
axes.set(xscale="log", xlabel="windows in a batch", ylabel="held-out loss at the best rate")
axes.set_xticks(SIZES, SIZES)
axes.minorticks_off()
axes.grid(alpha=0.3)
axes.legend()
gaps = [ours - theirs for (_, theirs), (_, ours) in zip(*batched.values(), strict=True)]
assert gaps == sorted(gaps)
told = "; ".join(f"{size} windows {gap:.2f}" for size, gap in zip(SIZES, gaps, strict=True))
picture(
    "batch",
    pictures.show(
        figure,
        f"Two curves over batches of 4, 16 and 64 windows. LoRA's lies above, by {told} nats.",
        "The loss after 4,800 windows, at the best of five rates. The rate stands at each point.",
    ),
)
shown(
    "batch-say",
    f"Every training draws 4,800 windows; a larger batch takes fewer steps, and a larger rate. With $s = 2$, rank 16 ends {gaps[0]:.2f} nats above "
    f"training the same matrices with batches of 4, {gaps[1]:.2f} with 16 and {gaps[2]:.2f} with 64: the larger the batch, the more LoRA loses. Each is "
    f"one seed, and a seed moves a loss by about {earlier.spread:.2f}. So 4 against 64 is clear, and the steps between are not.",
)

# %% The variants

KINDS = ("LoRA", "LoRA+", "PiSSA", "DoRA", "DoRA, full gradient")
T95 = 2.776  # Student's t for a mean of five
tuned = {}
for kind in KINDS:
    lr = earlier.best(kind, 4, among=(0,))
    tuned[kind] = lr, np.array(earlier.seeds(kind, 4, among=range(5))[lr])
    assert len(tuned[kind][1]) == 5
half = {kind: T95 * losses.std(ddof=1) / np.sqrt(5) for kind, (_, losses) in tuned.items()}
mean = {kind: losses.mean() for kind, (_, losses) in tuned.items()}
figure = pictures.new_figure(5.6, 3.2)
axes = figure.subplots()
for place, (kind, (_, losses)) in enumerate(tuned.items()):
    axes.errorbar(mean[kind], place, xerr=half[kind], color=pictures.LORA, capsize=4)
    axes.plot(losses, [place] * 5, "o", color=pictures.INK, markersize=4)
axes.set(
    yticks=range(len(KINDS)), yticklabels=[f"{kind}, {tuned[kind][0]:g}" for kind in KINDS], xlabel="held-out loss"
)
axes.invert_yaxis()
axes.grid(alpha=0.3)
picture(
    "variants",
    pictures.show(
        figure,
        "Five rows of five dots, a row for a variant. The means: "
        + "; ".join(f"{kind} {mean[kind]:.2f}" for kind in KINDS)
        + ".",
        "Rank 4, s = 2, the whole text, each at its own best rate of four, which stands beside its name. A dot is a seed, a bar the 95 % interval of the mean.",
    ),
)
assert max(abs(mean[kind] - mean["LoRA"]) for kind in ("LoRA+", "PiSSA")) < 0.005 < min(half.values())
doras = [1 - mean[kind] / mean["LoRA"] for kind in ("DoRA", "DoRA, full gradient")]
for kind in ("DoRA", "DoRA, full gradient"):
    assert mean[kind] + half[kind] < mean["LoRA"] - half["LoRA"]
assert abs(mean["DoRA"] - mean["DoRA, full gradient"]) < min(half["DoRA"], half["DoRA, full gradient"])
at_one = [earlier.seeds(kind, 4, among=(0,))[0.016][0] for kind in ("LoRA+", "DoRA")]
outputs, inputs = (128, 64, 64, 128, 341, 341, 128), (128, 128, 128, 128, 128, 128, 341)
magnitudes = sum(outputs) / (4 * sum(outputs + inputs))
shown(
    "variants-say",
    f"LoRA, LoRA+ (with $\\lambda = 4$; its rate is A's) and PiSSA end at the same loss: their intervals overlap. DoRA ends "
    f"{100 * min(doras):.1f} to {100 * max(doras):.1f} % lower, more than the seeds explain, and its full gradient does no better than its paper's. At "
    f"this rank DoRA also trains {100 * magnitudes:.0f} % more numbers, the magnitudes. Compared at one rate they look otherwise: at 0.016, where LoRA+'s B has 0.064, it is "
    f"{at_one[0] - at_one[1]:.2f} nats behind DoRA.",
)
