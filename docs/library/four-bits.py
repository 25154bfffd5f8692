"""What four-bits.md asserts and shows; the names are the page's own."""

import pictures
from pages import recording, shown

# %% Which sixteen numbers

assert 0.016 < share.min() < 0.019 and 0.09 < share.max() < 0.094

# %% The bytes

assert (packed[:4] == 16 * codes[0::2] + codes[1::2]).all() and (packed[4:] == 0x77).all()
assert (dequantize_nf4(packed, absmax, (32,), block_size=32)[:8] == a * NF4[codes]).all()

# %% Scales of scales

assert bits == 4 + 8 / 64 + 32 / (64 * 256)

# %% What is dequantised, and when

whole = layer.dequantize()
expected, cache = whole.forward(x)
assert (expected == y).all() and (whole.backward(dy, cache)[0] == dx).all()

# %% A model, and its memory

recorded = recording("four-bits")["smollm2"]
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
