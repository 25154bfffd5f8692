"""`audit --merged`: right merges by each road, and broken ones, each of which gets its name in the first line.

What is said of the broken ones stands in `merged.json`. ``python -m pytest -m 'not full' tests/audit --approve`` writes
it anew: look at the difference then.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import adapt, quantize, save_adapter
from minilora import adapters as adapters_of
from minilora.audit.auditing import audit
from minilora.files.dtypes import FLOATS
from minilora.files.merge import merge_adapter
from minilora.language import save_llama
from minilora.layer import walk
from minilora.layers.nf4 import dequantize_nf4, quantize_nf4
from minilora.layers.rotary import halves_from_interleaved

from ..support.compare import refused
from ..support.language import tiny_llama
from ..support.sample import one_in
from . import adapters
from .adapters import PREFIX, config, peft, written

R, SCALING, N, M = 8, 3.0, 64, 96
KINDS = {"self_attn.q_proj": (N, N), "self_attn.k_proj": (N, N), "mlp.gate_proj": (M, N), "mlp.up_proj": (M, N)}
LAST = [name.rpartition(".")[2] for name in KINDS]
OTHERS = {"model.embed_tokens.weight": (32, N), "model.norm.weight": (N,), "lm_head.weight": (32, N)}
Q0, UP0 = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


TYPES = ("F32", "BF16", "F16")


@pytest.fixture(params=TYPES)
def dtype(request):
    """The type of the base and of the merged model."""
    return FLOATS[request.param]


of_each_type = pytest.mark.parametrize(
    "dtype", ["BF16", *(pytest.param(name, marks=pytest.mark.long) for name in ("F32", "F16"))], indirect=True
)
"""Where the type has no part in what is found; that a merge is right in each is another test's."""


class World:
    """A base, an adapter, the changes that it makes in float64, and a judge of merged models."""

    def __init__(self, folder, dtype, size=0.1, layers=1, kinds=KINDS, **settings):
        rng = np.random.default_rng(0)
        paths = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in kinds.items()}
        shapes = {f"{path}.weight": shape for path, shape in paths.items()} | OTHERS
        self.folder, self.dtype, self.size = folder, dtype, size
        self.arrays = {name: (0.05 * rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}
        self.base = written(folder / "base", self.arrays)
        self.factors = {name: np.float32(size) * array for name, array in adapters.pairs(paths, R).items()}
        self.adapter = peft(folder / "adapter", self.factors, config(*LAST, r=R, lora_alpha=R * SCALING) | settings)
        self.changes = {path: SCALING * self.product(path) for path in paths}

    def pair(self, path):
        """A and B of a module."""
        return [self.factors[f"{PREFIX}{path}.lora_{part}.weight"] for part in "AB"]

    def product(self, path):
        """B A of a module in float64."""
        A, B = self.pair(path)
        return B.astype("f8") @ A

    def merged(self, change=lambda path, delta: delta, base=None):
        """The base's arrays with the changes, or what is made of them, added in float64 and rounded once."""
        arrays = dict(base or self.arrays)
        for path, delta in self.changes.items():
            W = arrays[f"{path}.weight"]
            arrays[f"{path}.weight"] = (W.astype("f8") + change(path, delta)).astype(W.dtype)
        return arrays

    def judged(self, arrays):
        return judged(self.adapter, self.base, arrays)


def judged(adapter, base, arrays):
    """What audit says of a merged model of these arrays."""
    folder = adapter.parent / "merged"
    folder.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "model.safetensors")
    return audit(adapter, base, merged=folder)


@pytest.fixture
def world(tmp_path, dtype):
    return World(tmp_path, dtype)


# --- right ---


def test_a_right_merge_is_called_right(world, tmp_path, capsys):
    report = world.judged(world.merged())
    said = f"merged: RIGHT: merged correctly (4 of 4 modules, {np.dtype(world.dtype).name}, at most 0.5 ulp"
    assert report.first_line.startswith(said)
    assert report.status == 0
    merge_adapter(world.base, world.adapter, tmp_path / "ours")
    assert audit(world.adapter, world.base, merged=tmp_path / "ours").word == "RIGHT"
    assert capsys.readouterr() == ("", "")  # no bar


OF_TWO_TYPES = [(base, other) for base in TYPES for other in TYPES]


@pytest.mark.parametrize(
    ("dtype", "other"), one_in(2, OF_TWO_TYPES, map(" in ".join, OF_TWO_TYPES)), indirect=["dtype"]
)
def test_a_merge_that_is_stored_in_another_type_is_right(world, other):
    wide = {name: array.astype("f4") for name, array in world.arrays.items()}
    arrays = {name: array.astype(FLOATS[other]) for name, array in world.merged(base=wide).items()}
    assert world.judged(arrays).word == "RIGHT"


def in_one_step(x, digits):
    """float64 rounded to some binary digits, to the nearest, and to the even one of two; for normal numbers."""
    m, e = np.frexp(x)
    return np.ldexp(np.rint(np.ldexp(m, digits)), e - digits)


def over_float32(x, digits):
    """float64 rounded twice, as torch does."""
    return in_one_step(in_one_step(x, 24), digits)


def near_ties(x, digits):
    """Normal numbers near x, each closer to the middle of two neighbours of these digits than float32 can tell."""
    m, e = np.frexp(np.copysign(np.maximum(np.abs(x), 2.0**-10), x))
    side = np.where(np.arange(x.size).reshape(x.shape) % 2, 1, -1)
    return np.ldexp(np.floor(np.ldexp(m, digits)) + 0.5 + side * 2.0**-20, e - digits)


@pytest.mark.parametrize("rounded", [over_float32, in_one_step])
@pytest.mark.parametrize("what", ["the sum", "the base"])
@pytest.mark.parametrize(("half", "digits"), [("BF16", 8), ("F16", 11)])
def test_float64_reaches_a_half_over_float32_or_at_once(tmp_path, half, digits, what, rounded):
    world = World(tmp_path, FLOATS["F64"])
    for name, W in world.arrays.items():
        change = world.changes.get(name.removesuffix(".weight"), 0.0) if what == "the sum" else 0.0
        W[:] = near_ties(W + change, digits) - change
    save_file(world.arrays, world.base / "model.safetensors")
    ways = {way: {name: way(W, digits) for name, W in world.arrays.items()} for way in (over_float32, in_one_step)}
    if what == "the sum":
        ways = {way: {name: way(m, digits) for name, m in world.merged().items()} for way in ways}
    else:
        ways = {way: {n: over_float32(m, digits) for n, m in world.merged(base=ways[way]).items()} for way in ways}
    for name, m in ways[over_float32].items():
        assert np.mean(m != ways[in_one_step][name]) > 0.1  # the two roundings differ in each tensor
    arrays = {name: m.astype("f4").astype(FLOATS[half]) for name, m in ways[rounded].items()}
    assert world.judged(arrays).word == "RIGHT"
    norm = arrays["model.norm.weight"].view("u2")
    norm[0] += 2  # no rounding is off by two steps
    report = world.judged(arrays)
    assert report.word == "WRONG"
    assert "model.norm" in str(report)


def test_nan_of_the_base_itself_is_no_change(tmp_path):
    """In the base's own type, and in a narrower one; a number beside it still counts."""
    world = World(tmp_path, FLOATS["F32"])
    world.arrays["lm_head.weight"][3, 5] = np.nan
    save_file(world.arrays, world.base / "model.safetensors")
    for kind in ("F32", "BF16"):
        arrays = {name: array.astype(FLOATS[kind]) for name, array in world.merged().items()}
        assert world.judged(arrays).word == "RIGHT"
        arrays["lm_head.weight"][0, 0] = 7
        assert "'lm_head.weight'" in world.judged(arrays).found[0].says


ROADS = ("product and change", "B before the product", "change", "factors alone")


@pytest.mark.parametrize(("road", "scaling"), [*((road, 3.0) for road in ROADS), ("change", 1.0)])
def test_a_merge_in_half_precision_may_round_anywhere(tmp_path, road, scaling):
    world = World(tmp_path, FLOATS["BF16"], lora_alpha=R * scaling)
    arrays, s = dict(world.arrays), np.float32(scaling)
    for path in world.changes:
        A, B = (_in_half(factor) for factor in world.pair(path))
        deltas = {
            "product and change": _in_half(_in_half(B @ A) * s), "change": _in_half(s * (B @ A)),
            "B before the product": _in_half(_in_half(s * B) @ A), "factors alone": s * (B @ A),
        }  # fmt: skip
        arrays[f"{path}.weight"] = (arrays[f"{path}.weight"].astype("f4") + deltas[road]).astype(FLOATS["BF16"])
    assert world.judged(arrays).word == "RIGHT"


