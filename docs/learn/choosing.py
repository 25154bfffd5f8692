"""What "Which rank, which rate" shows of the recorded trainings, and what it says of them."""

import math

import pictures
import valley
import words
from laboratory import BATCH, LENGTH, STEPS
from pages import picture, recording, says, shown
from recordings import RULES, SEEDS
from settings import FACTS
from words import RANKS, WINDOWS, say

from minilora.language.memory import LLAMA_2_7B, MATRICES

recorded, wide = words.laboratory(), words.earlier()
WHOLE = max(WINDOWS)
SAID = {"alpha = 2r": "alpha = 2r", "alpha/sqrt(r)": "alpha = 4, over the root", "alpha/r": "alpha fixed, 8"}
"""The rules of scaling in the table's words."""

# %% 10. Which rank, which rate

says(
    f"else {FACTS['conventions']['peft'][1]}, a habit",  # PEFT's default
    f"{words.start()} at $s = {words.SCALING:g}$, for {min(words.sizes())} to {max(words.sizes())} billion weights",
    f"the small model, $s = 2$, rank {max(RANKS)}, its whole text",
    "a small model, $s = 2$, three lengths of text |",
    "the small model, its whole text, three rules |",
    "held-out text | the small model, $s = 2$, three lengths of text |",
)
assert len(WINDOWS) == len(RULES) == 3

# Facts from elsewhere: Biderman et al. 2024 and Schulman et al. 2025, linked below; https://arxiv.org/abs/2602.04998
says(
    "| Llama-2-7B, Llama 3, Qwen 3 |",
    "| Llama 3, Qwen 3; the small model",
    "at their best rates nine variants end within 1 to 2 % of it",
)

# %% What we measured

numbers = sum(math.prod(shape) for shape in words.GLASSLLM.shapes().values())
layers = len(MATRICES) * words.GLASSLLM.num_hidden_layers
says(
    f"The small model is glassllm's: {numbers:,} numbers, {words.GLASSLLM.hidden_size} wide.",
    f"in at most {STEPS} steps of {BATCH} windows of {LENGTH} tokens",
    f"beside all {layers} linear layers",
    f"The text is whole, {WHOLE} windows, or a part of it, {WINDOWS[1]} or {WINDOWS[0]}.",
    f"which trains all {numbers:,} numbers.",
)
ways = [("full", None), *(("LoRA", rank) for rank in RANKS)]
assert {recorded.tried(*way, windows=windows) for way in ways for windows in WINDOWS} == {3}
says(
    f"have three seeds. Another seed, that is, another random start and order of windows, moves a loss by about {recorded.spread:.3f} nats",
    "Half of the held-out windows choose the rate and the step to stop at. The other half report the loss.",
)
of = recording("laboratory")["held out"]
assert abs(of["choice"] - of["report"]) <= 1  # halves

# %% Which matrices

# Facts from elsewhere: Hu et al. 2021, https://arxiv.org/abs/2106.09685; Biderman et al. 2024; Schulman et al. 2025
says(
    "rank 2 beside its four matrices did at least as well as rank 8 beside any one",
    "in Llama-2-7B ([Biderman et al. 2024](https://arxiv.org/abs/2405.09673)), Llama 3 and Qwen 3 (",
)

# %% Which rank

gains = words.gains()
shown(
    "gains",
    pictures.table(
        ["windows, tokens", *(f"r = {rank}" for rank in RANKS)],
        [
            (
                f"{windows}, {128 * windows:,}",
                *(f"{gains[rank][at]:.0%} ({words.a_token(rank, windows):.2f})" for rank in RANKS),
            )
            for at, windows in enumerate(WINDOWS)
        ],
    ),
    exact=True,
)
found = words.gains_a_token()
alike = {}
for numbers, share, *_ in found:
    alike.setdefault(f"{numbers:.1g}", []).append(share)
