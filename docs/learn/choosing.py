"""What "Which rank, which rate" shows of the recorded trainings, and what it says of them."""

import math

import pictures
import valley
import words
from pages import picture, shown
from recordings import RULES
from words import RANKS, WINDOWS

from minilora.language.memory import LLAMA_2_7B

recorded, wide = words.laboratory(), words.earlier()
WHOLE = max(WINDOWS)
SAID = {"alpha = 2r": "alpha = 2r", "alpha/sqrt(r)": "alpha = 4, over the root", "alpha/r": "alpha fixed, 8"}
"""The rules of scaling in the table's words."""
THEN = "" if recorded is wide else " ([earlier trainings](../library/laboratory.md#earlier-trainings))"
"""Beside what only the earlier trainings have, which ran over wide ranges of rates."""


def seeds(counts):
    """Return in words how many seeds some settings have."""
    words = ("no seed", "one seed", "two seeds", "three seeds")
    low, high = words[min(counts)], words[max(counts)]
    return low if low == high else f"{low.partition(' ')[0]} to {high}"


# %% What we measured

if recorded.split:
    made = "in at most 200 steps of 16 windows of 128 tokens"
    compared = (
        "We compare with full fine-tuning, which trains all 852,608 numbers. The *share of the gain* is how far LoRA's loss on "
        "held-out text falls, as a part of how far full fine-tuning's falls, each at its own best rate."
    )
    chosen = "Half of the held-out windows choose the rate and the step to stop at. The other half report the loss."
else:
    made = "in 300 steps of 16 windows of 128 tokens"
    compared = (
        "We compare with training the same 28 matrices themselves; embedding and norms stay frozen in both. So this is not "
        "yet all that full fine-tuning can do. The *share of the gain* is how far LoRA's loss on held-out text falls, as a "
        "part of how far theirs falls, each at its own best rate."
    )
    chosen = (
        "One weakness: the windows that choose the best rate are those whose loss we report. So each least loss is a little "
        "too low, and 0.02 nats mean nothing here."
    )
shown(
    "made",
    f"The small model is glassllm's: 852,608 numbers, 128 wide. It learns Genesis and Exodus {made}, with Adam at a constant "
    f"rate and adapters beside all 28 linear layers. The text is whole, 956 windows, or a part of it, 239 or 60.",
)
shown("compared", compared)
shown("chosen", chosen + " [The results](../library/laboratory.md) have every training.")
ways = [("full", None), *(("LoRA", rank) for rank in RANKS)]
counts = [recorded.tried(*way, windows=windows) for way in ways for windows in WINDOWS]
shown(
    "seeds",
    f"Best rates and their neighbours have {seeds(counts)}."
    + f" Another seed, that is, another random start and order of windows, moves a loss by about {recorded.spread:.3f} nats."
    * (recorded.spread > 0),
)
assert sum(math.prod(shape) for shape in words.GLASSLLM.shapes().values()) == 852_608

# %% Which rank

gains = words.gains()
shown(
    "gains",
    pictures.table(
        ["windows, tokens", *(f"r = {rank}" for rank in RANKS)],
        [
            (
                f"{windows}, {128 * windows:,}",
                *(f"{gains[rank][at]:.0%} ({words.a_token(rank, windows):.2g})" for rank in RANKS),
            )
            for at, windows in enumerate(WINDOWS)
        ],
    ),
)
found = words.gains_a_token()
figure = pictures.new_figure(5.4, 3.2)
axes = figure.subplots()
for windows, mark in zip(WINDOWS, "o^s", strict=True):
    numbers, shares = zip(*((x, 100 * y) for x, y, _, of in found if of == windows), strict=True)
    axes.plot(numbers, shares, mark, color=pictures.LORA, markersize=6, label=f"{windows} windows")