def test_a_merges_distance_from_the_exact_sum_is_measured(tmp_path):
    world = World(tmp_path, FLOATS["F32"])
    arrays, farthest = dict(world.arrays), 0.0
    for path, delta in world.changes.items():
        A, B = world.pair(path)
        W, three = arrays[f"{path}.weight"], np.float32(SCALING)
        m = arrays[f"{path}.weight"] = sum((three * B[:, i : i + 1] * A[i] for i in range(R)), W)  # rounded eight times
        lengths = SCALING * np.linalg.norm(B, axis=1)[:, None] * np.linalg.norm(A, axis=0)
        largest = np.maximum(np.maximum(np.abs(W), np.abs(m)), lengths).astype("f4")
        farthest = max(farthest, (np.abs(m - (W.astype("f8") + delta)) / np.spacing(largest)).max())
    assert farthest > 0.6
    assert f"4 of 4 modules, float32, at most {farthest:.2g} ulp" in world.judged(arrays).first_line


def error_of_sums(world, path):
    """How far s B A may be off, whatever the order in which its r products are added, up or down."""
    A, B = (factor.astype("f8") for factor in world.pair(path))
    error = (R + 3) * 2.0**-23 * SCALING * np.linalg.norm(B, axis=1)[:, None] * np.linalg.norm(A, axis=0)
    return error * np.random.default_rng(1).choice([-1, 1], error.shape)


@pytest.mark.parametrize(
    ("times", "rows", "word"), [(0.95, slice(None), "RIGHT"), (1.05, slice(5, 6), "WRONG"), (1.05, slice(-1), "WRONG")]
)
def test_a_sum_may_be_off_by_its_rounding_error(tmp_path, times, rows, word):
    world, name = World(tmp_path, FLOATS["F32"]), f"{Q0}.weight"
    m, W, error = world.merged()[name], world.arrays[name].astype("f8"), error_of_sums(world, Q0)
    rounding = 2.0**-23 * (np.abs(W) + np.abs(W + world.changes[Q0]) + np.abs(error))
    m[rows] = (W + world.changes[Q0] + times * (error + np.sign(error) * rounding)).astype("f4")[rows]
    assert world.judged(world.merged() | {name: m}).word == word


@pytest.mark.parametrize("half", ["BF16", "F16"])
@pytest.mark.parametrize(("times", "word"), [(0.9, "RIGHT"), (2, "WRONG")])
def test_a_product_may_be_off_before_it_is_rounded(tmp_path, half, times, word):
    world = World(tmp_path, FLOATS[half])
    arrays = dict(world.arrays)
    for path in world.changes:
        product = (world.product(path) + times * error_of_sums(world, path) / SCALING).astype("f4")
        change = _in_half(_in_half(product, half) * np.float32(SCALING), half)
        arrays[f"{path}.weight"] = (arrays[f"{path}.weight"].astype("f4") + change).astype(world.dtype)
    assert world.judged(arrays).word == word


def test_what_is_wrong_with_the_adapter_is_said_beside(tmp_path):
    """A merge of what the files hold is right, whatever they should hold."""
    world = World(tmp_path, FLOATS["F32"], init_lora_weights="pissa")
    report = world.judged(world.merged())
    (line,) = (line for line in report.lines if line.startswith("the adapter itself: "))
    assert (report.word, line[20:31], line.split()[-1]) == ("RIGHT", "suspicious:", "[start-changes-base]")


@pytest.mark.parametrize("half", ["BF16", "F16"])
def test_a_change_may_be_rounded_to_the_adapters_type(tmp_path, half):
    world = World(tmp_path, FLOATS["F32"])
    world.factors = {name: array.astype(FLOATS[half]) for name, array in world.factors.items()}
    world.adapter = peft(tmp_path / "half", world.factors, config(*LAST, r=R, lora_alpha=R * SCALING))
    arrays = dict(world.arrays)
    for path in world.changes:
        product = _in_half(world.product(path), half)
        arrays[f"{path}.weight"] = arrays[f"{path}.weight"] + _in_half(np.float32(SCALING) * product, half)
    assert world.judged(arrays).word == "RIGHT"


def _in_half(x, half="BF16"):
    return x.astype(FLOATS[half]).astype("f4")


def test_names_may_lack_a_beginning_and_a_vocabulary_may_grow(tmp_path):
    world = World(tmp_path, FLOATS["F16"])
    arrays = world.merged()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        arrays[name] = np.concatenate([arrays[name], np.ones((4, N), world.dtype)])
    report = world.judged({name.removeprefix("model."): array for name, array in arrays.items()})
    assert report.word == "RIGHT"
    assert [line for line in report.lines if line.startswith("note: ")] == [
        "note: 'lm_head.weight', 'model.embed_tokens.weight' with 4 more rows, whose values are not checked "
        "[vocabulary-grown]",
        "note: the names begin differently in the merged model: 'no model.' [renamed]",
    ]
    assert "whose values are not checked; the names begin differently" in report.text


@pytest.mark.parametrize(("size", "said"), [(1e30, "100.0%"), (1e-30, "100.0%"), (0, "inf%")])
def test_how_far_a_tensor_is_changed_is_measured(tmp_path, size, said):
    world = World(tmp_path, FLOATS["F32"])
    small, large = (np.full(3, x, "f4") for x in (size, 2 * size or 1))
    world.base = written(tmp_path / "of a size", world.arrays | {"x": small})
    report = world.judged(world.merged() | {"x": large})
    assert report.first_line.startswith(
        f"merged: WRONG: changed, though no adapter is there, by {said} of their size: 'x'"
    )


@pytest.mark.parametrize("place", ["rotary.inv_freq", "attn.masked_bias", "h.0.attn.bias", "embeddings.position_ids"])
def test_a_buffer_may_be_left_out(tmp_path, place):
    world = World(tmp_path, FLOATS["F32"])
    for name, word in ((place, "RIGHT"), (f"{place}.weight", "WRONG")):
        world.base = written(tmp_path / word, world.arrays | {f"model.{name}": np.ones(3, "f4")})
        assert world.judged(world.merged()).word == word


# --- broken ---


def swapped(path, one, other):
    return path.replace(one, "#").replace(other, one).replace("#", other)


def exchanged(one, other):
    """The changes of two kinds, or layers, each in the other's place."""
    return lambda w: w.merged(lambda path, _: w.changes[swapped(path, one, other)])


def q_and_k_subtracted(w):
    """The change of the other one of the two, subtracted."""
    return w.merged(lambda path, d: d if "mlp" in path else -w.changes[swapped(path, "q_proj", "k_proj")])


def noise(seed, array, size=1.0):
    return size * array.std() * np.random.default_rng(seed).standard_normal(array.shape)


def another_base(w):
    arrays = {n: (x.astype("f8") + noise(1, x.astype("f8"), 0.05)).astype(x.dtype) for n, x in w.arrays.items()}
    return w.merged(base=arrays)


def in_four_bits(arrays):
    """A model whose layers are what they are in NF4."""
    return {
        name: dequantize_nf4(*quantize_nf4(W.astype("f4")), W.shape).astype(W.dtype) if "layers" in name else W
        for name, W in arrays.items()
    }


def at(name, change):
    """A right merge with one tensor changed."""
    return lambda w: w.merged() | {name: change(w.merged()[name]).astype(w.dtype)}


def one_number(arrays):
    """The first weight with one number changed."""
    weight = arrays[f"{Q0}.weight"].copy()
    weight[3, 5] = 1
    return {f"{Q0}.weight": weight}


def beside(w):
    plain = {f"{PREFIX}{name.replace('.weight', '.base_layer.weight')}": array for name, array in w.arrays.items()}
    return plain | {name.replace(".weight", ".default.weight"): array for name, array in w.factors.items()}