apart = [max(100 * (max(of) - min(of)) for of in groups) for groups in (alike.values(), gains.values())]
assert list(alike) == ["0.08", "0.3", "1", "5", "2e+01"] and apart[0] < apart[1]
says(
    f"an adapter has {words.percent(alike['1'])} of the gain, with 0.3 it has {words.percent(alike['0.3'])}, with 0.08 {words.percent(alike['0.08'])}.",
    f"the shares differ by at most {apart[0]:.0f} points, at equal rank by up to {apart[1]:.0f}.",
)
per_rank = words.per_rank(LLAMA_2_7B) / 1e6  # millions
says(
    f"Beside all linear layers of Llama-2-7B rank 8 trains {8 * per_rank:.0f} million numbers",
    f"the rule asks for rank {round(20_000 / per_rank, -3):,.0f}.",
)

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
shown("ranks", pictures.table(["windows", "rate", *(f"loss, r = {rank}" for rank in RANKS)], rows), exact=True)

# Facts from elsewhere: Biderman et al. 2024, https://arxiv.org/abs/2405.09673; Schulman et al. 2025 count the bits
says("half as many could [hold the text]", "On 20 billion tokens of code rank 256 did not reach full fine-tuning")

# %% Alpha, and s times the rate

rows = [
    (windows, SAID[rule], *(f"{say(one.rate)} ({say(one.moves)})" for one in of))
    for (windows, rule), of in words.scaled().items()
]
shown("rules", pictures.table(["windows", "rule", *(f"r = {rank}" for rank in RANKS)], rows), exact=True)
for name, rule in RULES.items():
    assert {recorded.tried("LoRA", r, windows=of, scaling=rule(r)) for r in RANKS for of in WINDOWS} == {3}, name
times, apart = words.apart()
says(
    "has all three rules and what each keeps",
    f"All three rules ran on three lengths of text, with three seeds. At one rank their best $s$ times the rate lie within a factor of {times:g} and their least losses within {apart:.2f} nats",
)
assert len(SEEDS) == 3
falls = words.falls("alpha = 2r")
assert falls[0] == 1
says(
    f"falls from rank 1 to 16 by a factor of {min(falls[1:]):g} to {max(falls[1:]):g} over the lengths, and stays on {WINDOWS[0]} windows."
)
breaks = {
    (rule, rank): wide.breaks("LoRA", rank, windows=WHOLE, scaling=RULES[rule](rank))
    for rule in RULES
    for rank in (4, 16)
}
assert breaks["alpha/r", 4] == breaks["alpha/r", 16] == breaks["alpha/sqrt(r)", 16] == breaks["alpha = 2r", 4]
assert breaks["alpha = 2r", 16] < breaks["alpha = 2r", 4]
says(
    f"rank 4 loses more than half of its gain at {say(breaks['alpha = 2r', 4])}, rank 16 already at {say(breaks['alpha = 2r', 16])}. "
    f"Under the others both do at {say(breaks['alpha/r', 16])}."
)

picture("valley", valley.chart(recorded), exact=True)

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
    exact=True,
)  # fmt: skip
of = FACTS["tinker"]
digit, power = f"{of['rate']:.0e}".split("e")
says(
    f"${digit} \\cdot 10^{{{int(power)}}}\\,({of['width']} / width)^p$ at every rank, "
    f"with $p = {of['power']['Llama']}$ for Llama and ${of['power']['Qwen']}$ for Qwen."
)
own, moves = [of.rate for of in words.RECIPES], [of.moves for of in words.RECIPES if of.moves is not None]
assert (words.start(), words.SCALING) == (0.0001, 2)  # as the page's first table says
says(
    f"These rates differ by a factor of {max(own) / min(own):.0f}, $s$ times the rate by {max(moves) / min(moves):.0f}:",
    f"at $s = 2$ that is {words.start():.4f}.",
    f"half or twice the best rate loses at most {100 * words.most_lost(recorded, 1 / 2, 2):.0f} % of the gain",
    f"Four times loses up to {100 * words.most_lost(wide, 4):.0f} %",
)
ratios = words.rate_ratios()
says(f"at $s = 2$, LoRA's best rate is {ratios[0]:g} to {ratios[-1]:g} times that of full fine-tuning.")