axes.set(
    xscale="log", xlabel="numbers that train, for each token of the text", ylabel="share of the gain, %", ylim=(55, 103)
)
axes.axvline(1, color=pictures.INK, linewidth=0.8, alpha=0.6)
axes.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
axes.grid(alpha=0.3)
axes.legend(loc="lower right")
points = "; ".join(f"{numbers:.2g}: {share:.0%}" for numbers, share, *_ in found)
picture(
    "share",
    pictures.show(
        figure,
        f"Nine points that rise, three for each length of the text. Numbers for each token and share of the gain: {points}.",
        "The share of the gain against the numbers that train for each token, s = 2, each at its own best rate.",
    ),
)
alike = {}
for numbers, share, *_ in found:
    alike.setdefault(f"{numbers:.1g}", []).append(share)
apart = [max(100 * (max(of) - min(of)) for of in groups) for groups in (alike.values(), words.gains().values())]
assert list(alike) == ["0.08", "0.3", "1", "5", "2e+01"] and apart[0] < apart[1]
shown(
    "diagonal",
    f"Read along the diagonal. With about one number a token an adapter has {words.percent(alike['1'])} of the gain, "
    f"with 0.3 it has {words.percent(alike['0.3'])}, with 0.08 {words.percent(alike['0.08'])}. At equal numbers a token the "
    f"shares differ by at most {apart[0]:.0f} points, at equal rank by up to {apart[1]:.0f}. So what counts is how many "
    f"numbers train *for each token*.",
)
assert round(words.per_rank(LLAMA_2_7B) / 1e6, 1) == 2.5
assert round(8 * words.per_rank(LLAMA_2_7B), -6) == 20_000_000
assert round(20e9 / words.per_rank(LLAMA_2_7B), -3) == 8000

rows = []
for windows in WINDOWS:
    cells = {rank: wide.losses("LoRA", rank, windows=windows) for rank in RANKS}
    common = sorted(set.intersection(*(set(of) for of in cells.values())))
    winners = {lr: min(RANKS, key=lambda rank, lr=lr: cells[rank][lr]) for lr in common}
    in_order = [winners[lr] for lr in common]
    assert in_order == sorted(in_order, reverse=True) and in_order[0] == 16 > in_order[-1]
    last = max(lr for lr, rank in winners.items() if rank == 16)
    first = next(lr for lr, rank in winners.items() if lr > last)
    for lr in (last, first):
        losses = (f"**{cells[rank][lr]:.2f}**" if winners[lr] == rank else f"{cells[rank][lr]:.2f}" for rank in RANKS)
        rows.append((windows, f"{lr:f}".rstrip("0"), *losses))
    ends = [recorded.least("LoRA", rank, windows=windows) for rank in RANKS]
    assert ends == sorted(ends, reverse=True)  # at its own best rate the higher rank ends lower
shown("ranks", pictures.table(["windows", "rate", *(f"loss, r = {rank}" for rank in RANKS)], rows))

# %% Alpha, and s times the rate

scaled = words.scaled()
say = lambda number: f"{number:.7f}".rstrip("0").rstrip(".")
rows = {}
for of in scaled:
    row = rows.setdefault((of.windows, of.rule), [[], []])
    row[0].append(f"{of.scaling:g}")
    row[1].append(f"{say(of.rate)} ({say(of.scaling * of.rate)})")
shown(
    "rules",
    pictures.table(
        ["windows", "rule", "s at r = 1, 4, 16", *(f"r = {rank}" for rank in RANKS)],
        [(windows, SAID[rule], ", ".join(scalings), *bests) for (windows, rule), (scalings, bests) in rows.items()],
    ),
)
compared = [windows for windows in WINDOWS if len({of.rule for of in scaled if of.windows == windows}) > 1]
times, apart = [], []
for windows in compared:
    for rank in RANKS:
        of_rank = [of for of in scaled if (of.windows, of.rank) == (windows, rank)]
        moves, losses = [of.scaling * of.rate for of in of_rank], [of.loss for of in of_rank]
        times.append(max(moves) / min(moves))
        apart.append(max(losses) - min(losses))