def first_rows(path, delta):
    return np.where(np.arange(len(delta))[:, None] < len(delta) // 2, delta, 0)


OTHER_TYPE = {"bfloat16": np.dtype("f2"), "float16": FLOATS["BF16"], "float32": np.dtype("f8")}


def as_other_type(array):
    """The bits of an array in a type of another kind, which is wider if there is none."""
    other = OTHER_TYPE[array.dtype.name]
    return array.view(f"i{array.itemsize}").astype(f"i{other.itemsize}").view(other)


BROKEN = {
    "the base": (lambda w: w.arrays, "not-merged"),
    "half of the layers": (lambda w: w.merged(lambda path, d: d * (".0." in path)), "not-merged"),
    "attention alone": (lambda w: w.merged(lambda path, d: d * ("self_attn" in path)), "not-merged"),
    "twice at once": (lambda w: w.merged(lambda _, d: (2 * d).astype(w.dtype).astype("f8")), "factor"),
    "twice, and a row of NaN": (lambda w: w.merged(lambda _, d: np.append(2 * d[:-1], np.nan * d[-1:], 0)), "factor"),
    "alpha": (lambda w: w.merged(lambda _, d: R * d), "factor"),
    "without the scaling": (lambda w: w.merged(lambda _, d: d / SCALING), "factor"),
    "subtracted": (lambda w: w.merged(lambda _, d: -d), "factor"),
    "another strength": (lambda w: w.merged(lambda _, d: 0.7 * d), "factor"),
    "transposed": (lambda w: w.merged(lambda _, d: d.T if len(d) == d.shape[1] else d), "transposed"),
    "q and k": (exchanged("q_proj", "k_proj"), "another-change"),
    "q and k, subtracted": (q_and_k_subtracted, "another-change"),
    "gate and up": (exchanged("gate_proj", "up_proj"), "another-change"),
    "the next layer": (exchanged(".0.", ".1."), "another-change"),
    "another base": (another_base, "other-base"),
    "the base in four bits": (lambda w: w.merged(base=in_four_bits(w.arrays)), "over-four-bits"),
    "all in four bits": (lambda w: in_four_bits(w.merged()), "rounded-further"),
    "another adapter": (lambda w: w.merged(lambda path, d: noise(len(path), d)), "other-weights"),
    "more than a part": (lambda w: w.merged(lambda path, d: 0.3 * d + noise(len(path), d, 0.3)), "other-weights"),
    "half of the rows": (lambda w: w.merged(first_rows), "in-part"),
    "half of the columns": (lambda w: w.merged(lambda path, d: first_rows(path, d.T).T), "in-part"),
    "a quarter, twice": (lambda w: w.merged(lambda path, d: 2 * first_rows(path, first_rows(path, d).T).T), "in-part"),
    "a head is another": (at("lm_head.weight", lambda x: 2 * x), "changed"),
    "a head's bits are read as another type's": (
        lambda w: w.merged() | {"lm_head.weight": as_other_type(w.arrays["lm_head.weight"])},
        "changed",
    ),
    "a norm is missing": (lambda w: adapters.without(w.merged(), "model.norm.weight"), "missing"),
    "a module is missing": (lambda w: adapters.without(w.merged(), f"{UP0}.weight"), "missing"),
    "not a number": (at(f"{Q0}.weight", lambda x: x * np.nan), "not-finite"),
    "the base but for one number": (lambda w: w.arrays | one_number(w.arrays), "not-merged"),
    "one number is another": (lambda w: w.merged() | one_number(w.merged()), "other-weights"),
    "another shape": (at(f"{Q0}.weight", lambda x: x[:, :-1]), "other-shape"),
    "names of a wrapped model": (lambda w: {PREFIX + name: x for name, x in w.merged().items()}, "prefix-not-loaded"),
    "the factors beside": (beside, "factors-beside"),
}
OF_LAYERS = ("half of the layers", "the next layer", "q and k", "q and k, subtracted", "gate and up")
"""What is told by what is alike in all layers, or in one."""
ALIKE = ("half of the layers", "another strength", "q and k", "gate and up", "half of the rows")
"""What is found as others are."""


def said_of(report):
    """What is wrong in full, or the first line, and what became of modules and other tensors."""
    return [*([f"{one.says} [{one.flag}]" for one in report.found] or [report.first_line]), *report.lines[:2]]


@of_each_type
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n in ALIKE)) for n in BROKEN])
def test_a_broken_merge_is_named_in_the_first_line(tmp_path, dtype, name, approved):
    world, (make, flag) = World(tmp_path, dtype, layers=2 if name in OF_LAYERS else 1), BROKEN[name]
    report = world.judged(make(world))
    assert report.status == 1
    assert report.first_line.startswith("merged: WRONG: ")
    assert report.first_line.endswith(f"[{flag}]")
    assert report.json()["merged"]["extra"] == []
    assert approved(f"{name}, {np.dtype(dtype).name}", said_of(report)) == said_of(report)


@pytest.mark.parametrize("half", ["BF16", "F16"])
def test_a_second_merge_is_named_though_it_rounds_between(tmp_path, half):
    world = World(tmp_path, FLOATS[half], size=0.02)
    twice = world.merged(base=world.merged())
    said = "merged twice, the second time into the merged weights: all 4 modules [twice]"
    report = world.judged(twice)
    assert report.first_line == f"merged: WRONG: {said}"
    assert {one["factor"] for one in report.json()["merged"]["modules"]} == {2.0}


@pytest.mark.parametrize("half", ["BF16", "F16"])
def test_numbers_of_a_narrower_type_are_rounded_further(tmp_path, half):
    world = World(tmp_path, FLOATS["F32"])
    arrays = {name: array.astype(FLOATS[half]).astype("f4") for name, array in world.merged().items()}
    report, said = world.judged(arrays), f"rounded to {FLOATS[half].name} before being stored as float32"
    assert report.first_line == f"merged: WRONG: {said}: all 4 modules [rounded-further]"
    found = report.json()["merged"]
    assert {(one["flag"], one["text"], one["rest"]) for one in found["tensors"]} == {("rounded-further", said, 0.0)}
    assert {(one["flag"], one["text"], one["factor"]) for one in found["modules"]} == {("rounded-further", said, 1.0)}


def test_rounding_further_hides_no_other_strength(tmp_path):
    """Though nearly all numbers are at most three steps of bfloat16 from a right merge's."""
    world = World(tmp_path, FLOATS["F32"], size=0.001, kinds=dict.fromkeys(KINDS, (24, 8)))
    twice = world.merged(lambda _, delta: 2 * delta)
    report = world.judged({name: array.astype(FLOATS["BF16"]).astype("f4") for name, array in twice.items()})
    said = "changed by more than the adapter: its change is there 1.55 to 2.34 times, plus 0.2% of the weight"
    assert report.found[0].says == f"{said}: all 4 modules"


SUSPECTS = {
    "factor": lambda w: w.merged(lambda _, delta: 0.7 * delta),
    "another-change": exchanged("q_proj", "k_proj"),
    "in-part": lambda w: w.merged(first_rows),
    "rounded-further": lambda w: {name: array.astype("f2").astype("f4") for name, array in w.merged().items()},
}
"""What a merge is called where it explains nearly all numbers."""


@pytest.mark.parametrize("flag", SUSPECTS)
def test_a_suspect_explains_all_but_one_of_200_numbers(tmp_path, flag):
    rows = 20 if flag == "in-part" else 10  # of which half alone are changed
    world = World(tmp_path, FLOATS["F32"], kinds=dict.fromkeys([*KINDS][:2], (rows, 20)))
    arrays = SUSPECTS[flag](world)
    for odd in range(3):
        report = world.judged(arrays)
        of_q = next(one["flag"] for one in report.json()["merged"]["modules"] if one["module"] == Q0)
        assert (of_q == flag) == (odd < 2), odd
        arrays[f"{Q0}.weight"][odd, 7] = 1


def last_row_alone(w):
    """A right merge but for the last row of each module, which is the base's."""
    return w.merged(lambda path, d: np.where(np.arange(len(d))[:, None] < len(d) - 1, d, 0))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (World.merged, "RIGHT: merged correctly (4 of 4 modules, float32"),
        (last_row_alone, "WRONG: merged only in some rows; "),
        (at(f"{Q0}.weight", lambda x: np.where(np.arange(N)[:, None] == N - 1, np.nan, x)), "WRONG: NaN or infinity"),
        (at("lm_head.weight", lambda x: x * (1 + (np.arange(32)[:, None] > 29))), "WRONG: changed, though no adapter"),
    ],
)
def test_each_block_of_rows_is_looked_at(tmp_path, monkeypatch, make, said):
    monkeypatch.setattr("minilora.audit.units.NUMBERS_AT_A_TIME", 5 * N)
    world = World(tmp_path, FLOATS["F32"])
    assert world.judged(make(world)).first_line.startswith(f"merged: {said}")


# --- the whole folder ---

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32, "hidden_size": N, "head_dim": 16,
    "intermediate_size": M, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0, "max_position_embeddings": 64,
}  # fmt: skip
TABLE, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
GPT2 = {"model_type": "gpt2", "vocab_size": 32, "activation_function": "gelu_new", "n_head": 4, "is_causal": True}
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


def renamed(one, other):
    return lambda arrays: {re.sub(one, other, name): array for name, array in arrays.items()}