# Facts from elsewhere: Schulman et al. 2025; torchtune's recipes train all of Llama 3 at a rate of 0.00002
tuned = next(recipe for recipe in words.RECIPES if recipe.name == words.TUNE[0])
assert round(tuned.rate / 0.00002) == 15
says(f"Schulman et al. found ten at $\\alpha = 32$, and torchtune takes fifteen at $s = {tuned.scaling:g}$.")

# %% Batch, epochs, and when to stop

gaps = [  # with one seed
    recorded.least("LoRA", 16, batch=batch, among=(0,)) - recorded.least("full", batch=batch, among=(0,))
    for batch in (4, 16, 64)
]
assert gaps == sorted(gaps)
says(
    f"rank 16 ends {gaps[0]:.2f} nats above full fine-tuning with batches of 4 windows, {gaps[1]:.2f} with 16 and {gaps[2]:.2f} with 64, for"
)
stops = [max(words.best_steps("LoRA", 16, windows=windows)) * 16 / windows for windows in (WHOLE, WINDOWS[0])]
says(
    f"and rank 16, the loss is least after at most {stops[0]:.0f} passes over the whole text, and after {stops[1]:.0f} over its sixteenth."
)
assert best < loss and epoch == best_epoch + patience < 200 and evaluate(adapted, *held_out) == best
says("For a number to report, keep a third set.")

# Facts from elsewhere: torchtune's recipes and QLoRA's scripts, `words.TUNE` and `words.QLORA`
says("torchtune has no dropout and 100 steps of warm-up, QLoRA 0.05 to 0.1 and none.")

# %% When to train all weights

rows, forgot, worse = [], {}, 0
for windows in WINDOWS:
    forgot[windows] = [recorded.forgotten("full", windows=windows)]
    cells = [f"{forgot[windows][0]:.2f}"]
    for rank in reversed(RANKS):
        of = {"way": "LoRA", "rank": rank, "windows": windows}
        own, loss = recorded.forgotten(**of), recorded.losses(**of, what="choice")[recorded.best(**of)]
        then = recorded.forgotten_in_full(loss, windows=windows)
        worse += own > then
        forgot[windows].append(own)
        cells.append(f"{own:.2f} ({then:.2f})")
    rows.append((windows, *cells))
shown(
    "forgotten",
    pictures.table(["windows", "full fine-tuning", *(f"r = {rank}" for rank in reversed(RANKS))], rows),
    exact=True,
)
short, quarter, whole = (forgot[windows] for windows in WINDOWS)
assert whole[0] > max(whole[1:]) and short[0] < min(short[1:]) and min(quarter[1:]) < quarter[0] < max(quarter[1:])
assert [round(WHOLE / windows) for windows in WINDOWS] == [16, 4, 1]
says(
    "LoRA forgets less on the whole text, more on the sixteenth, less or more, by the rank, on the quarter.",
    f"forgets more in {worse} of {len(WINDOWS) * len(RANKS)} cases.",
)
assert worse > len(WINDOWS) * len(RANKS) / 2

# %% Other kinds of training

# Facts from elsewhere: Unsloth, `words.UNSLOTH`
says("Unsloth begins at a rate of 0.000005.")

# %% Do you remember?

text = 50  # millions of tokens
need = round(text / per_rank)
says(
    f"Your text has {text} million tokens.",
    f"Rank {need}. Rank 8 trains {8 * per_rank:.0f} million, so each rank {per_rank:.1f} million.",
    f"If you keep $\\alpha = 2r$, alpha becomes {2 * need}.",
)
rank, alpha, rate = (FACTS["qlora"][name] for name in ("rank", "alpha", "rate"))
other = FACTS["torchtune"]["Llama-3.1-8B"][2]
says(
    f"One recipe has rate {say(rate)}, rank {rank} and $\\alpha = {alpha}$, another rate {say(other)} and $\\alpha = 2r$.",
    f"{alpha / rank} · {say(rate)} = {say(alpha / rank * rate)} and 2 · {say(other)} = {say(2 * other)}. The second, twelve times as far.",
    "11. Merging, and four bits",
)
assert round(2 * other / (alpha / rank * rate)) == 12
