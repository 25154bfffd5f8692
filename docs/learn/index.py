"""What index.md asserts and shows; the names are the page's own."""

import re
from inspect import signature

import costs
import front
import microlora_runs
import numpy as np
import words
from pages import DOCS, headings, holds, picture, says
from ranks import word
from recordings import RULES

from minilora import NF4, Adam, LoRA, dequantize_nf4, quantize_nf4
from minilora.language.memory import LLAMA_2_7B, count_numbers, training_memory

DRAWN = front.stills(
    layer=["hero", 1],
    rank=["rank", 1, {"products": 4}],
    step=["step", 0.87],
    run=["run", 1],
    alpha=["alpha", 1],
    merge=["merge", 1],
    bits=["bits", 1],
    memory=["memory", 1],
)
picture("front", front.alive(DRAWN.pop("layer")))
for name, svg in DRAWN.items():
    picture(f"front-{name}", front.still(svg), exact=name in ("merge", "memory"))
WORD = word()
strength = np.linalg.svd(WORD, compute_uv=False) ** 2
share = np.cumsum(strength) / strength.sum()  # of the word, in squares, by rank
rows, columns = WORD.shape
titles = {page.stem: headings(page.read_text(encoding="utf-8"))[0][1] for page in (DOCS / "learn").glob("*.md")}
lessons = {stem: title for stem, title in titles.items() if title[0].isdigit()}

# %% 1. LoRA


def needed(**options):
    """Return the gigabytes of a step, by what they are for."""
    return {part: size / 1e9 for part, size in training_memory(LLAMA_2_7B, tokens=TOKENS, **options).items()}


TOKENS, RANK = 4096, 16
full, lora, four, least = (
    needed(**options)
    for options in ({}, {"rank": RANK}, {"rank": RANK, "bits": 4}, {"rank": RANK, "bits": 4, "recompute": True})
)
in_full, in_sixteen, in_four = (f"{sum(parts.values()):.0f}" for parts in (full, lora, four))  # GB
at_least = f"{sum(least.values()):.1f}"
file = f"{2 * lora['Adam'] / 8 * 1000:.0f} MB"  # of an adapter in 16 bits; Adam's two means take eight bytes
says(
    f"Training all of Llama-2-7B takes {in_full} GB",
    "[Learn it](#the-lessons) in twelve lessons, of which this is the first.",
    f"LoRA beside the model in four bits takes **{at_least} GB**, and what you keep is a file of {file}",
)
assert len(lessons) == 12 and lessons["index"].startswith("1. ")

# %% A column times a row
full_rank, d = np.linalg.matrix_rank(WORD), LLAMA_2_7B.hidden_size
assert sum(row.any() for row in WORD) == full_rank == rows - 2
says(
    f"One outer product can have {100 * share[0]:.0f} % of the word",
    f"The word has {rows} rows and {columns} columns.",
    f"\n- 1\n- {full_rank}\n- {rows}\n- {columns}\n",
    f"**{full_rank}**. Seven rows have ink",
    f"With four outer products, {100 * share[4 - 1]:.0f} %",
    f"- *{rows}*: Two rows are empty.\n- *{columns}*: No matrix",
    f"At rank {full_rank}, $A$ and $B$ have {full_rank * (rows + columns)} numbers, more than the {WORD.size} of $W$",
    f"Beside {d} by {d} numbers, {d * d:,}, LoRA of rank 8 trains {8 * (d + d):,}, or {100 * 8 * (d + d) / d**2:.1f} %",
)
letter = WORD[:, :7]
assert len({tuple(row) for row in letter if row.any()}) == 2  # the letter L

# %% The first step
rng = np.random.default_rng(0)
x, dy = rng.standard_normal((6, 28)), rng.standard_normal((6, 9))
for B in (np.zeros((9, 2)), rng.standard_normal((9, 2))):
    adapter = LoRA(rng.standard_normal((2, 28)), B, alpha=4)
    grads = adapter.backward(dy, adapter.forward(x)[1])[1]
    dB, dA, s = grads["lora_B"], grads["lora_A"], adapter.scaling
    holds("dB = s", dB=dB, dA=dA, s=s, dy=dy, x=x, A=adapter.lora_A, B=B)
    assert dA.any() == B.any() and dB.any() and len(grads) == 2
says("LoRA folds it twice:")

# %% Many steps
run = re.search(r"After (\d+) steps at rank 2 the loss is ([\d.]+), and (\d+) %", DRAWN["run"])
steps, loss, learned = run.groups()
assert f"{(1 - share[1]) * (WORD**2).sum() / rows:.2f} {100 * share[1]:.0f}" == f"{loss} {learned}"
says(f"at rank 2, for {steps} steps", f"It stops at {loss}, with {learned} % of the word")

# %% Alpha and the rate


def first_step(alpha, descent=False):
    """Return how far the first step moves the weight."""
    rng = np.random.default_rng(1)
    adapter = LoRA.init(28, 9, rank=2, alpha=alpha, rng=rng, dtype="float64")
    grads = adapter.backward(dy, adapter.forward(x)[1])[1]
    if descent:
        adapter.lora_B[:] -= 0.05 * grads["lora_B"]
    else:
        Adam(adapter.trainable(), lr=0.05).step(grads)
    return np.linalg.norm(adapter.delta())


