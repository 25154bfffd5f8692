"""What engines do wrong with an adapter, for a model's own layers and widths.

Most rows are those of the golden adapters, `minilora.conformance.golden.misreadings`. Rows of that table that are about
its own models, or about the case before, give way to rows for this model: its heads' width, its layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...guards.tensorfile import decode, encode
from ...layers.rotary import halves_from_interleaved, interleaved_from_halves
from ..golden.bases import EMBEDDING, HEAD
from ..golden.formulas import Config, Formulas, setting
from ..golden.misreadings import MISREADINGS, Misreading
from .given import Subject

LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")
ROUNDED = "rounded"
"""The part of a row that no formula has: the type that changed weights are rounded to."""
ROUNDINGS = {"merged-in-bfloat16": "BF16", "merged-in-float16": "F16"}
"""The types of merged weights, by the flags of their rows."""
GENERAL_ALPHAS = (8, 16, 32)
"""What programs take for an alpha that they did not read."""
MOST_LAYERS = 40
"""Layers that are each left out in turn, where nothing else fits."""


def mistakes_of(subject: Subject) -> list[Misreading]:
    """Return the rows for a model and its adapter."""
    own = [*_of_heads(subject), *_of_layers(subject), *_of_all(subject)]
    replaced = {row.flag for row in own}
    patterns = any(subject.given.config.get(name) for name in ("rank_pattern", "alpha_pattern"))
    general = [
        row for row in MISREADINGS
        if row.flag not in replaced and not {"previous", "start", "base", "weights", "config_of"} & {*row.parts}
        and not re.fullmatch(r"layer-\d+-is-left-out|layers-are-swapped", row.flag)
        and (patterns or "pattern" not in row.flag)
    ]  # fmt: skip
    return [*general, *own]


def outline(subject: Subject, mistake: Misreading | None) -> tuple[Any, ...] | None:
    """Return what decides a mistake's numbers, where its parts say it without them; () for the right ones, else None.

    Of many rows it is plain that they change nothing here, as of those about DoRA, or the same as another one.
    """
    modules, parts = subject.given.modules, dict(mistake.parts) if mistake is not None else {}
    of = {
        "magnitude": any(m.magnitude is not None for m in modules.values()),
        "bias": any(m.bias is not None for m in modules.values()),
        "trained_bias": any(m.trained_bias is not None for m in modules.values()),
        "saved": bool(subject.given.saved),
        "ties": any(f"{path}.weight" in (EMBEDDING, HEAD) for path in (*modules, *subject.given.saved)),
    }  # fmt: skip
    of |= dict.fromkeys(("gain", "length"), of["magnitude"])
    parts = {name: part for name, part in parts.items() if of.get(name, True)}
    if not parts.keys() <= {"scale", "times", "applied", "place"}:
        return None
    formulas = Formulas(**parts)
    effects: list[tuple[str, float | None]] = []
    for path in modules:
        if not formulas.applied(path):
            effects.append((path, None))
            continue
        place = formulas.place(path)
        s = float(f"{formulas.scale(subject.given.config, path) * formulas.times:.12g}")
        effects.append((place if f"{place}.weight" in subject.arrays else path, s))
    return tuple(effects)


def _of_heads(subject: Subject) -> list[Misreading]:
    """Return the rows of the golden table that know the width of a head."""
    D = subject.config.head_dim
    known = {row.flag: row for row in MISREADINGS}

    def rows_of(ends: tuple[str, ...], change: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
        return {"factors": lambda path, A, B: (A, change(B) if path.endswith(ends) else B)}

    turns = {
        "rows-of-q-and-k-are-not-permuted": rows_of(("q_proj", "k_proj"), lambda B: halves_from_interleaved(B, D)),
        "rows-of-q-and-k-are-permuted": rows_of(("q_proj", "k_proj"), lambda B: interleaved_from_halves(B, D)),
        "heads-of-k-and-v-are-exchanged": rows_of(("k_proj", "v_proj"), lambda B: np.roll(B, D, axis=0)),
    }
    return [Misreading(flag, known[flag].name, parts, known[flag].source) for flag, parts in turns.items()]


def _of_layers(subject: Subject) -> list[Misreading]:
    """Return the rows about layers: adapters in other layers, and layers without theirs."""
    L = subject.layers
    if L < 2:
        return []

    def moved(to: Callable[[int], int]) -> dict[str, Any]:
        return {"place": lambda path: LAYER.sub(lambda match: str(to(int(match[0]))), path)}

    def alone(holds: Callable[[int], bool]) -> dict[str, Any]:
        return {"applied": lambda path: (match := LAYER.search(path)) is None or holds(int(match[0]))}

    rows = [
        ("layers-are-shifted-up", "each layer's adapter acts in the next layer", moved(lambda i: (i + 1) % L)),
        ("layers-are-shifted-down", "each layer's adapter acts in the layer before", moved(lambda i: (i - 1) % L)),
        ("layers-are-reversed", "the layers' adapters act in the reverse order", moved(lambda i: L - 1 - i)),
        ("layers-are-sorted-as-text", "the layers' adapters act in the order of their names as text, 10 before 2",
         moved(lambda i: sorted(range(L), key=str)[i])),
        ("the-first-half-of-the-layers-alone", "the adapters of the first half of the layers alone act",
         alone(lambda i: i < L // 2)),
        ("the-second-half-of-the-layers-alone", "the adapters of the second half of the layers alone act",
         alone(lambda i: i >= L // 2)),
        ("every-second-layer-alone", "the adapters of the layers 0, 2, 4 ... alone act", alone(lambda i: i % 2 == 0)),
        ("every-other-layer-alone", "the adapters of the layers 1, 3, 5 ... alone act", alone(lambda i: i % 2 == 1)),
        ("layer-0-for-all", "the adapter of layer 0 acts in every layer", {"from_layer": 0}),
    ]  # fmt: skip
    return [Misreading(*row) for row in rows]


def layers_left_out(subject: Subject) -> list[Misreading]:
    """Return a row for each layer, whose adapters are left out: many rows, for what no other one explains."""

    def without(i: int) -> Callable[[str], bool]:
        return lambda path: (match := LAYER.search(path)) is None or int(match[0]) != i

    return [
        Misreading(f"layer-{i}-is-left-out", f"the adapters of layer {i} are not applied", {"applied": without(i)})
        for i in range(min(subject.layers, MOST_LAYERS))
    ]


def _of_all(subject: Subject) -> list[Misreading]:
    """Return rows about the scaling, the way round, and the type of the merged weights."""
    rows = [
        Misreading("a-square-update-is-transposed", "the update of a square weight is transposed",
                   {"update": lambda path, BA: BA.T if BA.shape[0] == BA.shape[1] else BA}),
        Misreading("the-update-is-halved", "half of the update is added", {"times": 0.5}),
        Misreading("half-of-the-ranks-alone", "the first half of the ranks alone is used",
                   {"factors": lambda path, A, B: (A[: len(A) // 2], B[:, : len(A) // 2])}),
    ]  # fmt: skip
    for flag, dtype in ROUNDINGS.items():
        text = f"the update was added to the weights, and these were rounded to {flag.removeprefix('merged-in-')}"
        rows.append(Misreading(flag, text, {ROUNDED: dtype}))
    for alpha in GENERAL_ALPHAS:
        text = f"lora_alpha is not read: the scaling is {alpha} / r"
        rows.append(Misreading(f"alpha-{alpha}-is-taken", text, {"scale": _alpha_over_rank(alpha)}))
    return rows


def _alpha_over_rank(alpha: int) -> Callable[[Config, str], float]:
    return lambda config, path: alpha / int(setting(config, "r", path))


def rounded(arrays: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Return changed weights as a type holds them."""
    with np.errstate(over="ignore"):
        return {
            name: decode(encode(array.astype("f4"), dtype), dtype).reshape(array.shape).astype(array.dtype)
            for name, array in arrays.items()
        }