def of(names, change):
    """The tensors whose names contain one of some words, changed."""
    return lambda arrays: {n: change(a) if any(x in n for x in names) else a for n, a in arrays.items()}


def grown(*names, by=1.0):
    return of(names, lambda a: np.concatenate([a, a[:4] * np.float32(by)]))


def without(name):
    return lambda arrays: adapters.without(arrays, name)


def plus(name, array):
    return lambda arrays: arrays | {name: array}


BIAS = plus(f"{Q0}.bias", np.ones(N, "f4"))
TIED = LLAMA | {"tie_word_embeddings": True}
SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
SCALED = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
YARN, QWEN = LLAMA | {"rope_scaling": SCALED}, LLAMA | {"model_type": "qwen2", "architectures": None}
FOLDERS = {
    "the same": (LLAMA, None, {}, "RIGHT", None),
    "another rope": (LLAMA, None, {"rope_theta": 5e5}, "WRONG", "other rotary frequencies, so the model computes"),
    "version 5's rope": (LLAMA, None, {"rope_theta": None, "rope_parameters": {"rope_theta": 1e4}}, "RIGHT", None),
    "a rope that is not read": (LLAMA, None, {"rope_scaling": {"type": "yarn"}}, "WRONG", "rope.rope_type is 'yarn'"),
    "other heads": (LLAMA, None, {"num_attention_heads": 8, "head_dim": 8}, "WRONG", "num_attention_heads is 8"),
    "another type": (LLAMA, None, {"model_type": "mistral"}, "WRONG", "model_type is 'mistral' instead of 'llama'"),
    "another activation": (GPT2, None, {"activation_function": "relu"}, "WRONG", "activation_function is 'relu'"),
    "no causal mask": (
        GPT2 | {"is_causal": None}, None, {"is_causal": False}, "WRONG",
        "is_causal is False instead of"),
    "no causal mask, where the base has the default": (
        {name: value for name, value in GPT2.items() if name != "is_causal"}, None, {"is_causal": False}, "WRONG",
        "is_causal is False instead of True"),
    "the default of a causal mask": (
        {name: value for name, value in GPT2.items() if name != "is_causal"}, None, {"is_causal": True}, "RIGHT", None),
    "a setting more": (GPT2, None, {"scale": 2}, "RIGHT", "; config.json differs: scale is 2 instead of missing"),
    "dropout": (GPT2, None, {"attn_pdrop": 0.5, "dtype": "float16", "_name_or_path": "x"}, "RIGHT", None),
    "a shorter context": (LLAMA, None, {"max_position_embeddings": 8}, "RIGHT", "max_position_embeddings is 8 instead"),
    "a window": (
        LLAMA | {"model_type": "mistral"}, None, {"sliding_window": 4}, "WRONG", "sliding_window is 4 instead of None"),
    "a window over all": (LLAMA | {"model_type": "mistral"}, None, {"sliding_window": 64}, "RIGHT", None),
    "a lost head": (LLAMA, without(HEAD), {"tie_word_embeddings": True}, "WRONG", "where config.json ties the head"),
    "a tied second head": (
        LLAMA, None, {"tie_word_embeddings": True}, "WRONG",
        "but they differ, and programs differ"),
    "no head": (LLAMA, without(HEAD), {}, "WRONG", "missing in the merged model: 'lm_head.weight'"),
    "tied": (TIED, without(HEAD), {}, "RIGHT", None),
    "tied by its default": (TIED, without(HEAD), {"tie_word_embeddings": None}, "WRONG", "missing in the merged model"),
    "untied": (TIED, without(HEAD), {"tie_word_embeddings": False}, "WRONG", "missing in the merged model"),
    "tied under the head's name": (TIED, lambda x: renamed(TABLE, HEAD)(without(HEAD)(x)), {}, "RIGHT", None),
    "stale": (TIED, plus(HEAD, np.ones((32, N), "f4")), {}, "WRONG", "changed, though no adapter is there"),
    "no prefix": (LLAMA, renamed("^model.", ""), {}, "RIGHT", "; the names begin differently in the merged model"),
    "the prefix twice": (
        LLAMA, renamed("^", "model."), {}, "RIGHT",
        "; the names begin differently in the merged model"),
    "another prefix": (
        LLAMA, renamed("^model.", "transformer."), {}, "WRONG",
        "6 names in the merged model begin with 't"),
    "a wrapped norm": (
        LLAMA, renamed(NORM, f"module.{NORM}"), {}, "WRONG",
        "1 name in the merged model begins with 'mod"),
    "twice": (LLAMA, plus("norm.weight", np.ones(N, "f4")), {}, "WRONG", "stored twice, also as 'norm.weight'"),
    "a bias more": (LLAMA, BIAS, {}, "RIGHT", f"; 1 tensor only in the merged model: '{Q0}.bias'"),
    "a bias that is read": (LLAMA, BIAS, {"attention_bias": True}, "WRONG", "attention_bias is True instead of False"),
    "a buffer more": (LLAMA, plus("model.rotary_emb.inv_freq", np.ones(8, "f4")), {}, "RIGHT", None),
    "an axis more": (LLAMA, of([NORM], lambda a: a[:, None]), {}, "WRONG", "another shape, 64 and 64 x 1"),
    "rows more": (LLAMA, grown("q_proj"), {}, "WRONG", "another shape, 64 x 64 and 68 x 64"),
    "a longer norm": (LLAMA, grown("norm"), {}, "WRONG", "another shape, 64 and 68"),
    "grown": (LLAMA, grown("lm_head", "embed"), {"vocab_size": 36}, "RIGHT", "with 4 more rows, whose values"),
    "grown unsaid": (
        LLAMA, grown("lm_head", "embed"), {}, "WRONG",
        "the vocabulary is not of one size: +4 in 'lm_h"),
    "grown by half": (LLAMA, grown("embed"), {"vocab_size": 36}, "WRONG", "+0 in 'lm_head.weight', +4 in"),
    "grown by NaN": (
        LLAMA, grown("lm_head", "embed", by=np.nan), {"vocab_size": 36}, "WRONG", "NaN or infinity in the added rows"),
    "in FP8": (LLAMA, of(["q_proj"], lambda a: a.astype(FLOAT8)), {}, "UNDECIDED",
               "1 of 4 modules cannot be compared: the merged model is quantised ('model.safetensors' "),
    "a norm in FP8": (LLAMA, of([NORM], lambda a: a.astype(FLOAT8)), {}, "UNDECIDED",
                      "1 tensor cannot be compared: the merged model is quantised ('model.safetensors' has"),
    **{f"no {name}": (LLAMA, None, {name: None}, "WRONG", f"{name} is missing") for name in SIZES},
    "settings of nothing": (LLAMA, None, dict.fromkeys(LLAMA), "WRONG", "model_type is missing"),
    "a rope's setting more": (YARN, None, {"rope_scaling": SCALED | {"attention_factor": 3.0}}, "WRONG",
                              "rope.attention_factor is 3.0 instead of missing"),
    "a rope's setting less": (YARN, None, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "WRONG",
                              "rope.original_max_position_embeddings is missing instead of 32"),
    "another context of yarn": (YARN, None, {"max_position_embeddings": 8}, "WRONG", "max_position_embeddings is 8"),
    "sliding layers without a window": (
        QWEN, None, {"layer_types": ["sliding_attention"], "sliding_window": 4}, "WRONG",
        "layer_types is ['sliding_attention'] instead of None"),
    "quantised by its settings": (LLAMA, None, {"quantization_config": {"quant_method": "fp8"}}, "RIGHT",
                                  "; config.json differs: quantization_config is there"),
    "packed": (LLAMA, lambda x: of(["q_proj"], lambda a: a.astype("u4"))(renamed("q_proj.weight", "q_proj.qweight")(x)),
               {}, "UNDECIDED", "1 of 4 modules cannot be compared: the merged model is quantised"),
}  # fmt: skip


@pytest.mark.parametrize("what", FOLDERS)
def test_the_whole_folder_decides_what_is_right(tmp_path, what):
    world, (settings, change, more, word, said) = World(tmp_path, FLOATS["F32"]), FOLDERS[what]
    arrays = {name: a for name, a in world.arrays.items() if not (settings is TIED and name == HEAD)}
    base = written(tmp_path / "with settings", arrays, settings)
    merged = {name: a for name, a in world.merged().items() if name in arrays}
    folder = written(tmp_path / "merged", (change or dict)(merged), settings | more)
    report = audit(world.adapter, base, merged=folder)
    assert report.word == word, str(report)
    told = " ".join([report.text, *(one.says for one in report.found)])
    assert said in told if said else told.endswith("from the exact sum)")