known = words.of_rules()
falls = {of: known.best("LoRA", 1, windows=of) / known.best("LoRA", 16, windows=of) for of in known.windows}
texts = "the whole text" if compared == [WHOLE] else f"{('two', 'three')[len(compared) - 2]} lengths of text"
breaks = {
    (rule, rank): wide.breaks("LoRA", rank, windows=WHOLE, scaling=RULES[rule](rank))
    for rule in RULES
    for rank in (4, 16)
}
assert WHOLE in compared and max(times) <= 4 and max(apart) < 0.1 and falls[WHOLE] > 1
steepest = [by for by in falls.values() if by > 1]
elsewhere = [f"{windows} windows" for windows, by in falls.items() if by == 1]
assert len(steepest) + len(elsewhere) == len(falls)
assert breaks["alpha/r", 4] == breaks["alpha/r", 16] == breaks["alpha/sqrt(r)", 16] == breaks["alpha = 2r", 4]
assert breaks["alpha = 2r", 16] < breaks["alpha = 2r", 4]
stays = f", and stays on {' and '.join(elsewhere)}" * bool(elsewhere)
shown(
    "traded",
    f"All three rules ran on {texts}, with {seeds([len(words.shared_seeds())])}. At one rank their best $s$ times the rate lie "
    f"within a factor of {max(times):g} and their least losses within {max(apart):.2f} nats: here a larger $s$ acts like a larger "
    f"rate ([drawn](alpha.md#what-each-rule-does-to-the-best-rate)). Under $\\alpha = 2r$ the best rate falls from rank 1 to 16 "
    f"by a factor of {min(steepest):g} to {max(steepest):g} over the lengths{stays}. *A higher rank breaks at a smaller rate* holds under "
    f"$\\alpha = 2r$ alone{THEN}: rank 4 loses more than half of its gain at {say(breaks['alpha = 2r', 4])}, rank 16 already at "
    f"{say(breaks['alpha = 2r', 16])}. Under the others both do at {say(breaks['alpha/r', 16])}.",
)

picture("valley", valley.chart(recorded))

# %% Which rate

shown(
    "recipes",
    pictures.table(
        ["recipe", "models", "rate", "alpha", "s", "s times rate"],
        [
            (
                f"[{of.name}]({of.source})", of.models, say(round(of.rate, 5)), of.alpha,
                "" if of.scaling is None else f"{of.scaling:g}", "" if of.moves is None else say(round(of.moves, 6)),
            )
            for of in words.RECIPES
        ],
    ),
)  # fmt: skip
own, moves = [of.rate for of in words.RECIPES], [of.moves for of in words.RECIPES if of.moves is not None]
assert (words.start(), words.SCALING) == (0.0001, 2)  # as the page's first table says
shown(
    "spans",
    f"These rates differ by a factor of {max(own) / min(own):.0f}, $s$ times the rate by {max(moves) / min(moves):.0f}: so none "
    f"of them is yours. Begin in the middle of the last column: at $s = 2$ that is {words.start():.4f}. "
    f"Then double the rate while the held-out loss falls, or halve it. In the small model, at "
    f"$s = 2$, half or twice the best rate loses at most {100 * words.most_lost(recorded, 1 / 2, 2):.0f} % of the gain, at each "
    f"rank and length. Four times loses up to {100 * words.most_lost(wide, 4):.0f} %{THEN}. So come from below.",
)
assert words.most_lost(wide, 4) > 1 / 2
ratios = words.rate_ratios()
by_rank = [
    [recorded.best("LoRA", rank, windows=windows) / recorded.best("full", windows=windows) for rank in RANKS]
    for windows in WINDOWS
]
shown(
    "multiples",
    f"In the small model, at $s = 2$, LoRA's best rate is {ratios[0]:g} to {ratios[-1]:g} times that of {recorded.full}"
    + ", and higher at a lower rank" * all(of == sorted(of, reverse=True) for of in by_rank)
    + ".",
)

# %% Batch, epochs, and when to stop

