"""The tensors of a model's files that an adapter changes, with their layout.

An adapter's modules and a model's tensors are matched by name, and each shape must fit the factors. An adapter that
matches nothing, or only in part, is refused: its effect would silently be missing.

An adapter's configuration has a single `fan_in_fan_out` for all modules. A model with both Linear, whose weight is
stored (out, in), and GPT-2's Conv1D, (in, out), would need one per module; PEFT, which has the layers, does not need
it. A file has only shapes, and a square shape is ambiguous; the matrices that are not square show the base's layout.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from ..texts import FileRefused, short
from .dtypes import FLOATS
from .experts import ExpertTensor, expert_tensors
from .modelfolder import EMBEDDING, HEAD, ties_head
from .peft import BASE_WEIGHT, PREFIX, AdaptedModule, AdapterFolder, Form
from .tensors import NF4_STATE, Weights, same_bytes

MULTIMODAL = re.compile(r"(?:^|[._])(?:visual|vision|image|audio|multi_modal|mm_)")
"""Matches tensors of multimodal models."""
PREFIX_ALIASES = (
    (r"^model\.language_model\.", "language_model.model."), (r"^model\.language_model\.", "model."),
    (r"^language_model\.model\.", "model.language_model."), (r"^language_model\.model\.", "model."),
    (r"^model\.(?=visual|vision|multi_modal|audio)", ""), (rf"^{HEAD}$", f"language_model.{HEAD}"),
)  # fmt: skip
"""Path prefixes that differ between a multimodal model's checkpoints."""
WEIGHT_LAYOUTS = ("out-in", "in-out")
"""The order of a weight's axes: of a Linear, and of a Conv1D."""
WAY = "merge into the model that it was quantised from"
NF4_WAY = (
    "; a Llama in NF4 is merged by minilora.merge, once loaded: "
    "save_llama(merge(attach(Llama.load(BASE), load_adapter(ADAPTER))), OUT), whose weights are float32"
)


@dataclass(frozen=True)
class MergedTensor:
    """A base weight that the adapter changes."""

    name: str  # the name in the base, such as "enc.q_proj.weight"
    module: str  # the name in the adapter, such as "enc.q_proj"
    file: str  # the name of the base's file, or shard, with it
    dtype: str  # its dtype by the format's name, which does not change
    shape: tuple[int, ...]
    layout: str  # "out-in", or "in-out" if stored transposed, like embeddings and GPT-2's Conv1D
    rank: int  # the adapter's, there
    scaling: float  # the adapter's, there
    form: Form  # the kind of layer, and the variant
    of_experts: ExpertTensor | None = None  # its part of an array of a mixture's experts


def merged_tensors(folder: AdapterFolder, weights: Weights, layouts: Mapping[str, str] | None) -> list[MergedTensor]:
    """Return the weights that an adapter changes, in the order of the base's files, and require that it fits."""
    arrays = {path: module for path, module in folder.modules.items() if module.form.experts}
    modules = {path: module for path, module in folder.modules.items() if path not in arrays}
    names = _weight_names([*modules], weights)
    for name in names.values():
        _check_float(name, weights)
    lie = _layouts(names, modules, folder.config.fan_in_fan_out, weights, layouts)
    found: list[tuple[str, str, str, ExpertTensor | None]] = []  # path, name, layout, experts
    for path, tensors in _of_experts(arrays, weights).items():
        for tensor in tensors:
            _check_float(tensor.name, weights)
            found.append((path, tensor.name, "out-in", tensor))
    for path, name in names.items():
        _check_fit(name, lie[path], modules[path], weights)
        found.append((path, name, lie[path], None))
    for path in folder.with_base:  # PEFT saves an adapted embedding's weight too
        key, name = f"{PREFIX}{path}.{BASE_WEIGHT}", names[path]
        if not same_bytes(folder.file, key, weights.holder[name], name):
            reason = f"{short(key)} is not the base's {short(name)}: the adapter is of another base"
            raise FileRefused(folder.file.path, reason)
    changes = []
    for path, name, layout, experts in found:
        file, spec, module = weights.holder[name].path.name, weights.spec(name), folder.modules[path]
        place = (name, path, file, spec.dtype, spec.shape, layout)
        changes.append(MergedTensor(*place, module.rank, module.scaling, module.form, experts))
    return sorted(changes, key=lambda change: (change.file, weights.spec(change.name).start))


