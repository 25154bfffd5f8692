"""What "What LoRA costs" asserts and shows; the names are the page's own."""

from inspect import signature

import costs
import numpy as np
import pictures
import settings
import words
from laboratory import WIDE
from pages import picture, recording, says, shown

from minilora.language.memory import CONSTANTS, count_numbers

# %% 12. What LoRA costs

# Beside Llama-2-7B's layers, at the rank below
assert {round(16 * (n_in + m) / (n_in * m), 2) for n_in, m in ((4096, 4096), (4096, 11008))} == {0.01}
says(
    "LoRA trains a hundredth of a layer's numbers. "
    "Does its step take a hundredth of the time? And a hundredth of the memory?",
    "A step saves about a third of its large products",
)

# %% Three large products, or two

SIZES = 128, 1001, 1000
alone, inside = costs.ways(*SIZES, 1), costs.ways(*SIZES, 1, need_dx=True)
large = {name: (way.large(*SIZES), alone[name].large(*SIZES)) for name, way in inside.items()}
assert large == {"full training": (3, 2), "LoRA, the article's module": (5, 3), "LoRA beside its base": (2, 1)}
shown(
    "products",
    pictures.table(
        ["large products a step", "inside a network", "one layer alone"],
        [(name.replace("the article's module", "A and B first"), *count) for name, count in large.items()],
    ),
    exact=True,
)
says(
    "## Three large products, or two",
    "Full training takes three for each layer:",
    "each layer below takes one product in place of three.",
)


ROWS, RANK, WIDTH, WIDTHS = 128, 8, 1024, (256, 512, 1024, 2048, 4096)


def both(width):
    ways = costs.ways(ROWS, width, width, RANK, need_dx=True)
    return ways["full training"], ways["LoRA beside its base"]


parts = [lora.multiply_adds / full.multiply_adds for full, lora in map(both, WIDTHS)]
assert parts == sorted(parts, reverse=True) and parts[-1] > 2 / 3
says(
    f"At width {WIDTH:,}, with {ROWS} rows and rank {RANK}:",
    f"From width {WIDTHS[0]} on, with {ROWS} rows and rank {RANK}, LoRA takes {parts[-1]:.2f} to {parts[0]:.2f} of",
)
full, lora = both(WIDTH)
WHAT = {"multiply_adds": "multiply-adds", "least_bytes": "bytes moved, at least", "optimizer_bytes": "bytes of Adam"}
counts = {what: (getattr(full, name), getattr(lora, name)) for name, what in WHAT.items()}
rows = [(what, *(f"{count / 1e6:,.3g}" for count in of), f"{of[1] / of[0]:.1%}") for what, of in counts.items()]
shown("ledger", pictures.table(["millions a step", "full training", "LoRA", "of it"], rows), exact=True)

# %% A step of a language model

timed = recording("laboratory")["steps"]
d, m, vocabulary, layers = WIDE
rows = [("width", words.GLASSLLM.hidden_size, d)]
for what, name, form in (
    ("weights", "numbers", "{:,}"),
    ("tokens a step", "tokens", "{:,}"),
    ("LoRA's step, of the other", "step", "{:.2f}"),
    ("without Adam", "gradients", "{:.2f}"),
    ("Adam, of the other", "Adam's share of a full step", "{:.0%}"),
):
    rows.append((what, *(form.format(of[name]) for of in timed)))
shown("steps", pictures.table(["a decoder of", *(of["model"] for of in timed)], rows), exact=True)
narrow, wide = timed
assert 0.85 < narrow["step"] < 1.1 and 0.75 < wide["step"] < 0.9 and wide["step"] < wide["gradients"] < 0.92
assert narrow["numbers"] == 852_608 and wide["tokens"] == 1024
assert wide["numbers"] == vocabulary * d + d + layers * (2 * d * d + 2 * 3 * 64 * d + 3 * d * m + 2 * d)
smol = settings.config(settings.FACTS["models"]["SmolLM2-135M"])
assert (smol.hidden_size, smol.intermediate_size) == (d, m) and abs(wide["step"] - 5 / 6) < 0.02
heads = vocabulary * d / wide["numbers"], smol.vocab_size * d / sum(count_numbers(smol))
says(
    f"LoRA has rank {wide['rank']} beside all linear layers;",
    f"At a width of {rows[0][1]} nothing is saved",
    f"At {d} LoRA's step takes about five sixths.",
    f"but six of its {smol.num_hidden_layers} layers and {vocabulary:,} tokens in place of {smol.vocab_size:,}.",
    f"has {100 * heads[0]:.0f} % of the weights; SmolLM2's has {100 * heads[1]:.0f} %.",
)
assert layers == 6

# %% On a GPU