tried = [
    recorded.tried(way, rank, batch=batch) for way, rank in (("full", None), ("LoRA", 16)) for batch in (4, 16, 64)
]
batched, common = (recorded, min(tried)) if all(tried) else (wide, 1)
gaps = [
    batched.least("LoRA", 16, batch=batch, among=range(common))
    - batched.least("full", batch=batch, among=range(common))
    for batch in (4, 16, 64)
]
assert gaps[0] < gaps[-1]
shown(
    "batch",
    f"LoRA loses more from a large batch. On the whole text, at $s = 2$ and {seeds([common])}, rank 16 ends {gaps[0]:.2f} nats "
    f"above {batched.full} with batches of 4 windows, {gaps[1]:.2f} with 16 and {gaps[2]:.2f} with 64, for the same number of "
    f"windows. Schulman et al. found the same in some settings on large models, at all ranks.",
)
if recorded.split:
    stops = {
        windows: max(words.best_steps("LoRA", 16, windows=windows)) * 16 / windows for windows in (min(WINDOWS), WHOLE)
    }
    epochs = (
        f"How often may a text be read? At the best rate, $s = 2$ and rank 16, the loss is least after at most "
        f"{stops[WHOLE]:.0f} passes over the whole text, and after {stops[min(WINDOWS)]:.0f} over its sixteenth."
    )
else:
    for way, rank in (("full", None), ("LoRA", 16)):
        short, whole = (recorded.losses(way, rank, windows=windows) for windows in (min(WINDOWS), WHOLE))
        assert short[min(whole, key=whole.get)] > recorded.before["new"] > min(short.values()) + 0.9
    epochs = (
        "How often may a text be read? The same 4,800 windows are 5 passes over the whole text and 80 over its sixteenth. At "
        "the rate that is best for the whole, rank 16 ends above the untouched model on the sixteenth, and so does training "
        "the matrices. At a smaller rate both gain."
    )
shown("epochs", epochs)
assert best < loss and epoch == best_epoch + patience < 200 and evaluate(adapted, *held_out) == best

# %% When to train all weights

rows, forgot, worse = [], {}, 0
for windows in WINDOWS:
    forgot[windows] = [recorded.forgotten("full", windows=windows)]
    cells = [f"{forgot[windows][0]:.2f}"]
    for rank in reversed(RANKS):
        own, loss = recorded.forgotten("LoRA", rank, windows=windows), recorded.least("LoRA", rank, windows=windows)
        then = recorded.forgotten_in_full(loss, windows=windows)
        worse += own > then.nats
        forgot[windows].append(own)
        cells.append(f"{own:.2f} ({then.nats:.2f}{'' if then.loss == loss else '*'})")
    rows.append((windows, *cells))
shown("forgotten", pictures.table(["windows", recorded.full, *(f"r = {rank}" for rank in reversed(RANKS))], rows))
TEXTS = {60: "the sixteenth", 239: "the quarter", 956: "the whole text"}
less = [TEXTS[windows] for windows in WINDOWS if forgot[windows][0] > max(forgot[windows][1:])]
more = [TEXTS[windows] for windows in WINDOWS if forgot[windows][0] < min(forgot[windows][1:])]
mixed = [text for text in TEXTS.values() if text not in less + more]
found = [
    f"{said} on {' and '.join(of)}"
    for said, of in (("less", less), ("more", more), ("less or more, by the rank,", mixed))
    if of
]
cases = len(WINDOWS) * len(RANKS)
way, star = "on its way, at its best rate", "where it begins or ends"
if not recorded.split:
    way, star = "at a smaller rate", "at its smallest rate, already better"
shown(
    "forgetting",
    f"Each number says how much less likely the model finds text of its own, written before, in nats a token, each way at its "
    f"best rate. In brackets: {recorded.full} {way}, where it is *as good on the new text* as that adapter (with a star: "
    f"{star}). LoRA forgets {', '.join(found)}. It also learns less. At equal loss on the new text it forgets more in "
    f"{'all' if worse == cases else worse} of {cases} cases.".replace(f"all of {cases} cases", "all cases"),
)
assert worse > cases / 2

# %% Do you remember?

assert round(50e6 / words.per_rank(LLAMA_2_7B)) == 20
assert (16 / 64 * 2e-4, 2 * 3e-4) == (5e-5, 6e-4) and round(6e-4 / 5e-5) == 12
