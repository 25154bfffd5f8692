"""``minilora trace``."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import LoRA, Tanh
from minilora.cli import check
from minilora.cli.trace import PAGE_WIDTH, VALUES, beside, numbered, shaped, text
from minilora.verify import trace as tracing
from minilora.verify.trace import Slope, TracedLine, by_pencil, drawn_layer, trace

NAMES = pytest.mark.parametrize("name", check.all_instances())
BLOCKS = ["GIVEN", "FORWARD", "LOSS", "BACKWARD", "SLOPES", "STEP"]


def lines_of(found):
    return [*found.forward, *found.loss, *found.backward, *(line for lines in found.step.values() for line in lines)]


def blocks(out):
    """Return the lines below each head, by its first word."""
    return {block.split()[0]: block.splitlines()[1:] for block in out.split("\n\n")}


def entries(shown):
    """Return the numbers of an array that are shown, behind its shape."""
    return [float(number) for number in re.findall(r"[^ ;]+", re.sub(r"^.*\(.*?\)|\.\.\.", "", shown))]


@NAMES
def test_any_layers_trace_fits_a_hundred_columns(name):
    found = trace(*drawn_layer(check.all_instances()[name]))
    printed = [*text(name, found)]
    assert max(map(len, printed)) <= PAGE_WIDTH
    assert all(line.isascii() and line == line.rstrip() for line in printed)
    words = " ".join("\n".join(printed).split())
    for line in lines_of(found):
        assert f"({line.equation}) {line.code}" in words
        assert f"{line.function}, {line.file}" in words
    heads = [line.split()[0] for line in printed if line[:1].isupper()][1:]
    assert heads == ([*BLOCKS, "The"] if found.step else BLOCKS[:5])


@NAMES
def test_every_layer_of_check_can_be_named(shell, name):
    for typed in (name, name.upper()):
        assert shell("trace --seed 0 --layer", typed).startswith(f"One training step of {name}\n")


def test_values_stand_behind_their_line(shell):
    """Each printed number is that of the record, in the page's order."""
    out, found = blocks(shell("trace")), trace(*by_pencil())
    for phase in ("forward", "loss", "backward"):
        shown = [line[VALUES:] for line in out[phase.upper()] if line[VALUES - 2 : VALUES] == "  " and line[VALUES:]]
        values = [value for line in getattr(found, phase) for value in line.values.values()]
        for cell, value in zip(shown, values, strict=True):
            assert cell.startswith(str(value.shape)) or not value.shape
            assert entries(cell) == pytest.approx(value.ravel().tolist(), rel=1e-3)


def test_the_default_is_the_lesson_by_pencil(shell):
    out = shell("trace")
    assert out.startswith("One training step of LoRALinear\n\nGIVEN\n")
    for line in (
        "\n  x                (3, 2)  1 1; 2 0; 0 3\n",
        "\n  base.weight      (2, 2)  1 0; 2 1\n",
        "\n  adapter.scaling  2\n",
        "(1)   h = x @ self.lora_A.T                             (3, 1)  1; 4; -3",
        "(15)  loss = (error * error).mean()                     12",
        "(3)   dB = rows(dy).T @ rows(h) * self.scaling          (2, 1)  -12; 22",
        "(5)   dA = rows(dh).T @ rows(x)                         (1, 2)  -10 14",
    ):
        assert line in out
    assert out.endswith("The loss was 12, and is 7.01507 after the step.\n")


def test_a_slope_stands_below_its_gradient(shell):
    shown = blocks(shell("trace"))["SLOPES"]
    assert [line.split()[:1] for line in shown[::3]] == [["x"], ["lora_A"], ["lora_B"]]
    for backward, measured, difference in zip(shown[::3], shown[1::3], shown[2::3], strict=True):
        assert entries(backward.partition("backward")[2]) == entries(measured.partition("measured")[2])
        assert [measured.split()[0], difference.split()[0]] == ["measured", "difference"]
        assert set(difference.partition("difference")[2].replace("< ", "<").split()) == {"<1e-12"}
    assert "x (3, 2)       backward            5         -2         -9          8          7         -5" in shown[0]


def test_a_wrong_gradient_shows_in_the_text(monkeypatch, shell):
    right = LoRA.backward

    def wrong(self, *given, **options):
        dx, grads = right(self, *given, **options)
        grads["lora_A"][0, 1] += 0.25
        return dx, grads

    monkeypatch.setattr(LoRA, "backward", wrong)
    (_, _, difference) = blocks(shell("trace"))["SLOPES"][3:6]
    assert difference.replace("< ", "<").split() == ["difference", "<1e-12", "2.5e-01"]


