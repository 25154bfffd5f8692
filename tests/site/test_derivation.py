"""The numbers that the derivation carries by hand, computed again by the library."""

import re
from pathlib import Path

import numpy as np
import pytest

from minilora import Adam, Linear, LoRA, LoRALinear, mse

PAGE = (Path(__file__).parents[2] / "docs" / "learn" / "derivation.md").read_text(encoding="utf-8")
MATRIX = re.compile(r"\\begin\{bmatrix\}(.*?)\\end\{bmatrix\}", re.S)
TEXT = {"y - t": "error", r"A \leftarrow": "A1", r"B \leftarrow": "B1"}
"""What an equation begins with, where that is not the array's name."""


def read_numbers(tex):
    """Yield what a formula states: each name with the last matrix, or the last number, that it is equal to."""
    for part in re.split(r",\s*\\qquad", tex):
        left = re.match(r"\s*(?:\\begin\{aligned\}\s*)?(\w - \w|\w \\leftarrow|\w+)", part)[1]
        matrices = MATRIX.findall(part)
        rows = matrices[-1].split(r"\\") if matrices else [re.search(r"([-\d.]+)\s*$", part)[1]]
        numbers = np.array([[float(entry) for entry in row.split("&")] for row in rows])
        yield TEXT.get(left, left), numbers if matrices else numbers.item()


SECTION = re.search(r"^## By pencil, with numbers$(.*?)^## ", PAGE, re.S | re.M)[1]
STATED = [found for tex in re.findall(r"^\$\$\n(.*?)^\$\$", SECTION, re.S | re.M) for found in read_numbers(tex)]
AFTER = "L1"  # the second loss that the page states
PRINTED = {AFTER if name in dict(STATED[:i]) else name: number for i, (name, number) in enumerate(STATED)}


@pytest.fixture(scope="module")
def computed():
    p = PRINTED
    layer = LoRALinear(Linear(p["W"].copy()), LoRA(p["A"].copy(), p["B"].copy(), alpha=2))
    y, cache = layer.forward(p["x"])
    L, dy = mse(y, p["t"])
    dx, grads = layer.backward(dy, cache)
    h = p["x"] @ p["A"].T
    dh = 2 * dy @ p["B"]
    Adam(layer.trainable(), lr=0.1).step(grads)
    after, _ = mse(layer(p["x"]), p["t"])
    return {
        **{name: p[name] for name in ("x", "W", "A", "B", "t")},
        **{"h": h, "y": y, "error": y - p["t"], "L": L, "dy": dy, "dB": grads["lora_B"], "dh": dh},
        **{"dA": grads["lora_A"], "dx": dx, "A1": layer.adapter.lora_A, "B1": layer.adapter.lora_B, "L1": after},
    }


def test_the_page_prints_every_quantity_of_the_example(computed):
    assert PRINTED.keys() == computed.keys()


@pytest.mark.parametrize("name", PRINTED)
def test_the_printed_number_is_the_computed_one(computed, name):
    assert np.shape(PRINTED[name]) == np.shape(computed[name])
    # Whole numbers are exact; Adam's epsilon moves the last ones by 1e-9, and the last loss is printed to four digits.
    np.testing.assert_allclose(PRINTED[name], computed[name], rtol=0, atol=5e-5 if name == "L1" else 1e-8)


def test_the_example_hides_no_factor(computed):
    """A wrong formula should not give the right numbers: no factor is 0 or 1, no two quantities are alike."""
    p = PRINTED
    s = 2
    assert not np.array_equal(p["dB"] / s, p["dB"])
    for wrong in (p["dh"].T @ p["x"] * s, p["dh"].T @ p["x"] / s):
        assert not np.allclose(wrong, p["dA"])
    assert not np.allclose(p["dy"].T @ p["h"], p["dB"])
    assert all(np.all(p[name] != 0) for name in ("dA", "dB", "dx"))
