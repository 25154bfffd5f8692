"""What four-bits.md asserts and shows; the names are the page's own."""

import re
from pathlib import Path

import pictures
from pages import holds, recording, says, shown

from minilora.language.files.gguf import BYTES, GGUF_BLOCK
from minilora.language.memory import count_numbers
from minilora.layers.nf4 import SCALES_IN_A_BLOCK, scale_book

# %% Which sixteen numbers

says(
    f"each would have {100 / len(NF4):.2f} % of the weights",
    f"blocks of {blocks.shape[1]} normally distributed weights",
)
assert (np.abs(scaled).max(axis=1) == 1).all()
says("the largest weight of each block is 1 or −1, so")
assert 0.016 < share.min() < 0.019 and 0.09 < share.max() < 0.094

# %% The bytes

assert (packed[:4] == 16 * codes[0::2] + codes[1::2]).all() and (packed[4:] == 0x77).all()
assert (dequantize_nf4(packed, absmax, (32,), block_size=32)[:8] == a * NF4[codes]).all()

try:
    quantize_nf4(w, block_size=16)
except ValueError as error:
    (least,) = re.findall(r"at least (\d+)", str(error))
says(
    f"A block needs {least} weights or more, so ours is padded with zeros, whose code is {np.flatnonzero(NF4 == 0)[0]}:"
)

# %% Scales of scales

size, wide, book = layer.block_size, 8 * layer.nested_absmax.itemsize, scale_book()
assert size == 2 * wide
says(
    f"A scale of {wide} bits for {size} weights is half a bit per weight.",
    f"to {8 * layer.absmax.itemsize} bits, in blocks $B$ of {SCALES_IN_A_BLOCK}.",
    f"The {len(book)} numbers $d_k$ are 0, 1, and for seven powers of ten 1, 2, 4 … {2**6} numbers of either sign",
    f"saves {wide / size - (bits - 4):.2f} bits per weight",
)
assert (book == 0).sum() == (book == 1).sum() == 1
for i in range(7):
    top = np.float32(10.0 ** (i - 6))
    assert all(((top / 10 < x) & (x < top)).sum() == 2**i for x in (book, -book))
# Facts from elsewhere: the paper's own name for them.
says("an 8-bit float")
assert bits == 4 + 8 / 64 + 32 / (64 * 256)

# %% What is dequantised, and when

says(
    f"A code is one of {len(NF4)}, so",
    "as a whole is never in {} or {} bits".format(*(np.finfo(t).bits for t in ("e", "f"))),
)
own = np.random.default_rng(1)
b = own.standard_normal(5)
biased = QuantizedLinear.from_linear(Linear(own.standard_normal((5, 64)), b))
rows, slopes = own.standard_normal((7, 64)), own.standard_normal((7, 5))
out, back = biased.forward(rows)
holds(r"y = x W^\top", x=rows, y=out, W=biased.weight, b=b, dy=slopes, dx=biased.backward(slopes, back)[0])
whole = layer.dequantize()
expected, cache = whole.forward(x)
assert (expected == y).all() and (whole.backward(dy, cache)[0] == dx).all()

# %% A model, and its memory

recorded = recording("four-bits")["smollm2"]
script = Path("examples/measure/four_bits.py").read_text(encoding="utf-8")
(held,) = re.findall(r'"--held-out", type=int, default=(\d+)', script)
(length,) = re.findall(r"windows\(ids, (\d+)\)", script)
(rank,) = {*re.findall(r"rank=(\d+)", script)}
steps, windows = recorded["settings"]["epochs"], recorded["settings"]["batch_size"]
says(
    f"the loss on {held} held-out windows.",
    f"It trains at rank {rank}, {steps} steps of {windows} windows of {length} tokens",
    f"The linear layers take {recorded['linear layers']:.3f} of their bytes",
    f"of a {sum(count_numbers(LLAMA_2_7B)) / 1e9:.0f}B model take, in 16 bits and in four:",
)
*ours, peer = (run["held out"] for run in recorded["runs"].values())
lora, qlora = (list(losses.values())[-1] for losses in ours)
step = recorded["step"]
rows = [
    (
        name,
        f"{recorded['MB'][form]:.0f}",
        f"{recorded['before'][form]:.3f}",
        f"{end:.3f}",
        f"{took / step['LoRA over float32']:.3g}",
    )
    for (name, form), end, took in zip(
        {"LoRA over float32": "float32", "QLoRA over NF4": "NF4"}.items(), (lora, qlora), step.values(), strict=True
    )
]
rows.append(("QLoRA by transformers, bitsandbytes and PEFT", "", "", f"{peer:.3f}", ""))
shown("runs", pictures.table(["", "weights, MB", "held out before", "after 80 steps", "a step"], rows))
assert abs(qlora - peer) < 0.02 and lora < qlora < lora + 0.2
assert recorded["linear layers"] < 0.16

# %% Merging into four bits

widths = {"bfloat16": 16, "float16": 16, "Q8_0": 8, "NF4": 4}
assert recorded["merging"].keys() == widths.keys()
says("measures it in {} bits, {} and {}.".format(*sorted({*widths.values()}, reverse=True)))

# %% Files, and bases that are in four bits already

# A block of Q4_1: two numbers in float16, and half a byte for each code.
says(
    f"Q4_1: blocks of {GGUF_BLOCK} with a scale and a minimum, and {2 ** (8 * (BYTES['Q4_1'] - 4) // GGUF_BLOCK)} levels"
)

# %% Known mistakes

# Facts from elsewhere: bitsandbytes on GitHub.
says("until its pull request 1549")
