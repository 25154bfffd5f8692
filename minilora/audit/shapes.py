"""Whether the factors of each module that landed have the shapes of the model's weight.

a linear layer's (out, in), or (in, out) where the model stores it so; an embedding's (V, dim); a convolution's
(out, in / groups, kernel)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..checks import short
from ..files.modelfolder import EMBEDDING, HEAD
from .adapterfile import AdapterFile, Module
from .expertshapes import compare_experts
from .findings import NOTE, SUSPICIOUS, WRONG, Finding, counted, listed
from .landing import Landing
from .modelheaders import ModelHeaders, Shape
from .spellings import Spellings


def compare_shapes(adapter: AdapterFile, model: ModelHeaders, landing: Landing) -> None:
    """Compare the shapes of what landed with the model's."""
    wrong: dict[tuple[str, str], list[str]] = {}
    details: dict[tuple[str, str], str] = {}
    for path, place in landing.places.items():
        module = adapter.modules[path]
        widths = module.widths(adapter.tensors)
        if widths is None:
            continue
        if module.kind == "experts":
            outcome = compare_experts(adapter, model, path, place, landing)
        else:
            shape = model.modules.get(place, model.arrays.get(place))
            if shape is None:
                landing.packed.add(path)
                continue
            outcome = _compare_one(adapter, model, module, place, shape, landing)
        if outcome is None:
            landing.fitting.add(path)
        else:
            level, code, text = outcome
            wrong.setdefault((level, code), []).append(path)
            details.setdefault((level, code), text)
    for (level, code), paths in wrong.items():
        also = f"; so in {counted(len(paths), 'module')}: {listed(paths)}" if len(paths) > 1 else ""
        landing.findings.append(Finding(level, code, f"{short(paths[0])}: {details[level, code]}{also}", tuple(paths)))
    _check_flag(adapter, landing)
    landing.findings += _saved(adapter, model)


def _saved(adapter: AdapterFile, model: ModelHeaders) -> Iterator[Finding]:
    """Yield whole weights beside the factors that are not of the shape of the model's own."""
    spellings = Spellings(adapter, model)
    grown: dict[str, str] = {}
    other: dict[str, str] = {}
    whole = {path.removesuffix(".weight"): key for path, key in adapter.saved.items() if path.endswith(".weight")}
    for path, key in {**whole, **adapter.base_copies}.items():
        place, _ = spellings.place(path, Module(path, {}))
        ours, theirs = adapter.tensors.shapes[key], model.modules.get(place or "")
        if theirs is None or ours == theirs:
            continue
        text = f"{' x '.join(map(str, ours))} beside the model's {' x '.join(map(str, theirs))}"
        (grown if ours[1:] == theirs[1:] and ours[0] > theirs[0] else other)[path] = text
    if grown:
        rows = max(adapter.tensors.shapes[{**whole, **adapter.base_copies}[path]][0] for path in grown)
        text = (
            f"{listed(list(grown))}: {next(iter(grown.values()))}: the vocabulary has grown, and the adapter loads "
            f"after model.resize_token_embeddings({rows}) alone"
        )
        yield Finding(NOTE, "vocabulary-grown", text, tuple(grown))
    if other:
        text = f"whole weights of another shape: {listed(list(other))}: {next(iter(other.values()))}"
        yield Finding(WRONG, "saved-shape", f"{text}: the adapter is of another model", tuple(other))


def _compare_one(
    adapter: AdapterFile, model: ModelHeaders, module: Module, place: str, shape: Shape, landing: Landing
) -> tuple[str, str, str] | None:
    """Return what is wrong with a module's shapes, None where they fit."""
    out, width = module.widths(adapter.tensors) or (0, 0)
    theirs = f"the factors are for a weight of {out} x {width}, and the model's is {' x '.join(map(str, shape))}"
    if module.kind == "embedding":
        if shape == (width, out):
            return None
        if shape[1:] == (out,):
            return (WRONG, "vocabulary-differs", f"{theirs}: the vocabulary was resized, or the model is another one")
        return WRONG, "shape-differs", theirs
    if len(shape) > 2:  # a convolution's: (out, in / groups, kernel)
        fits = shape[0] == out and (width == math.prod(shape[1:]) or width % math.prod(shape[1:]) == 0)
        return None if fits else (WRONG, "shape-differs", theirs)
    if shape == (out, width):
        return None
    if shape == (width, out):
        if _lies_in_out(adapter, model, place, shape):
            landing.turned.add(module.path)
            return None
        return (
            WRONG, "shape-turned",
            f"{theirs}: the other way round it would fit, so the factors are transposed or exchanged, or the weight is "
            "stored (in, out) and fan_in_fan_out is not set",
        )  # fmt: skip
    if place.rpartition(".")[2] in (HEAD, EMBEDDING) and shape[1] == width:
        return WRONG, "vocabulary-differs", f"{theirs}: the vocabulary was resized, or the model is another one"
    if shape[1] == width and shape[0] % out == 0:
        return WRONG, "shape-is-a-part", f"{theirs}: the rows of one of {shape[0] // out} parts, as of one device"
    if shape[0] == out and shape[1] % width == 0:
        return WRONG, "shape-is-a-part", f"{theirs}: the columns of one of {shape[1] // width} parts, as of one device"
    return WRONG, "shape-differs", f"{theirs}: the adapter is of another model"


def _lies_in_out(adapter: AdapterFile, model: ModelHeaders, place: str, shape: Shape) -> bool:
    """Return whether a weight (in, out) is stored so, as GPT-2's are: the flag says it, or the bias beside it."""
    if (adapter.config or {}).get("fan_in_fan_out") is True:
        return True
    return shape[0] != shape[1] and model.bias(place) == (shape[1],)


def _check_flag(adapter: AdapterFile, landing: Landing) -> None:
    """Say where fan_in_fan_out contradicts every weight: a square one would then be changed the wrong way round."""
    linear = [path for path in landing.fitting if adapter.modules[path].kind == "linear"]
    if (adapter.config or {}).get("fan_in_fan_out") is not True or not linear:
        return
    straight = [p for p in linear if p not in landing.turned and len({*adapter.modules[p].widths(adapter.tensors)}) > 1]  # type: ignore[misc]
    if straight and not landing.turned:
        text = (
            f"fan_in_fan_out is true, and the model stores its weights (out, in): {listed(straight)}. A square weight "
            "would be changed the wrong way round"
        )
        landing.findings.append(Finding(SUSPICIOUS, "fan-in-fan-out", text, tuple(straight)))
