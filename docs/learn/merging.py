"""What "Merging, and four bits" asserts and shows; the names are the page's own."""

import inspect
import re

import pictures
from pages import ROOT, picture, recording, says, shown

# %% One weight again

assert np.allclose(merged(x), layer(x), atol=1e-5)

# %% Taken out again

randn = np.random.default_rng(1).standard_normal
assert 0.08 < np.linalg.norm(0.05 * randn((96, 4)) @ randn((4, 96)) / 96**0.5) / np.linalg.norm(start) < 0.12
says("Here $d$ is a tenth as large as the weight")
for once, hundred, thousand in drifts.values():
    assert 5 < hundred / once < 20 and 2 < thousand / hundred < 5

# %% Sixteen numbers

from minilora.language.memory import LLAMA_2_7B, training_memory
from minilora.layers.nf4 import code_book

assert np.abs(levels - NF4).max() < 2e-7 and np.abs(np.array(code_book()) - levels).max() < 1e-15
weights = training_memory(LLAMA_2_7B, tokens=1)["weights"]  # bytes, two a weight
says(f"A model of {weights / 2 / 1e9:.0f} billion weights takes {weights / 1e9:.1f} GB in 16 bits")
count, positive, negative = NF4.size, (NF4 > 0).sum(), (NF4 < 0).sum()
assert count == len({*NF4}) == 16 == 2**4
says("if a weight has only sixteen numbers to choose from", "## Sixteen numbers", "# 11. Merging, and four bits")
says("keeps the frozen weights in four bits each, and", "as usual. Four bits tell")
says(
    f"tell {2**4} numbers apart. Which {count}?", f"one of the {count} numbers, since", f"not the best {count} numbers"
)
says(f"That leaves {positive} above 0 and {negative} below")
says(f"With {positive} on either side there would be {2 * positive} levels and none at 0")
says(f"with {negative} on either side and 0 there are {2 * negative + 1}", f"= {p_1:.7f}$")

blocks = np.random.default_rng(0).standard_normal((512, 64))
largest = np.abs(blocks).max(axis=1, keepdims=True)


def error(levels):
    """Return which part of normally distributed weights is lost when each becomes its block's nearest level."""
    nearest = levels[np.abs((blocks / largest)[..., None] - levels).argmin(axis=-1)]
    return np.linalg.norm(nearest * largest - blocks) / np.linalg.norm(blocks)


says(
    f"in blocks of 64 they lose {error(levels):.1%}; 16 levels at even steps lose {error(np.linspace(-1, 1, 16)):.1%}."
)
grid, end = np.linspace(-1.4, 1.4, 113), largest.mean()  # where a block's largest weight usually is
figure = pictures.new_figure(5.2, 2.9)
axes = figure.subplots()
axes.plot(grid, np.exp(-((grid * end) ** 2) / 2), color=pictures.INK)
axes.vlines(levels, 0, np.exp(-((levels * end) ** 2) / 2), color=pictures.LORA_COLOR)
axes.set(xlabel="weight, divided by the largest of its block", yticks=[])
alt = "A bell curve with 16 vertical lines under it, the levels of NF4: close together in the middle, where most weights are, "
picture("levels", pictures.show(figure, alt + "and far apart at the ends."))

# %% A block by hand

from minilora import dequantize_nf4, quantize_nf4

assert len(w) == 8
says("Here is a block of eight:")
packed, absmax = quantize_nf4(np.append(w, np.zeros(24)).astype("float32"), block_size=32)
assert (packed[:4] == 16 * codes[0::2] + codes[1::2]).all()
assert np.allclose(dequantize_nf4(packed, absmax, (32,), block_size=32)[:8], a * NF4[codes], rtol=1e-6)
size = inspect.signature(quantize_nf4).parameters["block_size"].default
says(f"from \u2212{-NF4.min():g} to {NF4.max():g}. So each block of {size} weights has a scale")
says("[Four bits](../library/four-bits.md) has those scales")
says(f"A weight costs 4 bits and its part of the scale, in all {4 + 8 / size + 32 / (size * 256):.3f} bits")

# %% What trains beside it

