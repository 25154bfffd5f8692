"""An adapter lands where its names and shapes say; a square weight is merged the right way round, or not at all."""

import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import FileRefused, LoRA, merge_adapter, save_adapter

from ..support.adapter_folder import merged
from ..support.disk import contents

RNG = np.random.default_rng(0)


def linear(n_in, n_out, bias=True):
    """A Linear's tensors, (out, in)."""
    return {"weight": RNG.standard_normal((n_out, n_in)), **({"bias": np.ones(n_out)} if bias else {})}


def conv1d(n_in, n_out, bias=True):
    """The tensors of a Conv1D as GPT-2 has it, (in, out)."""
    return {"weight": RNG.standard_normal((n_in, n_out)), **({"bias": np.ones(n_out)} if bias else {})}


def write(folder, modules, adapted, flag):
    """Write a base, and an adapter over some of its modules, whose sizes are (in, out)."""
    tensors = {f"{module}.{name}": t for module, layer in modules.items() for name, t in layer.items()}
    save_file(tensors, folder / "base.safetensors")
    layers = {}
    for number, (module, (n_in, n_out)) in enumerate(adapted.items()):
        rank = 1 + number % 2
        A, B = RNG.standard_normal((rank, n_in)), RNG.standard_normal((n_out, rank))
        layers[module] = LoRA(A, B, 2.0 + number)
    save_adapter(folder / "adapter", layers, fan_in_fan_out=flag)
    return tensors, layers


def merge(folder, **options):
    changes = merge_adapter(folder / "base.safetensors", folder / "adapter", folder / "out", **options)
    return load_file(folder / "out"), changes


EYES = "model.visual.blocks.0.attn.qkv"
TONGUE = "model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("first", ["model.language_model.", "language_model.model."])
@pytest.mark.parametrize(
    ("eyes", "tongue", "head"),
    [
        ("model.visual.", "model.language_model.", "lm_head"),
        ("visual.", "model.", "lm_head"),
        ("visual.", "language_model.model.", "language_model.lm_head"),
    ],
)
def test_a_model_that_sees_is_merged_however_its_files_begin(tmp_path, first, eyes, tongue, head):
    """As the files of a Qwen2-VL do, and the names that transformers gives its layers, and gave them before."""
    end = "layers.0.self_attn.q_proj"
    places = {EYES: f"{eyes}blocks.0.attn.qkv", f"{first}{end}": f"{tongue}{end}", "lm_head": head}
    rng = np.random.default_rng(0)
    base = {f"{name}.weight": rng.standard_normal((4, 3)) for name in places.values()}
    layers = {path: LoRA(rng.standard_normal((2, 3)), rng.standard_normal((4, 2)), 2.0) for path in places}
    after = merged(tmp_path, base, layers)
    for path, name in places.items():
        np.testing.assert_allclose(after[f"{name}.weight"], base[f"{name}.weight"] + layers[path].delta(), rtol=1e-12)


@pytest.mark.parametrize(
    "blind", [{}, {"model.visual.w.weight": np.ones(2)}], ids=["a model of texts", "one that sees"]
)
def test_half_a_match_with_a_model_that_sees_is_refused(tmp_path, blind):
    """Of the two modules one is in the base by another name, and the other by none."""
    base = {"model.layers.0.self_attn.q_proj.weight": np.ones((4, 3))} | blind
    layers = {name: LoRA(np.ones((2, 3)), np.ones((4, 2)), 2.0) for name in ([TONGUE, EYES] if blind else [TONGUE])}
    said = r"there is no 'model\.(language_model|visual)\..*', which the adapter changes"
    with pytest.raises(FileRefused, match=said):
        merged(tmp_path, base, layers)


def test_two_names_of_one_weight_are_refused(tmp_path):
    end = "layers.0.self_attn.q_proj"
    layers = {f"{first}.{end}": LoRA(np.ones((2, 3)), np.ones((4, 2)), 2.0)
              for first in ("model.language_model", "language_model.model")}  # fmt: skip
    base = {f"model.{end}.weight": np.ones((4, 3)), "model.visual.w.weight": np.ones(2)}
    with pytest.raises(FileRefused, match=r"language_model.*, which the adapter changes"):
        merged(tmp_path, base, layers)