def test_of_a_large_gradient_the_largest_difference_is_told(monkeypatch, shell):
    right = LoRA.backward

    def wrong(self, *given, **options):
        dx, grads = right(self, *given, **options)
        grads["lora_A"][-1, -1] -= 0.5
        return dx, grads

    monkeypatch.setattr(LoRA, "backward", wrong)
    backward, measured, difference = blocks(shell("trace --rank 4"))["SLOPES"][3:6]
    assert backward.endswith("   ...")
    assert measured.endswith("   ...")
    assert difference.endswith("   of all 12: 5.0e-01")
    assert len(entries(backward.partition("backward")[2])) == 4


def test_a_line_that_ran_again_alike_is_printed_once(shell):
    out, found = shell("trace --layer DoRA"), trace(*drawn_layer(check.all_instances()["Linear, DoRA"]))
    assert sum(line.equation == "rs.1" for line in lines_of(found)) > out.count("(rs.1)") == 1
    assert shell("trace --layer Conv1d").count("(conv.1)") == 3  # with other values


def test_json_holds_every_value_whole(shell):
    name = "Embedding, LoRA"
    read, found = (
        json.loads(shell("trace --json --seed 3 --layer", name)),
        trace(*drawn_layer(check.all_instances()[name], seed=3)),
    )
    assert read["layer"] == name
    assert read["losses"] == list(found.losses)
    assert (read["lr"], read["method"]) == (found.lr, found.method)

    def same(record, array):
        if array is None:
            return record is None
        return record["shape"] == [*array.shape] and (np.array(record["values"]) == array).all()

    assert read["given"].keys() == found.given.keys()
    assert all(same(read["given"][key], array) for key, array in found.given.items())
    kept = [
        *read["forward"],
        *read["loss"],
        *read["backward"],
        *(line for lines in read["step"].values() for line in lines),
    ]
    for record, line in zip(kept, lines_of(found), strict=True):
        keys = ("equation", "file", "line", "code", "function", "layer")
        assert [record[key] for key in keys] == [getattr(line, key) for key in keys]
        assert record["values"].keys() == line.values.keys()
        assert all(same(record["values"][key], array) for key, array in line.values.items())
    for record, slope in zip(read["slopes"], found.slopes, strict=True):
        assert record["name"] == slope.name
        assert all(same(record[key], getattr(slope, key)) for key in ("gradient", "measured", "difference"))


def test_a_variants_own_name_stands_for_it_beside_linear(shell):
    assert json.loads(shell("trace --json --layer dora"))["layer"] == "Linear, DoRA"
    assert json.loads(shell("trace --json --layer lora"))["layer"] == "LoRA"