assert all(
    2 / 3 < steps(width, reached)[1] / steps(width, reached)[0] < 1
    for width in (4096, 8192, 16384)
    for reached in (1, 0.65)
)
for width in (4096, 8192, 16384):
    ratio = {
        (reached, again): steps(width, reached, again)[1] / steps(width, reached, again)[0]
        for reached in (1, 0.65)
        for again in (0, 1)
    }
    assert ratio[1, 0] > ratio[0.65, 0] and all(ratio[reached, 1] > ratio[reached, 0] for reached in (1, 0.65))
again = [1 + large[name][0] for name in ("full training", "LoRA beside its base")]  # one more forward
assert again == [4, 3]
says(
    "How much of the third is saved?",
    "it is four large products against three:",
    f"so we also try {100 * reached:.0f} % of it.",
    f"for these {signature(steps).parameters['N'].default:,} tokens:",
)

# %% What a 7B model keeps

tokens = 4 * 1024
ways = {
    "full": training_memory(LLAMA_2_7B, tokens=tokens),
    "full, recomputed": training_memory(LLAMA_2_7B, tokens=tokens, recompute=True),
    "LoRA, 16 bits": training_memory(LLAMA_2_7B, tokens=tokens, rank=16),
    "16 bits, recomputed": training_memory(LLAMA_2_7B, tokens=tokens, rank=16, recompute=True),
    "LoRA, 4 bits": training_memory(LLAMA_2_7B, tokens=tokens, rank=16, bits=4),
    "4 bits, recomputed": training_memory(LLAMA_2_7B, tokens=tokens, rank=16, bits=4, recompute=True),
}
KINDS = {
    "weights": (["weights"], pictures.BASE_COLOR),
    "trained, gradients, Adam": (["trained", "gradients", "Adam"], pictures.LORA_COLOR),
    "activations, logits": (["activations", "logits"], "#9a9a9a"),
}
figure = pictures.new_figure(5.2, 3.6)
axes, left = figure.subplots(), np.zeros(len(ways))
for kind, (parts, colour) in KINDS.items():
    wide = np.array([sum(way[part] for part in parts) / 1e9 for way in ways.values()])
    axes.barh(list(ways), wide, left=left, color=colour, height=0.62, label=kind)
    left += wide
for row, sum_ in enumerate(left):
    axes.annotate(f"{sum_:.3g} GB", (sum_, row), (4, 0), textcoords="offset points", va="center")
for card in (24, 80):
    axes.axvline(card, color=pictures.INK, linewidth=1)
axes.set(xticks=(0, 24, 80), xlabel="GB")
axes.invert_yaxis()
axes.margins(x=0.2)
figure.legend(loc="outside upper center", ncols=3, fontsize=9.5, handlelength=1, columnspacing=1)
bars = "; ".join(f"{name} {sum_:.3g} GB" for name, sum_ in zip(ways, left, strict=True))
caption = f"A step on {tokens:,} tokens; adapters beside all seven matrices of each layer. The lines: what two usual graphics cards hold."
picture("memory", pictures.show(figure, f"Bars in three parts: {bars}.", caption), exact=True)
total = {name: sum(parts.values()) / 1e9 for name, parts in ways.items()}
half, four, half_again, four_again = (
    total[name] for name in ("LoRA, 16 bits", "LoRA, 4 bits", "16 bits, recomputed", "4 bits, recomputed")
)
numbers = {"full": sum(count_numbers(LLAMA_2_7B)), "LoRA, 16 bits": ways["LoRA, 16 bits"]["trained"] // 4}
beside, of_adapter = (
    sum(ways[name][part] for part in ("trained", "gradients", "Adam")) / count for name, count in numbers.items()
)
bits = 8 * ways["full"]["weights"] / numbers["full"]
says(
    f"Full fine-tuning keeps {beside:g} bytes for each weight beside the weight itself. LoRA keeps {of_adapter:g} for each",
    f"in NF4 a weight takes {4 + CONSTANTS[4]:.3f} bits. Embedding, head and norms stay in {bits:g}.",
    f"brings a 7B model from {four:.0f} GB to {four_again:.1f}.",
)
activations = [ways[name]["activations"] for name in ("LoRA, 16 bits", "16 bits, recomputed")]
assert 0.08 < activations[1] / activations[0] < 0.1
says("That saves nine tenths of the activations.")

# %% Do you remember?

card = 12  # GB
assert four_again < card < min(half_again, four)  # one change is not enough
says(
    "Which of a layer's three large products does",
    f"LoRA over {bits:g} bits takes {half:.0f} GB, of which {activations[0] / 1e9:.0f} are activations. You have {card} GB.",
    f"which leaves {half_again:.0f} GB, and keep the base in four bits: {four_again:.1f} GB.",
)