GPT2 = {
    "h.0.attn.c_attn": conv1d(4, 12),
    "h.0.attn.c_proj": conv1d(4, 4),
    "h.0.mlp.c_fc": conv1d(4, 16),
    "h.0.mlp.c_proj": conv1d(16, 4),
    "h.0.ln_1": {"weight": np.ones(4), "bias": np.ones(4)},
    "wte": {"weight": np.ones((9, 4))},
}
LLAMA = {
    "l.0.q_proj": linear(4, 4, False),
    "l.0.k_proj": linear(4, 2, False),
    "l.0.o_proj": linear(4, 4, False),
    "l.0.up_proj": linear(4, 8, False),
    "embed": {"weight": np.ones((9, 4))},
}
BERT = {"b.query": linear(4, 4), "b.key": linear(4, 4), "b.dense": linear(4, 4), "c.dense": linear(4, 16)}

FITTING = {
    "Llama's square q_proj": (LLAMA, {"l.0.q_proj": (4, 4), "l.0.o_proj": (4, 4)}, False),
    "Llama's q and k": (LLAMA, {"l.0.q_proj": (4, 4), "l.0.k_proj": (4, 2)}, False),
    "BERT": (BERT, {"b.query": (4, 4), "b.dense": (4, 4)}, False),
    "GPT-2's square c_proj": (GPT2, {"h.0.attn.c_proj": (4, 4)}, True),
    "GPT-2, all": (GPT2, {"h.0.attn.c_attn": (4, 12), "h.0.attn.c_proj": (4, 4), "h.0.mlp.c_proj": (16, 4)}, True),
    "alone": ({"x": conv1d(4, 4)}, {"x": (4, 4)}, True),
    "two of one name": ({"a.c": conv1d(4, 4), "b.c": conv1d(4, 4)}, {"a.c": (4, 4), "b.c": (4, 4)}, True),
    "alone, beside a Linear": ({"x": conv1d(4, 4), "head": linear(4, 3)}, {"x": (4, 4)}, True),
    "its like speaks, and not another": (
        {"h.proj": linear(4, 8), "g.proj": linear(4, 4), "x.c": conv1d(4, 3)},
        {"g.proj": (4, 4)},
        False,
    ),
    "what speaks otherwise is far away": (
        {"h.p": conv1d(4, 8), "g.q": conv1d(4, 8), "g.p": conv1d(4, 4), "k": linear(3, 9)},
        {"g.p": (4, 4)},
        True,
    ),
    "no biases": ({"x": linear(4, 4, False), "y": linear(4, 3, False)}, {"x": (4, 4)}, False),
}


@pytest.mark.parametrize(("modules", "adapted", "flag"), FITTING.values(), ids=FITTING)
def test_a_square_weight_that_nothing_speaks_against_is_merged(tmp_path, modules, adapted, flag):
    tensors, layers = write(tmp_path, modules, adapted, flag)
    after, changes = merge(tmp_path)
    assert {change.layout for change in changes} == {"in-out" if flag else "out-in"}
    for module, lora in layers.items():
        delta = lora.delta().T if flag else lora.delta()
        np.testing.assert_allclose(after[f"{module}.weight"], tensors[f"{module}.weight"] + delta, rtol=1e-12)


DOUBTFUL = {  # a base's modules, those that are adapted, the flag; which is refused, and what the base shows around it
    "Conv1D, flag of a Linear": (
        *(GPT2 | {"s": linear(4, 4)}, {"h.0.attn.c_proj": (4, 4), "s": (4, 4)}, False),
        *("h.0.attn.c_proj", "in-out"),
    ),
    "its like shows it": (
        *({"h.proj": conv1d(4, 8), "g.proj": conv1d(4, 4), "g.out": linear(4, 3)}, {"g.proj": (4, 4)}, False),
        *("g.proj", "in-out and out-in"),
    ),
    "only the parent shows it": (
        *({"h.a": conv1d(4, 12), "h.b": conv1d(4, 4), "g.b": linear(4, 3)}, {"h.b": (4, 4)}, False),
        *("h.b", "in-out and out-in"),
    ),
    "a Linear in a GPT-2": (GPT2 | {"s": linear(4, 4)}, {"s": (4, 4)}, False, "s", "in-out"),
    "Linear, flag of a Conv1D": (
        *(GPT2 | {"s": linear(4, 4)}, {"h.0.attn.c_attn": (4, 12), "s": (4, 4)}, True),
        *("s", "in-out"),
    ),
    "beside it a Conv1D": (
        *(GPT2 | {"h.0.attn.q_proj": linear(4, 4)}, {"h.0.attn.c_attn": (4, 12), "h.0.attn.q_proj": (4, 4)}, True),
        *("h.0.attn.q_proj", "in-out"),
    ),
    "nothing is shown": ({"c": conv1d(4, 4), "s": linear(4, 4)}, {"c": (4, 4), "s": (4, 4)}, True, "c", "none"),
    "one name, both kinds": (
        *({"a.p": conv1d(4, 8), "b.p": linear(4, 4), "b.v": linear(4, 6)}, {"a.p": (4, 8), "b.p": (4, 4)}, True),
        *("b.p", "in-out and out-in"),
    ),
    "alone, its like is a Linear": (
        *({"a.x": conv1d(4, 4), "b.x": linear(4, 3)}, {"a.x": (4, 4)}, True),
        *("a.x", "out-in"),
    ),
    "an adapter's factors show it": (
        *({"h.a": linear(4, 8, False), "h.b": linear(4, 4, False)}, {"h.b": (4, 4), "h.a": (8, 4)}, False),
        *("h.b", "in-out"),
    ),
}


