"""Rules that compare the shapes of each module's factors with the weight that it lands on.

The weight of a linear layer is (out, in), or (in, out) if the model stores it that way; of an embedding (V, dim); of a
convolution (out, in / groups, kernel).

For a mixture, a model has one tensor for all experts, (E, out, in) or (E, in, out), or one or two for each expert. Up
to version 0.19.0 PEFT confused the two layouts and exchanged the factors: see `minilora.files.expert_adapters`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..files.expert_adapters import EXCHANGED_UNTIL, version_of
from ..files.experts import EXPERT_ORDER, EXPERT_PARTS, MIXTRAL_MLP, are_exchanged
from ..files.modelfolder import EMBEDDING, HEAD
from .findings import NOTE, SUSPICIOUS, WRONG, Fault, Finding, about, counted, one_per_code
from .headers import AdapterFile, Module, Shape
from .landing import Landing, Spellings
from .units import unit_of


def check_shapes(adapter: AdapterFile, landing: Landing) -> None:
    """Compare the shapes of the modules that landed with the model's, and record the result in `landing`."""
    model, square = landing.model, []
    for path, place in landing.places.items():
        module = adapter.modules[path]
        weight = model.modules.get(place) or _shape_in_array(module, place, model.arrays.get(place))
        experts = _expert_shape(landing, place) if module.kind == "experts" else None
        if module.widths is None:
            continue
        if (experts if module.kind == "experts" else weight) is None:
            landing.packed.add(path)
            continue
        if experts is not None:
            fault = _expert_fault(adapter, module, experts, _stored_in_out(landing, place))
        else:
            fault = _fault(module, place, weight or ())
            if module.kind == "linear" and weight == module.widths[::-1]:
                if fault is None:
                    square.append(path)
                elif adapter.get("fan_in_fan_out") is True or model.bias(place) == weight[1:]:
                    landing.transposed.add(path)
                    fault = None
        if fault is not None:
            landing.misfits[path] = fault
        if fault is None or fault[0] == NOTE:
            landing.fitting.add(path)
    if adapter.get("fan_in_fan_out") is True and not _straight(adapter, landing):
        landing.transposed |= {*square}  # as in GPT-2, though a square shape does not show it


def _straight(adapter: AdapterFile, landing: Landing) -> list[str]:
    """Return the modules whose weights are visibly stored (out, in), unless some are stored (in, out)."""
    linear = [path for path, m in adapter.modules.items() if m.kind == "linear" and path in landing.fitting]
    straight = [p for p in linear if p not in landing.transposed and len({*(adapter.modules[p].widths or ())}) > 1]
    return [] if landing.transposed else straight


# --- a matrix ---


def _fault(module: Module, place: str, shape: Shape) -> Fault | None:
    """Return the fault in a module's shapes, or None if they fit."""
    out, width = module.widths or (0, 0)
    theirs = f"the factors are for a weight of {out} x {width}, but the model's is {' x '.join(map(str, shape))}"
    resized = WRONG, "vocabulary-differs", f"{theirs}: the vocabulary was resized, or the adapter is for another model"
    other = WRONG, "shape-differs", theirs
    if module.kind == "embedding":
        return None if shape == (width, out) else resized if shape[1:] == (out,) else other
    if len(shape) > 2:  # a convolution: (out, in / groups, kernel)
        size = math.prod(shape[1:])
        return None if shape[0] == out and size and width % size == 0 else other
    if shape == (out, width):
        return None
    if shape == (width, out):
        text = (
            f"{theirs}: transposed it would fit, so the factors are transposed or exchanged, or the weight is stored "
            "(in, out) and fan_in_fan_out is not set"
        )
        return WRONG, "shape-turned", text
    if place.rpartition(".")[2] in (HEAD, EMBEDDING) and shape[1] == width:
        return resized
    if shape[1] == width and shape[0] > out and shape[0] % out == 0:
        return WRONG, "shape-is-a-part", f"{theirs}: the rows of one of {shape[0] // out} shards, as on one device"
    if shape[0] == out and shape[1] > width and shape[1] % width == 0:
        return WRONG, "shape-is-a-part", f"{theirs}: the columns of one of {shape[1] // width} shards, as on one device"
    return WRONG, "shape-differs", f"{theirs}: the adapter is for another model"


# --- a mixture's array ---