recorded = recording("four-bits")["smollm2"]
ends = {name: list(run["held out"].values())[-1] for name, run in list(recorded["runs"].items())[:2]}
rows = [
    (name, f"{recorded['MB'][form]:.0f}", f"{recorded['before'][form]:.3f}", f"{end:.3f}")
    for (name, end), form in zip(ends.items(), ("float32", "NF4"), strict=True)
]
shown("trained", pictures.table(["", "weights, MB", "before", "after 80 steps"], rows))
behind = recorded["before"]["NF4"] - recorded["before"]["float32"], ends["QLoRA, over NF4"] - ends["LoRA over float32"]
assert 0 < behind[1] < behind[0] / 2
(rank,) = {*re.findall(r"rank=(\d+)", (ROOT / "examples" / "measure" / "four_bits.py").read_text(encoding="utf-8"))}
says(f"{recorded['settings']['epochs']} steps at rank {rank}, over its weights", f"A code is one of {count}, so")
says("which stay in 16 or 32 bits", "Four bits begin behind, and the adapter takes back most of it.")

# %% What merging loses

import gguf

from minilora.language.files.gguf import decode

by_gguf = decode("Q8_0", gguf.quants.quantize(W, gguf.GGMLQuantizationType.Q8_0))  # it multiplies by 1 / scale
assert (q8_0(W) == by_gguf).mean() > 0.9999 and np.abs(q8_0(W) - by_gguf).max() < 1.01 * np.abs(W).max() / 127
bits = {}
for form, beside in (("Q4_1", 4), ("Q8_0", 2)):  # bytes of a block that are its scale, and its lowest value
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]]
    bits[form] = (size - beside) * 8 / weights
assert bits == {"Q4_1": 4, "Q8_0": 8}
says("come from a file of four bits, Q4_1, so", "in bfloat16, in eight bits, and in NF4?")
entry = np.float16(0.3)
assert np.float16(entry + 0.49 * np.spacing(entry)) == entry != np.float16(entry + 0.51 * np.spacing(entry))
says("moves by less than half a step goes back")
says(
    f"add a change of rank {np.linalg.matrix_rank(change)}, and round",
    "the noise of 16 bits or of Q8_0 does not change",
)
says(f"of one model of {recorded['MB']['float32'] / 4:.0f} million weights")
at = sizes.index(0.01)
assert kept["bfloat16"][at] > 0.998 and kept["Q8_0"][at] > 0.97 and kept["NF4"][at] < 0.03
assert 0.14 < noise["bfloat16"][at] < 0.19 and 0.45 < noise["Q8_0"][at] < 0.6
says(
    "left of a change that is a hundredth as large as its weight",
    "Of a change that is a hundredth of the weight bfloat16",
)
says("keep nearly all, with a noise of a sixth and of half its size", "its change is about a hundredth of the weights")
merging = recorded["merging"]
for name, row in merging.items():
    assert (abs(row["merged"] - row["apart"]) < 0.002) == (name != "NF4")
assert 0.14 < merging["bfloat16"]["lost"] < 0.19 and 0.45 < merging["Q8_0"]["lost"] < 0.6
gain, left = (merging["NF4"]["before"] - merging["NF4"][key] for key in ("apart", "merged"))
assert left < 0.1 * gain and round(recorded["change of weight"], 2) == 0.01
says("Merging into four bits loses nearly all of the adapter's gain")
shown(
    "merged",
    pictures.table(
        ["weights in", "noise and what is not kept", "loss: the base", "the adapter beside it", "merged"],
        [
            (name, f"{row['lost']:.0%}", f"{row['before']:.3f}", f"{row['apart']:.3f}", f"{row['merged']:.3f}")
            for name, row in merging.items()
        ],
    ),
)

# %% Do you remember?

says("A change is a hundredth of its weight", "keeps it, with noise of a sixth of its size")
says(f"outermost quantile lie at {p_1:.4f}?", "as if $n$ were 16, the other as if 15.")
says(f"the mean of {1 - 1 / (2 * 16):.5f} and {1 - 1 / (2 * 15):.5f}.")