def test_rank_and_seed_say_what_is_drawn(shell):
    first = json.loads(shell("trace --json --rank 2"))["given"]
    assert first["adapter.lora_A"]["shape"] == [2, 3]
    assert first["adapter.scaling"]["values"] == 2
    assert json.loads(shell("trace --json --rank 2 --seed 0"))["given"] == first
    assert json.loads(shell("trace --json --rank 2 --seed 1"))["given"] != first
    assert json.loads(shell("trace --json --layer LoRALinear"))["given"]["adapter.lora_A"]["shape"] == [1, 3]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            "--layer Linea",
            "--layer 'Linea' is not a layer of minilora check; did you mean 'Linear' or 'LoRALinear'?",
        ),
        ("--layer zzz", "--layer 'zzz' is not a layer of minilora check; minilora check prints their names"),
        ("--layer Linear --rank 2", "--rank 2: the layer 'Linear' has no adapter of this rank"),
        ("--layer 'Llama, LoRA' --rank 5", "--rank 5: the layer 'Llama, LoRA' has no adapter of this rank"),
        ("--rank 0", "rank must be at least 1, got 0"),
        ("--rank 101", "rank must be at most 100, got 101"),
        ("--seed -1", "seed must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_traced_is_one_line(shell, typed, said):
    assert shell.refused(f"trace {typed}") == said
    assert shell.out == ""


@given(
    shape=st.lists(st.integers(1, 4), max_size=3),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-9, 1, 1e5, 1e12]),
    room=st.integers(30, 90),
)
def test_the_first_entries_fit_the_room(shape, seed, scale, room):
    array = scale * np.random.default_rng(seed).standard_normal(shape)
    shown = shaped(array, room)
    assert len(shown) <= room
    assert shown.startswith(str(tuple(shape)) if shape else "")
    found, expected = entries(shown), array.ravel()
    assert found == pytest.approx(expected[: len(found)].tolist(), rel=1e-3)
    assert shown.endswith(" ...") == (len(found) < array.size)
    if not shown.endswith(" ..."):
        assert shown.count(";") == (array.size // shape[-1] - 1 if len(shape) > 1 else 0)


def test_entries_that_just_fit_are_shown():
    assert shaped(np.array([1.0, 2.5]), 11) == "(2,)  1 2.5"
    assert shaped(np.array([1.0, 2.5]), 10) == "(2,)   ..."
    assert shaped(np.array([1.0, 2, 3]), 11) == "(3,)  1 ..."
    assert shaped(np.zeros((0, 3)), 60) == "(0, 3)"
    assert shaped(np.array([[3]], "u1"), 60) == "(1, 1)  3"


@pytest.mark.parametrize(("length", "beside_it"), [(49, True), (50, False)])
def test_values_stand_below_a_line_that_is_too_long(length, beside_it):
    line = TracedLine("7", "own.py", 1, "x" * length, "f", "", {"y": np.arange(2.0)})
    place, code, *below = numbered([line], set())
    assert place == "  f, own.py"
    assert code.startswith("    (7)  xxx")
    assert (code if beside_it else below[0]).endswith("  (2,)  0 1")
    assert (code if beside_it else below[0])[VALUES:] == "(2,)  0 1"
    assert len(below) == (not beside_it)


def test_a_line_of_code_wider_than_the_page_is_wrapped():
    line = TracedLine("7", "own.py", 1, "x = " + " + ".join(["yyy"] * 40), "f", "", {})
    _, *code = numbered([line], set())
    assert len(code) == 3
    assert max(map(len, code)) <= PAGE_WIDTH
    assert [len(part) - len(part.lstrip()) for part in code] == [4, 11, 11]
    assert " ".join(" ".join(code).split()) == f"(7) {line.code}"


@pytest.mark.parametrize(("size", "whole"), [(7, True), (8, False)])
def test_slopes_take_the_width_that_there_is(size, whole):
    ones = np.ones(size)
    printed = [*beside(Slope("x", ones, ones, 0 * ones), 9)]
    assert all(("..." in line) == (not whole) for line in printed[:2])
    assert ("of all 8: < 1e-12" in printed[2]) == (not whole)
    assert max(map(len, printed)) == PAGE_WIDTH if whole else PAGE_WIDTH >= max(map(len, printed)) > PAGE_WIDTH - 16


def test_lines_stand_below_the_layer_and_the_function(shell):
    out = blocks(shell("trace"))
    heads = {name: [line for line in block if re.match(r"  \S", line)] for name, block in out.items()}
    lora, linear = "minilora/lora.py", "minilora/linear.py"
    assert heads["FORWARD"] == [
        f"  adapter: LoRA.forward, {lora}",
        f"  base: Linear.forward, {linear}",
        f"  LoRALinear.forward, {lora}",
    ]
    assert heads["LOSS"] == ["  mse, minilora/losses.py"]
    assert heads["STEP"] == [f"  {name}: adam_update, minilora/optim.py" for name in ("lora_A", "lora_B")]
    assert "SLOPES of the loss, measured by complex step, beside what backward returned" in shell("trace")


def test_of_two_results_each_has_its_name(shell):
    out = shell("trace --layer DoRA").splitlines()
    (line,) = (number for number, line in enumerate(out) if "(dora.8)" in line)
    assert [out[line][VALUES:][:10], out[line + 1][VALUES:][:10]] == ["dB (2, 1) ", "dA (1, 3) "]


def test_a_layer_without_numbered_lines_has_its_slopes():
    class Silent(Tanh):
        def forward(self, x):
            return 2 * x, (self, x.shape)

        def backward(self, dy, cache, *, need_dx=True):
            return 2 * dy, {}

    found = trace(Silent(), np.ones((1, 2)), np.zeros((1, 2)))
    assert found.forward == found.backward == []
    assert "  x (1, 2)  backward            4          4" in text("Silent", found)


def test_what_rounding_leaves_of_zero_is_zero():
    assert shaped(np.array([[1.0, -3e-16], [-0.0, 1e-9]]), 60) == "(2, 2)  1 0; 0 1e-09"
    assert shaped(np.array([1e-14, 2e-14]), 60) == "(2,)  1e-14 2e-14"
    assert shaped(np.array([-np.inf, 0.25, np.nan]), 60) == "(3,)  -inf 0.25 nan"
    assert shaped(np.array([1e-13, 1e6]), 60) == "(2,)  0 1e+06"


def test_a_dx_that_nobody_needs_is_none(shell):
    out = blocks(shell("trace --layer 'Embedding, LoRA'"))["BACKWARD"]
    (line,) = (line for line in out if "(6)" in line)
    assert line[VALUES:] == "None"


def test_measured_by_differences_is_said(monkeypatch):
    monkeypatch.setattr(tracing.Slopes, "distrust_complex_step", lambda *given: "why")
    assert "SLOPES of the loss, measured by central differences, beside what backward returned" in text(
        "LoRALinear", trace(*by_pencil())
    )


def test_nothing_that_trains_takes_no_step(shell):
    out = shell("trace --layer Tanh")
    assert "STEP" not in out
    assert list(blocks(out)) == ["One", *BLOCKS[:5]]
