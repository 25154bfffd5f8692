"""Where an adapter lands in a model's files: which tensors it changes, and which way round they lie.

An adapter's modules and a model's tensors meet by their names, and then each shape must be the one that the factors are
made for. An adapter that lands nowhere, or in part, is refused: what it was trained to do would silently be missing.

An adapter's configuration has one `fan_in_fan_out` for all of its modules. A model with both Linear, whose weight is
stored (out, in), and GPT-2's Conv1D, (in, out), needs one for each, and PEFT, which sees the layers, gets by without.
A file shows the shape alone, and the shape of a square weight says nothing. Matrices that are not square do, in modules
of the same last name or elsewhere in the base.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from ..checks import FileRefused, short
from .experts import ExpertTensor, expert_tensors
from .modelfolder import EMBEDDING, HEAD, ties_head
from .peft import BASE, PREFIX, AdapterFolder, Form
from .tensors import FLOATS, NF4_STATE, Weights, same_bytes

LAYOUTS = ("out-in", "in-out")
"""The sides of a weight in the order of its shape: of a Linear, and of a Conv1D."""
WAY = "merge into the model that it was quantised from"
NF4_WAY = (
    "; a Llama in NF4 is merged by minilora.merge, once loaded: "
    "save_llama(merge(attach(Llama.load(BASE), load_adapter(ADAPTER))), OUT), whose weights are float32"
)


@dataclass(frozen=True)
class MergedTensor:
    """A weight of the base that the adapter changes."""

    name: str  # in the base, such as "enc.q_proj.weight"
    module: str  # in the adapter, such as "enc.q_proj"
    file: str  # the name of the base's file, or shard, that holds it
    dtype: str  # its type in the format's names, which is kept
    shape: tuple[int, ...]
    layout: str  # "out-in", or "in-out" where it is stored transposed, as embeddings and GPT-2's Conv1D are
    rank: int  # the adapter's, there
    scaling: float  # the adapter's, there
    form: Form  # the kind of layer, and the variant
    of_experts: ExpertTensor | None = None  # what it has of an array of a mixture's experts


def merged_tensors(folder: AdapterFolder, weights: Weights, layouts: Mapping[str, str] | None) -> list[MergedTensor]:
    """Return the weights that an adapter changes, in the order of the base's files; require that it fits each."""
    names = _weight_names(folder, weights)
    for module, name in names.items():
        _check_float(name, weights)
        if folder.forms[module].kind == "linear" and len(shape := weights.spec(name).shape) != 2:
            raise _refused(weights, name, f"has shape {list(shape)}, the adapter is for a matrix")
    lie = layouts_of(names, folder, weights, layouts)
    found: dict[str, tuple[str, str, ExpertTensor | None]] = {}  # module, layout and experts by the tensor's name
    for module, tensors in _of_experts(folder, weights).items():
        for tensor in tensors:
            _check_float(tensor.name, weights)
            found[tensor.name] = module, "out-in", tensor
    for module, name in names.items():
        _check_fit(module, name, lie[module], folder, weights)
        found[name] = module, lie[module], None
    for module in folder.with_base:  # PEFT saves the weight of an adapted embedding too
        key, name = f"{PREFIX}{module}.{BASE}", names[module]
        if not same_bytes(folder.file, key, weights.holder[name], name):
            reason = f"{short(key)} is not the base's {short(name)}: the adapter is of another base"
            raise FileRefused(folder.file.path, reason)
    changes = []
    for name, (module, layout, experts) in found.items():
        file, spec = weights.holder[name].path.name, weights.spec(name)
        rank, scaling, form = folder.layers[module].rank, folder.layers[module].scaling, folder.forms[module]
        changes.append(MergedTensor(name, module, file, spec.dtype, spec.shape, layout, rank, scaling, form, experts))
    return sorted(changes, key=lambda change: (change.file, weights.spec(change.name).start))


def _refused(weights: Weights, name: str, what: str) -> FileRefused:
    """Return the error of a tensor that cannot be merged."""
    return FileRefused(weights.holder[name].path, f"{short(name)} {what}")


def _check_float(name: str, weights: Weights) -> None:
    """Require a weight of a floating-point type."""
    dtype = weights.spec(name).dtype
    if dtype not in FLOATS:
        way = WAY + (NF4_WAY if f"{name}.{NF4_STATE}" in weights.holder else "")
        expected = ", ".join(FLOATS)
        raise _refused(weights, name, f"has dtype {dtype}, expected one of {expected}: quantised, unsupported: {way}")


def _check_fit(module: str, name: str, layout: str, folder: AdapterFolder, weights: Weights) -> None:
    """Require the shape that the adapter is made for."""
    form, shape = folder.forms[module], weights.spec(name).shape
    expected = form.weight_shape(*folder.shapes(module), layout)
    if shape != expected:
        hint = f"stored {layout}" if form.kind == "linear" else f"of {'an' if form.kind == 'embedding' else 'a'} {form}"
        if form.kind == "linear" and shape == expected[::-1]:
            hint += ", and the other way round it would fit: see layouts"
        raise _refused(weights, name, f"has shape {list(shape)}, the adapter is for {list(expected)} ({hint})")


