"""What four-bits.md asserts and shows; the names are the page's own."""

from pages import picture, recording, shown

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


import pictures

recorded = recording("four-bits")["smollm2"]
runs = recorded["runs"]
colours = dict(zip(list(runs)[:2], (pictures.BASE, pictures.LORA)))
curves = {}
for name, colour in colours.items():
    losses = runs[name]["held out"]
    before = recorded["before"]["NF4" if "NF4" in name else "float32"]
    curves[name] = ([0, *map(int, losses)], [before, *losses.values()], colour)
picture(
    "four-bits-2",
    pictures.show(
        pictures.lines(curves, points=True, xlabel="step", ylabel="held-out loss, nats a token"),
        "Two falling curves of the held-out loss by step. QLoRA begins above LoRA, and the two come nearer while they train.",
        "The loss on held-out text: LoRA beside the weights in float32, and beside the same weights in NF4.",
    ),
)

step, ends = recorded["step"], []
for run in runs.values():
    found = run["held out"]
    ends.append(list(found.values())[-1] if isinstance(found, dict) else found)
lora, qlora, peer = ends
plain, four = step.values()
shown(
    "four-bits-3",
    pictures.table(
        ["", "weights, MB", "held out before", "after 80 steps", "a step"],
        [
            (
                "LoRA over float32",
                f"{recorded['MB']['float32']:.0f}",
                f"{recorded['before']['float32']:.3f}",
                f"{lora:.3f}",
                "1",
            ),
            (
                "QLoRA over NF4",
                f"{recorded['MB']['NF4']:.0f}",
                f"{recorded['before']['NF4']:.3f}",
                f"{qlora:.3f}",
                f"{four / plain:.2f}",
            ),
            ("QLoRA by transformers, bitsandbytes and PEFT", "", "", f"{peer:.3f}", ""),
        ],
    ),
)

assert abs(qlora - peer) < 0.02 and lora < qlora < lora + 0.2
assert recorded["linear layers"] < 0.16
