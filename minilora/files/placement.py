"""The tensors of a model's files that an adapter changes, with their layouts.

An adapter's modules are matched with a model's tensors by name, and each shape must fit the factors. An adapter is
refused if any part of it matches nothing, since the effect of that part would silently be missing.

An adapter's configuration has a single `fan_in_fan_out` for all modules. A model with both Linear, whose weight is
stored (out, in), and GPT-2's Conv1D, (in, out), would need one per module. PEFT does not need it, since it sees the
layers. A file has only shapes, and a square shape is ambiguous; the other matrices show the base's layout.
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
"""Path prefixes that differ between checkpoints of a multimodal model, as patterns with replacements."""
WEIGHT_LAYOUTS = ("out-in", "in-out")
"""The order of the axes of a Linear's weight, and of a Conv1D's."""
QUANTISED_HINT = "merge into the model that it was quantised from"
NF4_HINT = (
    "; or load a Llama in NF4, and merge with minilora.merge: "
    "save_llama(merge(attach(Llama.load(BASE), load_adapter(ADAPTER))), OUT), which writes float32 weights"
)


@dataclass(frozen=True)
class MergedTensor:
    """A base weight that the adapter changes."""

    name: str  # the name in the base, such as "enc.q_proj.weight"
    module: str  # the name in the adapter, such as "enc.q_proj"
    file: str  # the name of the base's file, or shard, that contains it
    dtype: str  # its dtype, by the format's name; the merge keeps it
    shape: tuple[int, ...]
    layout: str  # "out-in", or "in-out" if stored transposed, like embeddings and GPT-2's Conv1D
    rank: int  # of the module's adapter
    scaling: float  # of the module's adapter
    form: Form  # the kind of layer, and the variant
    of_experts: ExpertTensor | None = None  # for a mixture's array: the experts and rows in this tensor


def merged_tensors(folder: AdapterFolder, weights: Weights, layouts: Mapping[str, str] | None) -> list[MergedTensor]:
    """Return the weights that an adapter changes, in the order of the base's files, and require that it fits them."""
    arrays = {path: module for path, module in folder.modules.items() if module.form.experts}
    modules = {path: module for path, module in folder.modules.items() if path not in arrays}
    names = _weight_names([*modules], weights)
    for name in names.values():
        _check_float(name, weights)
    layout_of = _layouts(names, modules, folder.config.fan_in_fan_out, weights, layouts)
    found: list[tuple[str, str, str, ExpertTensor | None]] = []  # path, name, layout, experts
    for path, tensors in _of_experts(arrays, weights).items():
        for tensor in tensors:
            _check_float(tensor.name, weights)
            found.append((path, tensor.name, "out-in", tensor))
    for path, name in names.items():
        _check_fit(name, layout_of[path], modules[path], weights)
        found.append((path, name, layout_of[path], None))
    for path in folder.with_base:  # PEFT saves an adapted embedding's weight too
        key, name = f"{PREFIX}{path}.{BASE_WEIGHT}", names[path]
        if not same_bytes(folder.file, key, weights.holder[name], name):
            reason = f"{short(key)} is not the base's {short(name)}: the adapter is for another base"
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
        hint = QUANTISED_HINT + (NF4_HINT if f"{name}.{NF4_STATE}" in weights.holder else "")
        expected = ", ".join(FLOATS)
        raise _refused(weights, name, f"has dtype {dtype}, expected one of {expected}: {hint}")


def _check_fit(name: str, layout: str, module: AdaptedModule, weights: Weights) -> None:
    """Require the shape that the adapter was made for."""
    form, shape = module.form, weights.spec(name).shape
    expected = form.weight_shape(*module.shape, layout)
    if shape != expected:
        hint = f"stored {layout}" if form.kind == "linear" else f"of {'an' if form.kind == 'embedding' else 'a'} {form}"
        if form.kind == "linear" and shape == expected[::-1]:
            hint += "; the transposed layout would fit: see layouts"
        raise _refused(weights, name, f"has shape {list(shape)}, the adapter is for {list(expected)} ({hint})")


def _weight_names(modules: list[str], weights: Weights) -> dict[str, str]:
    """Return the base's name for each adapted module's weight.

    The names are the modules' paths. Files of a model without its head, such as GPT-2's, omit the path's first part
    ("h.0.attn" for "transformer.h.0.attn"); this is accepted if it holds for all names. In a multimodal model the
    language part and the encoder may each have a different prefix (`PREFIX_ALIASES`).
    """
    for dropped in _prefixes(modules):
        names = {module: module.removeprefix(dropped) + ".weight" for module in modules if module.startswith(dropped)}
        if len(names) == len(modules) and all(name in weights.holder for name in names.values()):
            return names
    if any(map(MULTIMODAL.search, weights.holder)):
        names = {module: name for module in modules if (name := _multimodal_name(module, weights)) is not None}
        if len(set(names.values())) == len(modules):
            return names
    missing = next(module for module in modules if module + ".weight" not in weights.holder)
    last = missing.rpartition(".")[2]
    if last in (EMBEDDING, HEAD) and ties_head(weights):
        hint = "its head is tied to the embedding. Merge the model's folder into a folder, which gets a separate head"
    elif any(f"{missing}.{part}" in weights.holder for part in ("qweight", "weight_packed", "weight.absmax")):
        hint = f"that layer of the base is quantised, which is not supported: {QUANTISED_HINT}"
    else:
        like = (name for name in weights.holder if name.endswith(f".{last}.weight"))
        hint = f"there is {short(next(like, next(iter(weights.holder), 'nothing')))}"
    raise FileRefused(weights.path, f"there is no {short(missing + '.weight')}, which the adapter changes: {hint}")


