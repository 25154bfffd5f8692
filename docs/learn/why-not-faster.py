"""What why-not-faster.md asserts and shows; the names are the page's own."""

# %% Three large products, or two
import costs
import pictures
from pages import RECORDINGS, picture, shown

SIZES = 128, 1001, 1000
alone, inside = costs.ways(*SIZES, 1), costs.ways(*SIZES, 1, need_dx=True)
large = {
    name: (costs.large_products(inside[name], *SIZES), costs.large_products(way, *SIZES))
    for name, way in alone.items()
    if name in inside
}
assert large == {"full training": (3, 2), "LoRA, the article's module": (5, 3), "LoRA beside its base": (2, 1)}
shown(
    "why-not-faster-1",
    pictures.table(
        ["large products a step", "inside a network", "one layer alone"],
        [(name.replace("the article's module", "A and B first"), *count) for name, count in large.items()],
    ),
)

import hands

picture("why-not-faster-2", hands.ledger())

ways = hands.spelled()
for width in [w for w in hands.WIDTHS if w >= 256]:
    full, lora = (hands.tally(way, w=width, N=128, r=8) for way in ways.values())
    assert 0.66 < lora["multiply-adds"] / full["multiply-adds"] < 0.735
    assert 0.2 < lora["bytes moved"] / full["bytes moved"] < 0.6

# %% A step of a language model

import json

ADAM = "Adam's share of a full step"
timed = json.loads((RECORDINGS / "laboratory.json").read_text())["steps"]
shown(
    "why-not-faster-3",
    pictures.table(
        [
            "a decoder of the sizes of",
            "weights",
            "tokens a step",
            "LoRA's step, of a full one",
            "without Adam",
            "Adam in a full step",
        ],
        [
            (
                of["model"],
                f"{of['numbers']:,}",
                f"{of['tokens']:,}",
                f"{of['step']:.2f}",
                f"{of['gradients']:.2f}",
                f"{of[ADAM]:.0%}",
            )
            for of in timed
        ],
    ),
)

narrow, wide = timed
assert 0.85 < narrow["step"] < 1.1 and 0.75 < wide["step"] < 0.9 and wide["step"] < wide["gradients"] < 0.92
assert narrow["numbers"] == 852608 and wide["tokens"] == 1024

# %% What a GPU does with thin products

assert 0.8 < own / large < 0.95 and 6 * 2 * N * width * r / (2 * N * width**2) < 0.03