def _weight_names(folder: AdapterFolder, weights: Weights) -> dict[str, str]:
    """Return the base's name for each adapted module's weight.

    The names are the module's paths. Files of a model without its head leave out the path's first part, as GPT-2's do
    ("h.0.attn" for "transformer.h.0.attn"): where all names fit so, and not otherwise, that is followed.
    """
    modules = [module for module, form in folder.forms.items() if not form.experts]
    for dropped in _dropped(modules):
        names = {module: module.removeprefix(dropped) + ".weight" for module in modules if module.startswith(dropped)}
        if len(names) == len(modules) and all(name in weights.holder for name in names.values()):
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


def _dropped(modules: list[str]) -> list[str]:
    """Return what may be missing before the names of some modules: nothing, or their paths' first part."""
    return ["", *{module.partition(".")[0] + "." for module in modules[:1]}]


def _of_experts(folder: AdapterFolder, weights: Weights) -> dict[str, list[ExpertTensor]]:
    """Return the tensors of each adapted array of a mixture."""
    forms = {module: form for module, form in folder.forms.items() if form.experts}
    missing = [first for first in _dropped([*forms]) if not any(name.startswith(first) for name in weights.holder)]
    dropped = missing[0] if missing else ""
    return {
        module: expert_tensors(module.removeprefix(dropped), form.experts, *folder.shapes(module), weights)
        for module, form in forms.items()
    }


# --- which way round a weight lies ------------------------------------------------------------------------------------


def layouts_of(
    names: Mapping[str, str], folder: AdapterFolder, weights: Weights, layouts: Mapping[str, str] | None
) -> dict[str, str]:
    """Return how each adapted module's weight lies; where that is in doubt, of a square one, ask for `layouts`."""
    lie = {module: "in-out" if folder.forms[module].kind == "embedding" else "out-in" for module in names}
    linear = [module for module in names if folder.forms[module].kind == "linear"]
    said, flag = _said(linear, layouts), LAYOUTS[folder.config.fan_in_fan_out]
    square = [m for m in linear if m not in said and len(set(weights.spec(names[m]).shape)) == 1]
    shown = _shown({m: names[m] for m in linear}, folder, weights) if square else {}
    for module in square:
        parent, last = _parts(names[module])
        alike, near, anywhere = shown[last], shown[last] | shown[parent], set().union(*shown.values())
        if flag == "out-in":
            doubtful = "in-out" in near or (not alike and "in-out" in anywhere)
        elif len(linear) == 1:  # the flag is of this one
            doubtful = "out-in" in alike
        else:
            doubtful = "out-in" in near or (not alike and len({_parts(names[m])[1] for m in linear}) > 1)
        if doubtful:
            around, name = " and ".join(sorted(near or anywhere)) or "nothing", short(module)
            raise _refused(
                weights,
                names[module],
                "is square: its shape does not show whether it is stored (out, in) or (in, out). The adapter says "
                f"fan_in_fan_out = {str(flag == 'in-out').lower()} for all its modules; the base shows {around} around "
                f"it. Say which it is: layouts={{{name}: 'out-in'}} or 'in-out'; on the command line, "
                f"--layout {name[1:-1]}=out-in",
            )
    return lie | dict.fromkeys(linear, flag) | said


def _said(modules: list[str], layouts: Mapping[str, str] | None) -> dict[str, str]:
    """Return what the caller says of each module; the longest name decides."""
    layouts, said = layouts or {}, dict[str, str]()
    for name in sorted(layouts, key=len):
        if layouts[name] not in LAYOUTS:
            raise ValueError(f"layouts[{name!r}] must be 'out-in' or 'in-out', got {layouts[name]!r}")
        named = [module for module in modules if f".{module}".endswith(f".{name}")]
        if not named:
            has = short(modules[0]) if modules else "no linear layer, and only their weights lie in two ways"
            raise ValueError(f"layouts has {name!r}, which is no module of the adapter; it has {has}")
        said |= dict.fromkeys(named, layouts[name])
    return said


def _shown(names: Mapping[str, str], folder: AdapterFolder, weights: Weights) -> dict[str, set[str]]:
    """Return which layouts the matrices that are not square show, by their modules' last names and by all before those.

    A matrix shows it by the adapter's factors, or by a bias as long as one of its sides.
    """
    outputs = {name: folder.shapes(module)[0] for module, name in names.items()}
    shown: dict[str, set[str]] = defaultdict(set)
    for name in weights.holder:
        shape, bias = weights.spec(name).shape, name.removesuffix("weight") + "bias"
        if name.endswith(".weight") and len(shape) == 2 and shape[0] != shape[1]:
            outs = [outputs[name]] if name in outputs else weights.spec(bias).shape if bias in weights.holder else []
            for part in _parts(name):
                shown[part] |= {LAYOUTS[shape.index(out)] for out in outs if out in shape}
    return shown


def _parts(name: str) -> tuple[str, str]:
    """Split the name of a weight: "h.0.attn.c_proj.weight" into "h.0.attn." and ".c_proj"."""
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    return f"{parent}.", f".{last}"