def _expert_shape(landing: Landing, place: str) -> tuple[int, int, int] | None:
    """Return E and the two sides of each expert's weight as stored; None if the model's files do not show them."""
    model = landing.model
    for spelled in (place, place.replace(".mlp.", f".{MIXTRAL_MLP}.")):
        if spelled in model.arrays or spelled in model.modules:  # one tensor for all of them
            shape = model.arrays.get(spelled) or model.modules.get(spelled)
            return None if shape is None else (*(1,) * (3 - len(shape)), *shape)  # type: ignore[return-value]
    array, parts = unit_of(place)[0], len(EXPERT_PARTS.get(place.rpartition(".")[2], ("",)))
    shapes = landing.experts.get(array, [None])
    return None if shapes[0] is None else (len(shapes) // parts, shapes[0][0] * parts, shapes[0][1])


def _shape_in_array(module: Module, place: str, shape: Shape | None) -> Shape | None:
    """Return the shape of an array, or of the part of it that belongs to a single expert's layer."""
    parts = EXPERT_PARTS.get(place.rpartition(".")[2])
    if shape is None or parts is None or module.kind == "experts" or len(shape) != 3:
        return shape
    return shape[1] // len(parts), shape[2]


def _stored_in_out(landing: Landing, place: str) -> bool | None:
    """Return whether experts' weights are stored (E, in, out): comparing gate_up_proj with down_proj shows it."""
    module = place.rpartition(".")[0]
    gate_up, down = (_expert_shape(landing, f"{module}.{name}") for name in EXPERT_ORDER)
    return are_exchanged(gate_up[1:], down[1:]) if gate_up and down else None


def _expert_fault(file: AdapterFile, module: Module, weight: tuple[int, int, int], in_out: bool | None) -> Fault | None:
    """Return the fault in the packing of a mixture's array, or None if it fits and is unambiguous."""
    E, rows, columns = weight
    if module.experts != E:
        return WRONG, "experts-differ", f"the adapter is for {counted(module.experts, 'expert')}, but the model has {E}"
    out, width = module.widths or (0, 0)
    sides = f"lora_A has {width} inputs and lora_B {out} outputs, and each expert's weight is {rows} x {columns}"
    if sorted((out, width)) != sorted((rows, columns)):
        return WRONG, "shape-differs", sides
    said = str(file.get("peft_version"))
    version = version_of(said)
    if rows == columns:
        text = (
            "without a peft_version it is unknown which factor takes the input of a square weight, since PEFT swapped "
            f"the two after 0.19.0: {sides}"
        )
        return (SUSPICIOUS, "packing-undecided", text) if version is None and file.is_peft else None
    if in_out is None:
        return None  # either order fits one of the layouts
    exchanged = (out, width) == ((rows, columns) if in_out else (columns, rows))
    if version is None:
        text = f"the factors are exchanged, as in PEFT up to 0.19.0, but peft_version is missing: {sides}"
        return (SUSPICIOUS, "packing-undecided", text) if exchanged else None
    old = version <= EXCHANGED_UNTIL
    if in_out or not (exchanged or old):
        return None
    if not exchanged:
        text = f"the factors are packed as in PEFT after 0.19.0, but peft_version is {said}: {sides}"
        return SUSPICIOUS, "packing-contradicted", text
    as_old = "the factors are exchanged, as in PEFT up to 0.19.0"
    if old:
        return NOTE, "packing-of-old-peft", f"{as_old}; readers must exchange them back: {sides}"
    return WRONG, "packing-exchanged", f"{as_old}, but peft_version is {said}: {sides}"


# --- findings ---


def misfits(adapter: AdapterFile, landing: Landing) -> Iterator[Finding]:
    """Find shapes that do not fit, and packings of a mixture that current readers misread."""
    return one_per_code(landing.misfits.items())


def flag(adapter: AdapterFile, landing: Landing) -> Iterator[Finding]:
    """Find fan_in_fan_out where every weight contradicts it."""
    text = (
        "fan_in_fan_out is true, but the model stores its weights (out, in), so the change of a square one would be "
        "transposed: {names}"
    )
    straight = _straight(adapter, landing) if adapter.get("fan_in_fan_out") is True else []
    yield from about(SUSPICIOUS, "fan-in-fan-out", text, straight)


def whole_weights(adapter: AdapterFile, landing: Landing) -> Iterator[Finding]:
    """Find full weights in the file whose shape differs from the model's."""
    spellings = Spellings(adapter, landing.model)
    grown: dict[str, str] = {}
    other: dict[str, str] = {}
    rows = 0
    whole = {path.removesuffix(".weight"): key for path, key in adapter.saved.items() if path.endswith(".weight")}
    for path, key in {**whole, **adapter.base_copies}.items():
        place, _ = spellings.place(path, Module(path, adapter.tensors, {}))
        ours, theirs = adapter.tensors.shapes[key], landing.model.modules.get(place or "")
        if theirs is None or ours == theirs:
            continue
        text = f"{' x '.join(map(str, ours))} instead of the model's {' x '.join(map(str, theirs))}"
        if ours[1:] == theirs[1:] and ours[0] > theirs[0]:
            grown[path], rows = text, max(rows, ours[0])
        else:
            other[path] = text
    text = (
        "{names}: {shapes}: the vocabulary has grown, so call model.resize_token_embeddings({rows}) before loading the "
        "adapter"
    )
    yield from about(NOTE, "vocabulary-grown", text, grown, shapes=next(iter(grown.values()), ""), rows=rows)
    text = "full weights of another shape: {names}: {shapes}: the adapter is for another model"
    yield from about(WRONG, "saved-shape", text, other, shapes=next(iter(other.values()), ""))


RULES = (misfits, flag, whole_weights)