@pytest.mark.parametrize(("modules", "adapted", "flag", "module", "shown"), DOUBTFUL.values(), ids=DOUBTFUL)
def test_a_square_weight_that_the_base_speaks_against_is_refused(tmp_path, modules, adapted, flag, module, shown):
    write(tmp_path, modules, adapted, flag)
    before = contents(tmp_path)
    with pytest.raises(FileRefused) as error:
        merge(tmp_path)
    assert str(error.value) == (
        f"'{tmp_path}/base.safetensors': '{module}.weight' is square: its shape does not show whether it is stored "
        f"(out, in) or (in, out). The adapter has fan_in_fan_out = {str(flag).lower()} for all its modules; the "
        f"layouts found around it: {shown}. Choose one: layouts={{'{module}': 'out-in'}} or 'in-out'; on the command "
        f"line, --layout {module}=out-in"
    )
    assert contents(tmp_path) == before


def test_a_caller_says_how_each_weight_lies(tmp_path):
    modules = GPT2 | {"s": linear(4, 4), "t": linear(4, 3)}
    adapted = {"h.0.attn.c_attn": (4, 12), "h.0.attn.c_proj": (4, 4), "s": (4, 4), "t": (4, 3)}
    tensors, layers = write(tmp_path, modules, adapted, True)
    with pytest.raises(FileRefused, match=r"'s\.weight' is square"):
        merge(tmp_path)
    with pytest.raises(FileRefused, match=r"'t.weight' has shape \[3, 4\].*the transposed layout would fit"):
        merge(tmp_path, layouts={"s": "out-in"})
    after, changes = merge(tmp_path, layouts={"s": "out-in", "t": "out-in"})
    said = {"s": "out-in", "t": "out-in"}
    for change in changes:
        assert change.layout == said.get(change.module, "in-out")
        delta = layers[change.module].delta()
        expected = tensors[change.name] + (delta if change.module in said else delta.T)
        np.testing.assert_allclose(after[change.name], expected, rtol=1e-12)
    assert sorted(change.module for change in changes) == sorted(adapted)


def test_the_longest_name_that_is_said_decides(tmp_path):
    modules = {"a.x": linear(4, 4), "b.x": conv1d(4, 4), "c.ax": linear(4, 4)}
    write(tmp_path, modules, dict.fromkeys(modules, (4, 4)), False)
    for layouts in ({"x": "out-in", "b.x": "in-out"}, {"b.x": "in-out", "x": "out-in"}):
        _, changes = merge(tmp_path, layouts=layouts)
        assert {c.module: c.layout for c in changes} == {"a.x": "out-in", "b.x": "in-out", "c.ax": "out-in"}
    _, changes = merge(tmp_path, layouts={"x": "in-out"})  # a name is whole, or begins after a dot
    assert {c.module: c.layout for c in changes} == {"a.x": "in-out", "b.x": "in-out", "c.ax": "out-in"}


@pytest.mark.parametrize(
    ("layouts", "error", "message"),
    [
        ({"q": "out-in"}, ValueError, "layouts has 'q', which is not a module of the adapter; it has 'x'"),
        ({"x": "transposed"}, ValueError, "layouts['x'] must be 'out-in' or 'in-out', got 'transposed'"),
        ({"x": True}, ValueError, "layouts['x'] must be 'out-in' or 'in-out', got True"),
        ("in-out", TypeError, "string indices must be integers, not 'str'"),
    ],
)
def test_layouts_that_say_nothing_are_refused(tmp_path, layouts, error, message):
    write(tmp_path, {"x": linear(4, 4)}, {"x": (4, 4)}, False)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        merge(tmp_path, layouts=layouts)
    assert not (tmp_path / "out").exists()