@pytest.mark.parametrize("merged", [("own", False), ("both", True), ("table", True)])
def test_a_saved_head_of_a_tied_model_may_stand_alone(tmp_path, merged):
    """PEFT unties the head that it trains; a program may also train the shared array."""
    world, (place, tied) = World(tmp_path, FLOATS["F32"]), merged
    arrays = without(HEAD)(world.arrays)
    base = written(tmp_path / "tied", arrays, TIED)
    file, trained = world.adapter / "adapter_model.safetensors", world.arrays[HEAD] + 1
    save_file(load_file(file) | {"base_model.model.lm_head.weight": trained}, file)
    own = {"own": {HEAD: trained}, "both": {HEAD: trained, TABLE: trained}, "table": {TABLE: trained}}[place]
    folder = written(tmp_path / "merged", without(HEAD)(world.merged()) | own, TIED | {"tie_word_embeddings": tied})
    report = audit(world.adapter, base, merged=folder)
    assert report.word == "RIGHT", str(report)
    stale = written(tmp_path / "stale", without(HEAD)(world.merged()) | {HEAD: arrays[TABLE]}, LLAMA)
    assert audit(world.adapter, base, merged=stale).word == "WRONG"


def test_a_base_of_few_bits_is_not_compared(tmp_path):
    world = World(tmp_path, FLOATS["F32"])
    coded = of(["q_proj"], lambda a: a.astype(FLOAT8))(world.arrays) | {f"{Q0}.weight_scale_inv": np.ones((1, 1), "f4")}
    base = written(tmp_path / "coded", coded)
    for arrays in (world.merged(), coded | {f"{Q0}.weight_scale_inv": np.full((1, 1), 2, "f4")}):
        report = judged(world.adapter, base, world.merged() | {n: a for n, a in arrays.items() if "q_proj" in n})
        assert report.word == "UNDECIDED"
        assert "the base is quantised ('model.safetensors' has F8_E4M3)" in report.first_line


def test_an_adapter_beside_is_applied_once_more(tmp_path):
    world = World(tmp_path, FLOATS["F32"])
    world.judged(world.merged())
    shutil.copy(world.adapter / "adapter_config.json", tmp_path / "merged")
    said = "WRONG: a file of an adapter, which transformers applies to the model once more: 'adapter_config.json'"
    assert said in audit(world.adapter, world.base, merged=tmp_path / "merged").first_line


def in_tf32(x, add):
    return ((x.astype("f4").view("u4") + np.uint32(add)) & np.uint32(0xFFFFE000)).view("f4")


@pytest.mark.parametrize("add", [0x1000, 0], ids=["to the nearest", "truncated"])
@pytest.mark.parametrize("kind", TYPES)
def test_factors_may_be_multiplied_in_tf32(tmp_path, kind, add):
    world = World(tmp_path, FLOATS[kind])
    arrays, deltas = dict(world.arrays), {}
    for path in world.changes:
        A, B = (in_tf32(factor, add).astype("f8") for factor in world.pair(path))
        deltas[path] = SCALING * (B @ A)
    for at_half in (False, True):
        for path, delta in deltas.items():
            W = world.arrays[f"{path}.weight"].astype("f8")
            change = delta.astype(world.dtype).astype("f8") if at_half else delta
            arrays[f"{path}.weight"] = (W + change).astype(world.dtype)
        assert world.judged(arrays).word == "RIGHT"


@pytest.mark.parametrize("half", ["BF16", "F16"])
def test_the_scaling_may_be_multiplied_into_a(tmp_path, half):
    world = World(tmp_path, FLOATS[half])
    arrays = dict(world.arrays)
    for path in world.changes:
        A, B = (_in_half(factor, half) for factor in world.pair(path))
        change = _in_half(B @ _in_half(np.float32(SCALING) * A, half), half)
        arrays[f"{path}.weight"] = (arrays[f"{path}.weight"].astype("f4") + change).astype(world.dtype)
    assert world.judged(arrays).word == "RIGHT"


def rounded_between(w):
    """The change added rank by rank, each sum rounded to bfloat16."""
    arrays = dict(w.arrays)
    for path in w.changes:
        A, B = w.pair(path)
        for i in range(R):
            W = arrays[f"{path}.weight"]
            arrays[f"{path}.weight"] = (W.astype("f4") + np.float32(SCALING) * B[:, i : i + 1] * A[i]).astype(w.dtype)
    return arrays


def unmerged(w):
    arrays = w.merged()
    for path, delta in w.changes.items():
        W = arrays[f"{path}.weight"]
        arrays[f"{path}.weight"] = (W.astype("f8") - delta).astype(W.dtype)
    return arrays


def over_base_in(half):
    return lambda w: {
        n: m if "layers" in n else w.arrays[n]
        for n, m in w.merged(base={n: a.astype(half).astype(w.dtype) for n, a in w.arrays.items()}).items()
    }


CAUSES = {
    "unmerged": ("F32", unmerged, "not merged: the base but for rounding, as if merged and unmerged: all 4 modules"),
    "unmerged in bfloat16": (
        "BF16", unmerged,
        "not merged: the base but for rounding, as if merged and unmerged: all 4"),
    "a base in half precision": ("F32", over_base_in("f2"), "the base was rounded to float16 before the merge: all 4"),
    "near 1": ("F32", lambda w: w.merged(lambda _, d: 1.0001 * d), "merged with a factor of 1.0001: all 4 modules"),
    "rank by rank": ("BF16", rounded_between, "changed by more than the adapter: its change is there "),
    "eight times": (
        "BF16", lambda w: w.merged(lambda _, d: R * d.astype(w.dtype).astype("f8")),
        "merged with a factor of 8"),
}  # fmt: skip


@pytest.mark.parametrize("what", CAUSES)
def test_a_cause_is_named_where_it_is_there(tmp_path, what):
    kind, make, said = CAUSES[what]
    world = World(tmp_path, FLOATS[kind])
    report = world.judged(make(world))
    (one,) = report.found
    assert one.says.startswith(said)
    assert not re.search(r"\b1 times|0\.0% of", one.says)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.nan])
def test_no_change_is_told_where_the_base_is_not_finite(tmp_path, odd):
    world = World(tmp_path, FLOATS["F32"])
    arrays = {name: np.full_like(a, odd) if "layers" in name else a for name, a in world.arrays.items()}
    world.base = written(tmp_path / "odd", arrays)
    said = "UNDECIDED: 4 of 4 modules cannot be compared: the base has NaN or infinity"
    assert said in world.judged(arrays).first_line


def test_a_second_merge_has_one_name(tmp_path):
    """Where rounding shows it only in some modules, it is the cause of the others' factor too."""
    world = World(tmp_path, FLOATS["BF16"], size=0.02)
    arrays, name = world.merged(base=world.merged()), f"{UP0}.weight"
    arrays[name] = (world.arrays[name].astype("f8") + 2 * world.changes[UP0]).astype(world.dtype)
    assert [one.flag for one in world.judged(arrays).found] == ["twice"]


# --- trained in full ---

IN_FULL = {
    "in its place": (lambda base, trained: trained, "RIGHT: merged correctly (4 of 4 modules, float32, "),
    "the base's": (lambda base, trained: base, "WRONG: equal to the base, not to the trained tensor: "),
    "another": (lambda base, trained: 2 * trained, "WRONG: equal to neither the base nor the trained tensor: "),
    "of another shape": (lambda base, trained: trained[:-1], "WRONG: the shape differs from the trained tensor's: "),
}


@pytest.mark.parametrize("what", IN_FULL)
@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_what_was_trained_in_full_is_looked_for(tmp_path, name, what):
    world, (make, said) = World(tmp_path, FLOATS["F32"]), IN_FULL[what]
    base, tensors = world.arrays[name], {f"{PREFIX}{name}": world.arrays[name] + np.float32(0.01)}
    settings, trained = {"modules_to_save": [name.split(".")[-2]]}, tensors[f"{PREFIX}{name}"]
    if "embed" in name:  # two rows of it alone
        settings = {"trainable_token_indices": {"embed_tokens": [0, 8]}}
        tensors = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": trained[[0, 8]]}
        tensors |= {f"{PREFIX}model.embed_tokens.token_adapter.base_layer.weight": base}
        trained = np.where(np.isin(np.arange(len(base)), [0, 8])[:, None], trained, base)
    settings |= {"r": R, "lora_alpha": R * SCALING}
    world.adapter = peft(tmp_path / "full", world.factors | tensors, config(*LAST, **settings))
    report = world.judged(world.merged() | {name: make(base, trained)})
    assert report.first_line.startswith(f"merged: {said}")
    assert (f"'{name}'" in report.first_line) == (report.word == "WRONG")
    assert ("1 fully trained tensor" in report.first_line) == (report.word == "RIGHT")