def _refused(weights: Weights, name: str, what: str) -> FileRefused:
    """Return the error for a tensor that cannot be merged."""
    return FileRefused(weights.holder[name].path, f"{short(name)} {what}")


def _check_float(name: str, weights: Weights) -> None:
    """Require a weight with a floating-point dtype."""
    dtype = weights.spec(name).dtype
    if dtype not in FLOATS:
        way = WAY + (NF4_WAY if f"{name}.{NF4_STATE}" in weights.holder else "")
        expected = ", ".join(FLOATS)
        raise _refused(weights, name, f"has dtype {dtype}, expected one of {expected}: quantised, unsupported: {way}")


def _check_fit(name: str, layout: str, module: AdaptedModule, weights: Weights) -> None:
    """Require the shape that the adapter fits."""
    form, shape = module.form, weights.spec(name).shape
    expected = form.weight_shape(*module.shape, layout)
    if shape != expected:
        hint = f"stored {layout}" if form.kind == "linear" else f"of {'an' if form.kind == 'embedding' else 'a'} {form}"
        if form.kind == "linear" and shape == expected[::-1]:
            hint += ", and the other way round it would fit: see layouts"
        raise _refused(weights, name, f"has shape {list(shape)}, the adapter is for {list(expected)} ({hint})")


def _weight_names(modules: list[str], weights: Weights) -> dict[str, str]:
    """Return the base's name for each adapted module's weight.

    The names are the modules' paths. Files of a model without its head omit the path's first part, such as GPT-2's
    ("h.0.attn" for "transformer.h.0.attn"): this is accepted if all names fit that way and not otherwise. In a
    multimodal model the language part and the encoder may each have another prefix (`PREFIX_ALIASES`).
    """
    for dropped in _dropped(modules):
        names = {module: module.removeprefix(dropped) + ".weight" for module in modules if module.startswith(dropped)}
        if len(names) == len(modules) and all(name in weights.holder for name in names.values()):
            return names
    if any(map(MULTIMODAL.search, weights.holder)):
        names = {module: name for module in modules if (name := _seen(module, weights)) is not None}
        if len(set(names.values())) == len(modules):
            return names
    missing = next(module for module in modules if module + ".weight" not in weights.holder)
    last = missing.rpartition(".")[2]
    if last in (EMBEDDING, HEAD) and ties_head(weights):
        there = "the head is the embedding there. Merge the model's folder into a folder, which gets a head of its own"
    elif any(f"{missing}.{part}" in weights.holder for part in ("qweight", "weight_packed", "weight.absmax")):
        there = f"the base is quantised there, which is not supported: {WAY}"
    else:
        like = (name for name in weights.holder if name.endswith(f".{last}.weight"))
        there = f"there is {short(next(like, next(iter(weights.holder), 'nothing')))}"
    raise FileRefused(weights.path, f"there is no {short(missing + '.weight')}, which the adapter changes: {there}")


def _seen(module: str, weights: Weights) -> str | None:
    """Return a module's weight in a multimodal model under any possible name; None if there is none."""
    names = (f"{re.sub(one, other, module)}.weight" for one, other in (("", ""), *PREFIX_ALIASES))
    return next((name for name in names if name in weights.holder), None)


def _dropped(modules: list[str]) -> list[str]:
    """Return the prefixes that modules' names may lack: nothing, or their paths' first part."""
    return ["", *{module.partition(".")[0] + "." for module in modules[:1]}]


def _of_experts(arrays: Mapping[str, AdaptedModule], weights: Weights) -> dict[str, list[ExpertTensor]]:
    """Return the tensors of each adapted array of a mixture."""
    missing = [first for first in _dropped([*arrays]) if not any(name.startswith(first) for name in weights.holder)]
    dropped = missing[0] if missing else ""
    return {
        path: expert_tensors(path.removeprefix(dropped), module.form.experts, *module.shape, weights)
        for path, module in arrays.items()
    }


