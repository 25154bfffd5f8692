"""What index.md asserts and shows; the names are the page's own."""

# %% What it is for
import json
import re
from math import exp

import drawings
import hands
import numpy as np
import pages
import words
from pages import DOCS, RECORDINGS, Drawn, live, picture

from minilora import Linear, LoRALinear

shown = words.texts("language-model.md")
model = json.loads((RECORDINGS / "language-model.json").read_text())["glassllm"]
losses = [float(loss) for loss in re.findall(r"^ +(?:0|300) +(?:2\.897 +)?(\d\.\d{3})", shown[0], re.M)]
assert "852,608 parameters" in shown[0] and "28 layers: 73,696 parameters" in shown[0] and losses == [5.2, 2.989]
assert round(exp(losses[0])) == 181 and round(exp(losses[1])) == 20
assert model["parameters"] == 852_608 and round(73_696 / 852_608, 2) == 0.09

live("index-1", words.beside({"Before": shown[1], "After LoRA": shown[2]}))

# %% Two thin matrices

rng = np.random.default_rng(0)
picture(
    "index-2",
    drawings.beside(LoRALinear.from_linear(Linear.init(128, 128, rng=rng, bias=False), rank=8, alpha=8, rng=rng)),
)

assert 4096 * 4096 == 16_777_216 and 8 * (4096 + 4096) == 65_536 and round(65_536 / 16_777_216, 3) == 0.004

# %% What a rank can learn

picture("index-3", hands.rank_by_outer_products())

# %% Two gradients by pencil

from minilora import LoRA

adapter = LoRA(np.array([[1.0, 1]]), np.array([[1.0], [-1]]), alpha=2)
y, cache = adapter.forward(np.array([[2.0, 1]]))
grads = adapter.backward(np.array([[1.0, -2]]), cache)[1]
assert y.tolist() == [[6, -6]] and grads["lora_B"].tolist() == [[6], [-12]] and grads["lora_A"].tolist() == [[12, 6]]

# %% A layer that trains

live("live-layer", Drawn((DOCS / "_static" / "live" / "live-layer.html").read_text(encoding="utf-8")))

assert evaluate(merged, X, Y) < 1e-3
assert sum(p.size for p in layer.trainable().values()) == 180 and base.weight.size == 8000

# %% Five lines of advice

pages.shown("advice", words.advice())