@pytest.mark.parametrize("said", [[3, 32], [3, -1], [3, True], [3], {"lm_head": [8]}, None])
def test_rows_that_the_table_has_not_are_not_compared(tmp_path, said):
    world = World(tmp_path, FLOATS["F32"])
    rows = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((2, N), "f4")}
    settings = config(*LAST, r=R, lora_alpha=R * SCALING, trainable_token_indices=said)
    world.adapter = peft(tmp_path / "rows", world.factors | rows, settings)
    report = world.judged(world.merged())
    assert "note: not compared: model.embed_tokens.weight: " in str(report)
    assert "trainable_token_indices does not name the rows of " in str(report)
    assert [tensor["flag"] for tensor in report.json()["merged"]["tensors"]] == ["not-compared"]


# --- other formats, and experts ---

QV = adapters.paths("q_proj", "v_proj")


def of_mlx(t):
    folder = adapters.mlx(t / "a", QV)
    read = load_file(folder / "adapters.safetensors")
    return folder, {path: 20 * (read[f"{path}.lora_a"].astype("f8") @ read[f"{path}.lora_b"]).T for path in QV}


def of_kohya(t):
    file = adapters.kohya(t / "a.safetensors", QV)
    read = {name.removeprefix("lora_te_"): array.astype("f8") for name, array in load_file(file).items()}
    names = {path: path.replace(".", "_") for path in QV}
    return file, {p: read[f"{n}.lora_up.weight"] @ read[f"{n}.lora_down.weight"] / 2 for p, n in names.items()}


def of_gguf(t):
    """Of llama.cpp's, whose rows of W_q lie otherwise."""
    from gguf import GGUFReader

    file = adapters.gguf(t / "a.gguf", QV)
    read = {tensor.name: np.array(tensor.data, "f8") for tensor in GGUFReader(file).tensors}
    changes = {}
    for i in range(adapters.LAYERS):
        q, v = (
            2 * read[f"blk.{i}.{n}.weight.lora_b"] @ read[f"blk.{i}.{n}.weight.lora_a"] for n in ("attn_q", "attn_v")
        )
        changes[f"model.layers.{i}.self_attn.q_proj"] = halves_from_interleaved(q, 4)
        changes[f"model.layers.{i}.self_attn.v_proj"] = v
    return file, changes


@pytest.mark.parametrize("make", [of_mlx, of_kohya, of_gguf])
def test_adapters_of_other_programs_are_looked_for_too(tmp_path, make):
    base = adapters.model(tmp_path / "base", head_dim=4)
    adapter, changes = make(tmp_path)
    arrays = load_file(base / "model.safetensors")
    for times, said in ((0, "WRONG: not merged"), (1, "RIGHT"), (2, "WRONG: merged with a factor of 2 (twice")):
        merged = {f"{path}.weight": arrays[f"{path}.weight"] + times * delta for path, delta in changes.items()}
        report = judged(adapter, base, arrays | {name: W.astype("f4") for name, W in merged.items()})
        assert report.first_line.startswith(f"merged: {said}")
        assert {one["factor"] for one in report.json()["merged"]["modules"]} == {None if times == 1 else times}


@pytest.mark.filterwarnings("ignore:.*ties head and embedding")
@pytest.mark.parametrize("modules", [["model.embed_tokens"], ["lm_head"], ["model.embed_tokens", "lm_head"]])
def test_a_tied_head_may_become_a_tensor_of_its_own(tmp_path, modules):
    base = adapters.model(tmp_path / "base", tied=True)
    adapter = peft(tmp_path / "a", adapters.factors(modules), config("embed_tokens", "lm_head"))
    merge_adapter(base, adapter, tmp_path / "merged")
    assert audit(adapter, base, merged=tmp_path / "merged").word == "RIGHT"


@pytest.mark.filterwarnings("ignore:.*ties head and embedding")
@pytest.mark.parametrize(("kind", "word"), [("F32", "RIGHT"), ("BF16", "UNDECIDED")])
def test_a_head_of_another_type_is_no_second_embedding(tmp_path, kind, word):
    """Nobody asked to change it, though it rounds to the embedding, whose change is lost in bfloat16."""
    base, factors = adapters.model(tmp_path / "base", tied=True), adapters.factors(["model.embed_tokens"])
    factors = {name: np.float32(1e-3) * array for name, array in factors.items()}
    A, B = (factors[f"{PREFIX}model.embed_tokens.lora_embedding_{part}"].astype("f8") for part in "AB")
    arrays, table = load_file(base / "model.safetensors"), "model.embed_tokens.weight"
    arrays[table] = arrays[table].astype(FLOATS["BF16"]).astype("f4")
    save_file(arrays, base / "model.safetensors")
    merged = {"lm_head.weight": arrays[table], table: (arrays[table] + 2 * (B @ A).T).astype(FLOATS[kind])}
    assert judged(peft(tmp_path / "a", factors, config("embed_tokens")), base, arrays | merged).word == word


@pytest.mark.parametrize("heads", [(), ("lm_head.weight",)], ids=["once", "stored twice"])
def test_a_tied_head_may_stay_the_embedding(tmp_path, heads):
    settings, factors = {"tie_word_embeddings": True}, adapters.factors(["lm_head"])
    arrays = load_file(adapters.model(tmp_path / "m", tied=True) / "model.safetensors")
    table = arrays["model.embed_tokens.weight"]

    def tied_to(name, table):
        return written(tmp_path / name, arrays | dict.fromkeys(("model.embed_tokens.weight", *heads), table), settings)

    base, adapter = tied_to("base", table), peft(tmp_path / "a", factors, config("lm_head"))
    tied = table + adapters.change(factors, "lm_head")
    merged = tied_to("merged", tied.astype("f4"))
    assert "RIGHT: merged correctly (1 of 1 module" in audit(adapter, base, merged=merged).first_line
    assert "WRONG: not merged, equal to the base: 'lm_head'" in audit(adapter, base, merged=base).first_line
    factors |= adapters.factors(["model.embed_tokens"], seed=1)  # and both may be merged into it
    said = config("embed_tokens", "lm_head", alpha_pattern={"embed_tokens": 2})  # the half of the head's
    A, B = (factors[f"{PREFIX}model.embed_tokens.lora_embedding_{part}"].astype("f8") for part in "AB")
    merged = tied_to("of both", (tied + (B @ A).T).astype("f4"))
    report = audit(peft(tmp_path / "both", factors, said), base, merged=merged)
    assert "RIGHT: merged correctly (2 of 2 modules" in report.first_line
    for place, size in (("lm_head", adapters.V), ("model.embed_tokens", adapters.D)):
        factors[f"{PREFIX}{place}.lora_magnitude_vector"] = np.ones(size, "f4")
    report = audit(peft(tmp_path / "dora", factors, said | {"use_dora": True}), base, merged=merged)
    (text,) = {verdict["text"].partition("': ")[2] for verdict in report.json()["merged"]["modules"]}
    unit = (*heads, "model.embed_tokens.weight")[0]
    assert text == f"not supported: two modules, one with DoRA, change '{unit}'"


def test_a_tied_head_may_be_trained_in_full(tmp_path):
    base, trained = adapters.model(tmp_path / "base", tied=True), np.ones((adapters.V, adapters.D), "f4")
    adapter = peft(tmp_path / "a", {f"{PREFIX}lm_head.weight": trained}, config(modules_to_save=["lm_head"]))
    arrays = load_file(base / "model.safetensors") | {"model.embed_tokens.weight": trained}
    assert "RIGHT: merged correctly (1 fully trained tensor)" in judged(adapter, base, arrays).first_line