def _multimodal_name(module: str, weights: Weights) -> str | None:
    """Return the name of a module's weight in a multimodal model, with any known prefix; None if there is none."""
    names = (f"{re.sub(pattern, prefix, module)}.weight" for pattern, prefix in (("", ""), *PREFIX_ALIASES))
    return next((name for name in names if name in weights.holder), None)


def _prefixes(modules: list[str]) -> list[str]:
    """Return the prefixes that the base may omit from modules' names: none, or the first part of the path."""
    return ["", *{module.partition(".")[0] + "." for module in modules[:1]}]


def _of_experts(arrays: Mapping[str, AdaptedModule], weights: Weights) -> dict[str, list[ExpertTensor]]:
    """Return the tensors of each adapted array of a mixture."""
    missing = [part for part in _prefixes([*arrays]) if not any(name.startswith(part) for name in weights.holder)]
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
    """Return the layout of each adapted module's weight: the caller's choice, or else what the adapter's flag says.

    For a square weight the flag does not suffice if a neighbour, or else any matrix of the base, has the other layout.
    A flag for (in, out) comes from a model with Conv1D layers, which may have Linear layers too. It does not suffice
    either if it covers modules of several names and no matrix of this name confirms it. If it covers only one module,
    only matrices of that name can contradict it.
    """
    layout_of = {path: "in-out" if module.form.kind == "embedding" else "out-in" for path, module in modules.items()}
    linear = [path for path, module in modules.items() if module.form.kind == "linear"]
    chosen, observed = _chosen(linear, layouts), _observed({path: names[path] for path in linear}, modules, weights)
    several = len({_parts(names[path])[1] for path in linear}) > 1
    for path in linear:
        name, shape = names[path], weights.spec(names[path]).shape
        if path in chosen or shape != shape[:1] * 2:
            continue
        parent, last = _parts(name)
        alike, near, base = observed[last], observed[last] | observed[parent], set().union(*observed.values())
        if not flag:
            ambiguous = "in-out" in near or (not alike and "in-out" in base)
        elif len(linear) == 1:
            ambiguous = "out-in" in alike
        else:
            ambiguous = "out-in" in near or (not alike and several)
        if ambiguous:
            found, module = " and ".join(sorted(near or base)) or "none", short(path)
            raise _refused(
                weights,
                name,
                "is square: its shape does not show whether it is stored (out, in) or (in, out). The adapter has "
                f"fan_in_fan_out = {str(flag).lower()} for all its modules; the layouts found around it: {found}. "
                f"Choose one: layouts={{{module}: 'out-in'}} or 'in-out'; on the command line, "
                f"--layout {module[1:-1]}=out-in",
            )
    return layout_of | dict.fromkeys(linear, WEIGHT_LAYOUTS[flag]) | chosen


def _chosen(modules: list[str], layouts: Mapping[str, str] | None) -> dict[str, str]:
    """Return the caller's choice for each module that it names; the longest match decides."""
    layouts, chosen = layouts or {}, dict[str, str]()
    for name in sorted(layouts, key=len):
        if layouts[name] not in WEIGHT_LAYOUTS:
            raise ValueError(f"layouts[{name!r}] must be 'out-in' or 'in-out', got {layouts[name]!r}")
        named = [module for module in modules if f".{module}".endswith(f".{name}")]
        if not named:
            has = short(modules[0]) if modules else "no linear layers, and only their layout can be chosen"
            raise ValueError(f"layouts has {name!r}, which is not a module of the adapter; it has {has}")
        chosen |= dict.fromkeys(named, layouts[name])
    return chosen


def _observed(names: Mapping[str, str], modules: Mapping[str, AdaptedModule], weights: Weights) -> dict[str, set[str]]:
    """Return the layouts of matrices by both parts of their names, as shown by the adapter's factors or a bias."""
    outputs = {name: modules[path].shape[0] for path, name in names.items()}
    observed: dict[str, set[str]] = defaultdict(set)
    for name in weights.holder:
        shape, bias = weights.spec(name).shape, name.removesuffix("weight") + "bias"
        if name.endswith(".weight") and len(shape) == 2 and shape[0] != shape[1]:
            outs = [outputs[name]] if name in outputs else weights.spec(bias).shape if bias in weights.holder else []
            for part in _parts(name):
                observed[part] |= {WEIGHT_LAYOUTS[shape.index(out)] for out in outs if out in shape}
    return observed


def _parts(name: str) -> tuple[str, str]:
    """Split the name of a weight: "h.0.attn.c_proj.weight" into "h.0.attn." and ".c_proj"."""
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    return f"{parent}.", f".{last}"