# --- the layout of weights --------------------------------------------------------------------------------------------


def _layouts(
    names: Mapping[str, str],
    modules: Mapping[str, AdaptedModule],
    flag: bool,
    weights: Weights,
    layouts: Mapping[str, str] | None,
) -> dict[str, str]:
    """Return the layout of each adapted module's weight: the caller's, or else that of the adapter's flag.

    For a square weight the flag is not enough if a neighbour, or else any matrix of the base, has the other layout. A
    flag for (in, out) belongs to a Conv1D among Linears. It is not enough either if it covers several kinds of modules
    and no matrix of this name confirms it; if it covers only one module, only such a matrix counts.
    """
    lie = {path: "in-out" if module.form.kind == "embedding" else "out-in" for path, module in modules.items()}
    linear = [path for path, module in modules.items() if module.form.kind == "linear"]
    said, shown = _said(linear, layouts), _shown({path: names[path] for path in linear}, modules, weights)
    several = len({_parts(names[path])[1] for path in linear}) > 1
    for path in linear:
        name, shape = names[path], weights.spec(names[path]).shape
        if path in said or shape != shape[:1] * 2:
            continue
        parent, last = _parts(name)
        alike, near, base = shown[last], shown[last] | shown[parent], set().union(*shown.values())
        if not flag:
            doubtful = "in-out" in near or (not alike and "in-out" in base)
        elif len(linear) == 1:
            doubtful = "out-in" in alike
        else:
            doubtful = "out-in" in near or (not alike and several)
        if doubtful:
            there, module = " and ".join(sorted(near or base)) or "nothing", short(path)
            raise _refused(
                weights,
                name,
                "is square: its shape does not show whether it is stored (out, in) or (in, out). The adapter says "
                f"fan_in_fan_out = {str(flag).lower()} for all its modules; the base shows {there} around it. Say "
                f"which it is: layouts={{{module}: 'out-in'}} or 'in-out'; on the command line, "
                f"--layout {module[1:-1]}=out-in",
            )
    return lie | dict.fromkeys(linear, WEIGHT_LAYOUTS[flag]) | said


def _said(modules: list[str], layouts: Mapping[str, str] | None) -> dict[str, str]:
    """Return the caller's layout for each module; the longest match decides."""
    layouts, said = layouts or {}, dict[str, str]()
    for name in sorted(layouts, key=len):
        if layouts[name] not in WEIGHT_LAYOUTS:
            raise ValueError(f"layouts[{name!r}] must be 'out-in' or 'in-out', got {layouts[name]!r}")
        named = [module for module in modules if f".{module}".endswith(f".{name}")]
        if not named:
            has = short(modules[0]) if modules else "no linear layer, and only their weights lie in two ways"
            raise ValueError(f"layouts has {name!r}, which is not a module of the adapter; it has {has}")
        said |= dict.fromkeys(named, layouts[name])
    return said


def _shown(names: Mapping[str, str], modules: Mapping[str, AdaptedModule], weights: Weights) -> dict[str, set[str]]:
    """Return the layouts of matrices by both parts of their names, as shown by the adapter's factors or a bias."""
    outputs = {name: modules[path].shape[0] for path, name in names.items()}
    shown: dict[str, set[str]] = defaultdict(set)
    for name in weights.holder:
        shape, bias = weights.spec(name).shape, name.removesuffix("weight") + "bias"
        if name.endswith(".weight") and len(shape) == 2 and shape[0] != shape[1]:
            outs = [outputs[name]] if name in outputs else weights.spec(bias).shape if bias in weights.holder else []
            for part in _parts(name):
                shown[part] |= {WEIGHT_LAYOUTS[shape.index(out)] for out in outs if out in shape}
    return shown


def _parts(name: str) -> tuple[str, str]:
    """Split the name of a weight: "h.0.attn.c_proj.weight" into "h.0.attn." and ".c_proj"."""
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    return f"{parent}.", f".{last}"