def test_a_tied_heads_second_copy_may_be_left_out(tmp_path):
    tied, factors = {"tie_word_embeddings": True}, adapters.factors(QV)
    arrays = load_file(adapters.model(tmp_path / "m", tied=True) / "model.safetensors")
    base = written(tmp_path / "base", arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"]}, tied)
    arrays |= {f"{p}.weight": (arrays[f"{p}.weight"] + adapters.change(factors, p)).astype("f4") for p in QV}
    adapter = peft(tmp_path / "a", factors, config("q_proj", "v_proj"))
    assert audit(adapter, base, merged=written(tmp_path / "merged", arrays, tied)).word == "RIGHT"


def test_a_head_without_the_embedding_that_it_was_lacks_it(tmp_path):
    base = adapters.model(tmp_path / "base", tied=True)
    adapter = peft(tmp_path / "a", adapters.factors(["lm_head"]), config("lm_head"))
    arrays = adapters.renamed(load_file(base / "model.safetensors"), "model.embed_tokens", "lm_head")
    assert "WRONG: missing in the merged model: 'lm_head'" in judged(adapter, base, arrays).first_line


@pytest.mark.parametrize(("rows", "kind"), [(3, "F32"), (0, "BF16")], ids=["grown", "in half precision"])
def test_an_embedding_may_be_merged_over_its_copy(tmp_path, rows, kind):
    base, factors = adapters.model(tmp_path / "base", shards=3), adapters.factors(["model.embed_tokens"])
    arrays = {name: a for file in base.glob("*.safetensors") for name, a in load_file(file).items()}
    place, rng = f"{PREFIX}model.embed_tokens.", np.random.default_rng(3)
    copy = np.concatenate([arrays["model.embed_tokens.weight"], np.ones((rows, adapters.D))]).astype(FLOATS[kind])
    factors[f"{place}lora_embedding_A"] = A = rng.standard_normal((2, len(copy))).astype("f4")
    adapter = peft(tmp_path / "a", factors | {f"{place}base_layer.weight": copy}, config("embed_tokens"))
    delta = 2 * factors[f"{place}lora_embedding_B"].astype("f8") @ A
    arrays["model.embed_tokens.weight"] = (copy.astype("f8") + delta.T).astype("f4")
    arrays["lm_head.weight"] = np.concatenate([arrays["lm_head.weight"], np.ones((rows, adapters.D), "f4")])
    assert judged(adapter, base, arrays).word == "RIGHT"


def with_experts(stacked, factors, packed):
    """A mixture's arrays with the changes of PEFT's factors; `packed` picks an expert's B."""
    arrays = dict(stacked)
    for i in range(adapters.LAYERS):
        for name, inside in (("gate_up_proj", "base_layer."), ("down_proj", "")):
            place = f"model.layers.{i}.mlp.experts."
            A, B = (factors[f"{PREFIX}{place}{inside}lora_{part}.weight"].astype("f8") for part in "AB")
            deltas = np.stack([2 * packed(B, e) @ A[2 * e : 2 * e + 2] for e in range(4)])
            arrays[place + name] = (arrays[place + name] + deltas).astype("f4")
    return arrays


def apart(stacked):
    """The same mixture with tensors for each expert."""
    arrays = {}
    for name, array in stacked.items():
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(name.rpartition(".")[2])
        for e in range(4) if parts else ():
            for part, rows in zip(parts, np.split(array[e], len(parts)), strict=True):
                arrays[f"{name.rpartition('.')[0]}.{e}.{part}.weight"] = np.ascontiguousarray(rows)
        arrays |= {} if parts else {name: array}
    return arrays


@pytest.mark.parametrize("of_base", [dict, apart])
@pytest.mark.parametrize("of_merged", [dict, apart])
def test_experts_are_compared_however_they_are_stored(tmp_path, of_base, of_merged):
    stacked = load_file(adapters.model(tmp_path / "m", experts=4) / "model.safetensors")
    factors = adapters.expert_factors()
    adapter = peft(tmp_path / "a", factors, config(target_modules=[], target_parameters=adapters.EXPERTS))
    base = written(tmp_path / "base", of_base(stacked))
    right = with_experts(stacked, factors, lambda B, e: B[:, e::4])
    assert judged(adapter, base, of_merged(right)).word == "RIGHT"
    packed = of_merged(with_experts(stacked, factors, lambda B, e: B[:, 2 * e : 2 * e + 2]))
    assert "B's ranks and experts are swapped: all 6 modules" in judged(adapter, base, packed).first_line
    name = "model.layers.1.mlp.experts.down_proj"
    right[name][2] = stacked[name][2]
    said = f"not merged, equal to the base, in 1 of 4 experts: '{name}' (1 of 6"
    assert said in judged(adapter, base, of_merged(right)).first_line


@pytest.mark.parametrize("part", ["gate_proj", "up_proj"])
def test_an_arrays_half_without_a_module_is_the_bases(tmp_path, part):
    right = apart(load_file(adapters.model(tmp_path / "m", experts=4) / "model.safetensors"))
    base = written(tmp_path / "base", right)
    names = [f"model.layers.{i}.mlp.experts.{e}.{part}" for i in range(adapters.LAYERS) for e in range(3)]  # of four
    tensors = adapters.pairs(dict.fromkeys(names, (6, adapters.D)), dtype="f8")
    for path in names:
        right[f"{path}.weight"] = (right[f"{path}.weight"] + adapters.change(tensors, path)).astype("f4")
    adapter = peft(tmp_path / "a", tensors, config(part))
    assert "RIGHT: merged correctly (9 of 9 modules" in judged(adapter, base, right).first_line
    still = {"gate_proj": "up_proj", "up_proj": "gate_proj"}[part]
    for name in (f"model.layers.1.mlp.experts.2.{still}.weight", f"model.layers.1.mlp.experts.3.{part}.weight"):
        said = judged(adapter, base, right | {name: 2 * right[name]}).first_line
        assert "WRONG: changed, though no adapter is there, by " in said
        assert said.endswith("of their size: 'model.layers.1.mlp.experts.gate_up_proj' [changed]")


def test_a_base_in_four_bits_is_compared_by_its_numbers(tmp_path):
    model = quantize(tiny_llama(dtype="float32"))
    save_llama(model, tmp_path / "base")
    adapted = adapt(model, ["q_proj", "up_proj"], rank=2, alpha=4, rng=np.random.default_rng(0))
    for p in adapted.trainable().values():
        p[...] = np.random.default_rng(1).standard_normal(p.shape)
    save_adapter(tmp_path / "a", adapters_of(adapted))
    arrays = {f"{path}.weight": layer.weight for path, layer in walk(model) if hasattr(layer, "weight")}
    for path, adapter in adapters_of(adapted).items():
        arrays[f"{path}.weight"] = (arrays[f"{path}.weight"] + adapter.delta().astype("f8")).astype("f4")
    assert judged(tmp_path / "a", tmp_path / "base", arrays).word == "RIGHT"
    still = audit(tmp_path / "a", tmp_path / "base", merged=tmp_path / "base").first_line
    assert "UNDECIDED: 4 of 4 modules cannot be compared: the merged model is quantised" in still


@pytest.mark.parametrize("folder", ["a", "my adapters/" + "a" * 99])
def test_a_mixture_of_fewer_experts_is_not_compared(tmp_path, folder):
    """The first line has the reason, however long a path is; the text has the path too."""
    base = adapters.model(tmp_path / "m", experts=3)
    (tmp_path / folder).parent.mkdir(exist_ok=True)
    adapter = peft(tmp_path / folder, adapters.expert_factors(), config(target_parameters=adapters.EXPERTS))
    report = audit(adapter, base, merged=base)
    assert "UNDECIDED: 6 of 6 modules cannot be compared: " in report.first_line
    assert "is for 4 experts, but the model has 3" in report.first_line
    assert str(adapter) in report.text


def test_few_bits_of_an_unknown_format_are_looked_at(tmp_path):
    save_llama(quantize(tiny_llama(dtype="float32")), tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    head = load_file(tmp_path / "base" / "model.safetensors")["lm_head.weight"]
    adapter = peft(tmp_path / "a", adapters.pairs({"lm_head": head.shape}), config("lm_head"))
    assert audit(adapter, tmp_path / "base").landing.found == 1
    first = "'model.layers.0.self_attn.q_proj.weight'"
    with refused(f"{str(tmp_path / 'base')!r}: {first} is quantised, but there is no quantization_config"):
        audit(adapter, tmp_path / "base", merged=tmp_path / "base")


DORA = {
    "right": (lambda W, V, m: m / np.linalg.norm(V, axis=1) * V.T, ""),
    "as LoRA": (lambda W, V, m: V.T, "without-magnitude"),
    "the base's lengths": (lambda W, V, m: m / np.linalg.norm(W, axis=1) * V.T, "lengths-of-base"),
    "no change": (lambda W, V, m: m / np.linalg.norm(W, axis=1) * W.T, "magnitude-alone"),
    "twice": (lambda W, V, m: m / np.linalg.norm(2 * V - W, axis=1) * (2 * V - W).T, "factor"),
}


@of_each_type
@pytest.mark.parametrize("name", DORA)
def test_what_is_made_of_a_magnitude_is_named(world, tmp_path, name, approved):
    make, flag = DORA[name]
    rng, arrays, magnitudes = np.random.default_rng(2), dict(world.arrays), {}
    for path, delta in world.changes.items():
        W = world.arrays[f"{path}.weight"].astype("f8")
        m = (np.linalg.norm(W, axis=1) * rng.uniform(0.9, 1.1, len(W))).astype("f4")
        magnitudes[f"{PREFIX}{path}.lora_magnitude_vector"] = m
        arrays[f"{path}.weight"] = make(W, W + delta, m).T.astype(world.dtype)
        if name != "right":
            arrays[f"{path}.weight"][0, 0] = 1  # one number of thousands hides no mistake
    settings = config(*LAST, r=R, lora_alpha=R * SCALING, use_dora=True)
    world.adapter = peft(tmp_path / "dora", world.factors | magnitudes, settings)
    report = world.judged(arrays)
    assert [one.flag for one in report.found] == ([flag] if flag else [])
    assert approved(f"{name}, {np.dtype(world.dtype).name}", said_of(report)) == said_of(report)


@pytest.mark.parametrize("times", [-0.9, 1.5])
@pytest.mark.parametrize(("kind", "most"), [("F32", 2.0**-20), ("BF16", 2.0**-12), ("F16", 2.0**-12)])
def test_the_length_that_divides_a_magnitude_may_be_off(tmp_path, kind, most, times):
    """By a rounding of float32's sum of squares, or of half precision's, which is larger for fewer columns."""
    rng = np.random.default_rng(0)
    W, A, B = (0.1 * rng.standard_normal(shape) for shape in ((200, N), (R, N), (200, R)))
    half = FLOATS[kind] if kind != "F32" else np.dtype("f8")
    A, B, m = A.astype("f4"), B.astype("f4"), rng.uniform(0.5, 1.5, 200).astype("f4")
    W = W.astype(FLOATS[kind])
    sums = (W.astype(half) + (2 * (B.astype("f8") @ A)).astype(half)).astype("f8")
    lengths = (np.linalg.norm(sums, axis=1) * (1 + times * most)).astype(half)
    gains = (m / lengths.astype("f8")).astype(half).astype("f8")
    parts = {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": m}
    settings = config("fc", r=R, lora_alpha=2 * R, use_dora=True)
    adapter = peft(tmp_path / "a", {f"{PREFIX}fc.{part}": array for part, array in parts.items()}, settings)
    base, right = written(tmp_path / "base", {"fc.weight": W}), (gains[:, None] * sums).astype(FLOATS[kind])
    assert (judged(adapter, base, {"fc.weight": right}).word == "RIGHT") == (abs(times) < 1)


@pytest.mark.parametrize("block", [1 << 17, 5 * N])
def test_a_magnitude_is_judged_where_weights_lie_in_out(tmp_path, monkeypatch, block):
    monkeypatch.setattr("minilora.audit.units.NUMBERS_AT_A_TIME", block)
    rng, base, right, tensors = np.random.default_rng(0), {}, {}, {}
    for out in (N, 2 * N):  # a square one too
        W, A, B = (0.1 * rng.standard_normal(shape) for shape in ((N, out), (R, N), (out, R)))
        m, V = rng.uniform(0.5, 1.5, out), W + 2 * (B @ A).T
        place, parts = f"{PREFIX}fc{out}.", {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": m}
        tensors |= {place + part: array.astype("f4") for part, array in parts.items()}
        base[f"fc{out}.weight"], right[f"fc{out}.weight"] = W.astype("f4"), V * m / np.linalg.norm(V, axis=0)
    settings = config("fc64", "fc128", r=R, lora_alpha=2 * R, use_dora=True, fan_in_fan_out=True)
    adapter, folder = peft(tmp_path / "a", tensors, settings), written(tmp_path / "base", base)
    for more, said in ((1, "RIGHT: merged correctly (2 of 2 modules"), (1.001, "WRONG: ")):
        arrays = {name: (more * m).astype("f4") for name, m in right.items()}
        assert said in judged(adapter, folder, arrays).first_line


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (None, "RIGHT: merged correctly (1 of 1 module"),
        ("fc.weight", "WRONG: not merged, equal to the base: 'fc' [not-merged]"),
        ("fc.bias", "WRONG: not merged, equal to the base: 'fc' [not-merged]"),
        ("steps", "WRONG: changed, though no adapter is there: 'steps' [changed]"),
        ("type", "WRONG: changed, though no adapter is there: 'steps' [changed]"),
    ],
)
def test_a_module_is_right_where_weight_and_bias_are(tmp_path, left, said):
    """And all else is the base's, integers too."""
    rng = np.random.default_rng(0)
    W, b, A, B, c = (rng.standard_normal(shape).astype("f4") for shape in ((6, 5), 6, (2, 5), (6, 2), 6))
    base = {"fc.weight": W, "fc.bias": b, "steps": np.arange(3)}
    steps = {"steps": np.arange(1, 4), "type": np.arange(3, dtype="f4")}.get(left, base["steps"])
    right = {"fc.weight": W + 2 * B @ A, "fc.bias": b + 2 * c, "steps": steps}
    tensors = {f"{PREFIX}fc.{part}": x for part, x in (("lora_A.weight", A), ("lora_B.weight", B), ("lora_B.bias", c))}
    adapter = peft(tmp_path / "a", tensors, config("fc", r=2, lora_alpha=4, lora_bias=True))
    right |= {left: base[left]} if left and "fc" in left else {}
    assert said in judged(adapter, written(tmp_path / "base", base), right).first_line


# --- what cannot be told ---


@pytest.mark.parametrize("size", [1e-6, 0.0])
def test_a_change_below_half_a_step_is_not_called_right(tmp_path, size):
    world = World(tmp_path, FLOATS["BF16"], size=size)
    report = audit(world.adapter, world.base, merged=world.base)
    assert (report.word, report.status) == ("UNDECIDED", 2)
    assert "in all 4 modules the change is zero or below half a step of bfloat16" in report.first_line


def test_a_change_that_shows_in_few_numbers_is_told(tmp_path, monkeypatch):
    """In bfloat16 a step is larger than the change nearly everywhere: k is known from where it is not."""
    monkeypatch.setattr("minilora.audit.suspects.SAMPLED_ROWS", 24)
    monkeypatch.setattr("minilora.audit.suspects.SAMPLED_NUMBERS", 200)
    world = World(tmp_path, FLOATS["BF16"], size=0.003)
    assert world.judged(world.merged()).word == "RIGHT"
    assert "not merged" in world.judged(world.arrays).first_line
    assert "merged with a factor of 2 (twice)" in world.judged(world.merged(lambda _, d: 2 * d)).first_line


@pytest.mark.parametrize("options", [{"merge": True}, {"merged": Path("merged")}], ids=["loses", "merged"])
def test_what_is_said_of_a_merge_needs_the_base(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"^--{name} needs --model"):
        audit(Path("adapter"), **options)


# --- a model of 7 billion weights ---

WIDTHS = {"q_proj": (4096, 4096), "k_proj": (4096, 4096), "v_proj": (4096, 4096), "o_proj": (4096, 4096),
          "gate_proj": (11008, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)}  # fmt: skip
OF_7B = {
    **{f"model.layers.{i}.{name}.weight": shape for i in range(32) for name, shape in WIDTHS.items()},
    **dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (32000, 4096)),
}


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
def test_seven_billion_weights_take_less_than_a_gigabyte(tmp_path):
    starts = [adapters.sparse(tmp_path / name, OF_7B) for name in ("base", "merged")][1]
    rng, tensors = np.random.default_rng(0), {}
    with (tmp_path / "merged" / "model-00001-of-00001.safetensors").open("r+b") as target:
        for name, (out, width) in OF_7B.items():
            if "layers" not in name:
                continue
            A, B = rng.standard_normal((8, width)).astype("f4"), np.zeros((out, 8), "f4")
            B[out // 2] = rng.standard_normal(8)
            path = name.removesuffix(".weight")
            tensors |= {f"{PREFIX}{path}.lora_A.weight": A, f"{PREFIX}{path}.lora_B.weight": B}
            target.seek(starts[name] + 2 * width * (out // 2))
            target.write((2 * B[out // 2].astype("f8") @ A).astype("f4").astype(FLOATS["BF16"]).tobytes())
    peft(tmp_path / "adapter", tensors, config(*WIDTHS, r=8, lora_alpha=16))
    script = """
import sys
from pathlib import Path
from minilora.audit.auditing import audit
adapter, base, merged = map(Path, sys.argv[1:])
print(audit(adapter, base, merged=merged).first_line)
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    names = [str(tmp_path / name) for name in ("adapter", "base", "merged")]
    done = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True, check=True)
    line, most = done.stdout.splitlines()
    assert line.startswith("merged: RIGHT: merged correctly (224 of 224 modules, bfloat16")
    assert 1024 * int(most) < 1e9  # ru_maxrss would begin with this process's