s, before = map(int, re.search(r"s = (\d+)\. .*? with alpha (\d+) at rank 2 ", DRAWN["alpha"]).groups())
after = s * 2
assert np.isclose(first_step(after) / first_step(before), 2)
assert np.isclose(first_step(after, True) / first_step(before, True), 4)
assert len(RULES) == 3
says(
    f"Alpha goes from {before} to {after}, and",
    "- twice as far\n- four times as far\n",
    "**twice as far**. Adam",
    "*four times as far*: That is right for gradient descent",
    "has all three rules",
)

# %% Merging
rank = 4
thin = rank * (rows + columns)
both = thin + WORD.size
says(
    f"W has {WORD.size} numbers; A and B, of rank {rank}, have {thin}.",
    f"\n- {thin}\n- {WORD.size}\n- {both}\n",
    f"**{WORD.size}**. The sum is",
    f"- *{thin}*: That is A and B alone",
    f"- *{both}*: That is W beside A and B",
)

# %% Four bits
others = front.stills(five=["bits", 1, {"size": 0.05}], ten=["bits", 1, {"size": 0.1}])
merges = r"a change of (\d+) % .*? (\d+) % of it is kept, with a noise of (\d+) %"
three, five, ten = (
    [int(percent) for percent in re.search(merges, svg).groups()] for svg in (DRAWN["bits"], *others.values())
)
block = signature(quantize_nf4).parameters["block_size"].default
assert len(NF4) == 2**4 and three[1] == 0 and five[2] == 2 * five[1] and ten[1] > 100 and ten[2] > 40  # much noise
says(
    "## Four bits\n",
    f"QLoRA stores $W$ in four bits: each number is one of sixteen, times the largest of its block of {block}.",
    f"add a change {three[0]} % as large as W, and store the sum in four bits.",
    "\n- half of it\n- almost nothing\n",
    "The sixteen numbers are far apart. This change is too small to move a number half the way to the next",
    "*half of it*: In this picture",
    "a base in four bits, or merge",
    f"A change of {ten[0]} % comes through",
    f"a change of {five[0]} % keeps {five[1]} %, with twice as much noise",
)
for part, kept in ((0.49, NF4[:-1]), (0.51, NF4[1:])):  # of the way to the next, the largest staying where it is
    moved = np.append(NF4[:-1] + part * np.diff(NF4), 1).astype("float32")
    assert np.allclose(dequantize_nf4(*quantize_nf4(moved), moved.shape)[:-1], kept)

# %% The memory of your model
numbers = sum(count_numbers(LLAMA_2_7B)) / 1e9
kept, trained = (round(8 * full[part] / numbers) for part in ("weights", "trained"))  # bits
assert (kept, 8 * full["gradients"] / numbers) == (16, 16) and full["Adam"] == 2 * full["trained"]
most = full["trained"] + full["gradients"] + full["Adam"]
assert most > sum(full.values()) / 2 and four["activations"] > sum(four.values()) / 2
half = int(in_full) // 2
says(
    f"or merge into {kept}:",
    f"In {kept} bits each number of a model takes two bytes.",
    f"itself in {trained} bits, a gradient, and Adam's two means",
    f"The picture counts Llama-2-7B, {TOKENS:,} [tokens](glossary.md#token) a step, with rank {RANK} beside",
    f"Training everything takes {in_full} GB. What",
    f"\n- {half} GB\n- {in_sixteen} GB\n- {in_four} GB\n- {at_least} GB\n",
    f"**{at_least} GB**. With $W$ in {kept} bits LoRA takes {in_sixteen} GB, and in four bits {in_four}, "
    f"of which {four['activations']:.0f} are activations.",
    f"on the way back, and {at_least} GB are left.",
    f"- *{half} GB*: More than half is for training W.",
    f"- *{in_sixteen} GB*: That is with W in {kept} bits.\n- *{in_four} GB*: That is with W in four bits.",
)
for told in (
    f"{in_full} GB",
    f"LoRA, rank {RANK}: {in_sixteen} GB",
    f"W in four bits: {in_four} GB",
    f"recomputed: {at_least} GB",
    f"file: {file}",
):
    assert told in DRAWN["memory"]

ways = costs.ways(128, 1001, 1000, 1, need_dx=True)
assert [ways[name].large(128, 1001, 1000) for name in ("full training", "LoRA beside its base")] == [3, 2]
says("[one of three large products](cost.md)")

# Facts from elsewhere: Biderman et al. 2024, https://arxiv.org/abs/2405.09673
says("such as 20 billion tokens of code")

# %% What to set first
says(
    "([three rules](choosing.md#alpha-and-s-times-the-rate))",
    f"In our small model such adapters had {words.percent(words.enough())} of what full fine-tuning gains",
    f"For {min(words.sizes())} to {max(words.sizes())} billion weights begin at {words.start():.4f} with $s = {words.SCALING:g}$.",
)

# %% In Python
assert evaluate(merged, X, Y) < 1e-3
assert sum(p.size for p in layer.trainable().values()) == 180 and base.weight.size == 8000
mistakes = (DOCS / "_static" / "live" / "mistakes.js").read_text(encoding="utf-8")
assert mistakes[mistakes.index("MISTAKES = {") : mistakes.index("\n};")].count("label:") == 5
says("switch five mistakes on")

# %% The lessons
listed = re.findall(r"^(\d+)\. \[.*?\]\((.*?)\.md\)", (DOCS / "learn" / "index.md").read_text(encoding="utf-8"), re.M)
assert len(listed) == len(lessons) and all(lessons[stem].startswith(f"{number}. ") for number, stem in listed)
says(f"11. [{lessons['merging'][4:]}](merging.md)")
says(f"LoRA in {len(microlora_runs.FILE.read_text().splitlines())} lines of plain Python")
