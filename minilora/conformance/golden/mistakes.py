"""Known mistakes of engines with a user's own adapter, for the layers and widths of any model.

Most rows come from the golden adapters' table, `misreadings`, without those about several adapters or about the golden
models. This file adds the rows that depend on the number of layers, and those about what an engine does with an adapter
once it has read it. They replace parts of `Reading`, or these:

    given         a function that returns the adapter with other factors, as the engine uses it
    rounded       (which, type): the weights to round: "merged" ones, "all" after the merge, or the "base" before it
    cached        "base": the prompt's keys and values are the base's, and its last token is computed with the adapter;
                  "adapted": the other way round
    base          the mistake in the decoder itself, see `bases.misdecoded`
    temperature   the number that all logits are divided by
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ...layers.rotary import halves_from_interleaved, interleaved_from_halves
from ..naming import Wrong
from .misreadings import MISREADINGS, MIXTURE_MISREADINGS
from .reading import AdapterData, ConfigJson, setting
from .subject import Subject

LAYER_NUMBER = re.compile(r"(?<=layers\.)\d+(?=\.)")
ASSUMED_ALPHAS = (8, 16, 32)
"""Values that programs assume for an alpha that they did not read."""
MAX_LAYERS = 40
"""The largest number of layers that are left out one by one, when nothing else fits."""
NOT_HERE = {"previous", "start", "weights", "config_of", "unweighted", "shared", "tokens"}
"""Parts of golden rows about several adapters, about the golden models, or about features not supported here."""
NF4_MISTAKES = ("swapped", "no mean")
"""Golden rows that misread a 4-bit base; they are skipped, since a user's base is only known dequantized."""
FIRST_NAMED = "the-adapter-is-not-applied"
"""The mistake that is named first among those with the same numbers."""
OF_TWO_LAYERS = {"layers-are-swapped", "layer-0-is-left-out", "layer-1-is-left-out"}
"""Golden rows for models of two layers; `_of_layers` and `further_mistakes_of` replace them for any number."""
ATOMIC_MODULES = (
    ("k_proj", "v_proj"), ("q_proj", "k_proj"), ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"),
    ("o_proj", "down_proj"),
)  # fmt: skip
"""Modules that programs fuse into one matrix, or split over devices in the same way."""


def mistakes_of(subject: Subject) -> list[Wrong]:
    """Return the rows that apply to a model and its adapter."""
    own = [*_of_heads(subject), *_of_layers(subject), *_of_modules(), *_of_factors(subject), *_of_all(subject)]
    flags = OF_TWO_LAYERS | {row.flag for row in own}
    patterns = any(subject.given.config.get(name) for name in ("rank_pattern", "alpha_pattern"))

    def is_here(row: Wrong) -> bool:
        parts = row.replaced_in(subject)
        elsewhere = NOT_HERE & {*parts} or parts.get("base") in NF4_MISTAKES or row.flag in flags
        return not elsewhere and (patterns or "pattern" not in row.flag)

    golden = MISREADINGS if subject.config.mixture is None else MIXTURE_MISREADINGS
    return sorted([*filter(is_here, golden), *own], key=lambda row: row.flag != FIRST_NAMED)


def further_mistakes_of(subject: Subject) -> list[Wrong]:
    """Return rows for leaving out, or applying only, each layer or kind of module. They are many, so tried last."""
    layers, kinds = range(min(subject.layers, MAX_LAYERS)), sorted({_kind(path) for path in subject.given.modules})
    rows = [Wrong(f"layer-{i}-is-left-out", f"the adapters of layer {i} are not applied",
                  {"applied": lambda path, i=i: _layer(path) != i}) for i in layers]  # fmt: skip
    rows += [Wrong(f"layer-{i}-alone", f"only the adapters of layer {i} are applied",
                   {"applied": lambda path, i=i: _layer(path) == i}) for i in layers]  # fmt: skip
    rows += [Wrong(f"{kind.replace('_', '-')}-alone", f"only the adapter of {kind} is applied",
                   {"applied": lambda path, kind=kind: _kind(path) == kind}) for kind in kinds]  # fmt: skip
    return rows


def _layer(path: str) -> int | None:
    """Return the number of the layer that a module is in, or None if it is in no layer."""
    match = LAYER_NUMBER.search(path)
    return int(match[0]) if match else None


def _kind(path: str) -> str:
    return path.rpartition(".")[2]


def _of_heads(subject: Subject) -> list[Wrong]:
    """Return the golden table's rows that depend on a head's width, for the width of the model's heads."""
    D = subject.config.head_dim

    def rows_of(ends: tuple[str, ...], change: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
        return {"factors": lambda path, A, B: (A, change(B) if path.endswith(ends) else B)}

    turns = {
        "rows-of-q-and-k-are-not-permuted": rows_of(("q_proj", "k_proj"), lambda B: halves_from_interleaved(B, D)),
        "rows-of-q-and-k-are-permuted": rows_of(("q_proj", "k_proj"), lambda B: interleaved_from_halves(B, D)),
        "heads-of-k-and-v-are-exchanged": rows_of(("k_proj", "v_proj"), lambda B: np.roll(B, D, axis=0)),
    }
    return [replace(row, parts=turns[row.flag]) for row in MISREADINGS if row.flag in turns]


def _of_layers(subject: Subject) -> list[Wrong]:
    """Return the rows about layers: adapters in the wrong layers, and layers without their adapters."""
    L = subject.layers
    if L < 2:
        return []

    def moved(to: Callable[[int], int]) -> dict[str, Any]:
        """Apply each layer's adapter in another layer, if that layer exists."""

        def applied(path: str) -> bool:
            i = _layer(path)
            return i is None or 0 <= to(i) < L

        return {"place": lambda path: LAYER_NUMBER.sub(lambda match: str(to(int(match[0]))), path), "applied": applied}

    def only(holds: Callable[[int], bool]) -> dict[str, Any]:
        return {"applied": lambda path: (i := _layer(path)) is None or holds(i)}

    as_text = sorted(range(L), key=str)
    return [
        Wrong("layers-are-shifted-up", "each layer's adapter acts in the next layer, and the last one's in the first",
              moved(lambda i: (i + 1) % L)),
        Wrong("layers-are-shifted-down", "each layer's adapter acts in the layer before, and the first one's in the "
              "last", moved(lambda i: (i - 1) % L)),
        Wrong("layers-are-one-too-high", "each layer's adapter acts in the next layer, and the last one's nowhere",
              moved(lambda i: i + 1)),
        Wrong("layers-are-one-too-low", "each layer's adapter acts in the layer before, and the first one's nowhere",
              moved(lambda i: i - 1)),
        Wrong("layers-are-reversed", "the layers' adapters are applied in reverse order", moved(lambda i: L - 1 - i)),
        Wrong("layers-are-sorted-as-text", "the layers' adapters are applied in alphabetical order, layer 10 before 2",
              moved(as_text.index)),
        Wrong("the-first-half-of-the-layers-alone", "only the adapters of the first half of the layers are applied",
              only(lambda i: i < L // 2)),
        Wrong("the-second-half-of-the-layers-alone", "only the adapters of the second half of the layers are applied",
              only(lambda i: i >= L // 2)),
        Wrong("every-second-layer-alone", "only the adapters of layers 0, 2, 4, ... are applied",
              only(lambda i: i % 2 == 0)),
        Wrong("every-other-layer-alone", "only the adapters of layers 1, 3, 5, ... are applied",
              only(lambda i: i % 2 == 1)),
        Wrong("layer-0-for-all", "the adapter of layer 0 is applied in every layer",
              {"given": _with_factors_of(lambda path: LAYER_NUMBER.sub("0", path))}),
    ]  # fmt: skip


def _with_factors_of(other: Callable[[str], str], parts: str = "AB") -> Callable[[AdapterData], AdapterData]:
    """Return a function that gives modules another module's factors, if the shapes are the same."""

    def given_otherwise(given: AdapterData) -> AdapterData:
        modules = {}
        for path, module in given.modules.items():
            theirs = given.modules.get(other(path), module)
            A = theirs.lora_A if "A" in parts and theirs.lora_A.shape == module.lora_A.shape else module.lora_A
            B = theirs.lora_B if "B" in parts and theirs.lora_B.shape == module.lora_B.shape else module.lora_B
            modules[path] = replace(module, lora_A=A, lora_B=B)
        return replace(given, modules=modules)

    return given_otherwise


def _of_modules() -> list[Wrong]:
    """Return the rows about modules that programs fuse: some are left out, or read with another one's factors."""
    rows = []
    for names in ATOMIC_MODULES:
        flag, several = "-".join(names).replace("_proj", ""), f"{', '.join(names[:-1])} and {names[-1]}"
        rows.append(Wrong(f"{flag}-are-left-out", f"the adapters of {several} are not applied",
                          {"applied": lambda path, names=names: not path.endswith(names)}))  # fmt: skip
    return [
        *rows,
        Wrong("q-and-v-alone", "only the adapters of q_proj and v_proj are applied",
              {"applied": lambda path: path.endswith(("q_proj", "v_proj"))}),
        Wrong("gate-twice", "up_proj has gate_proj's adapter: it was read twice, and up_proj's never",
              {"given": _with_factors_of(lambda path: path.replace("up_proj", "gate_proj"))},
              "unslothai/unsloth-zoo #942"),
        Wrong("up-twice", "gate_proj has up_proj's adapter: it was read twice, and gate_proj's never",
              {"given": _with_factors_of(lambda path: path.replace("gate_proj", "up_proj"))}),
        Wrong("lora-a-of-q-for-all", "k_proj and v_proj have the lora_A of q_proj",
              {"given": _with_factors_of(lambda path: re.sub(r"[kv]_proj$", "q_proj", path), "A")}),
    ]  # fmt: skip


def _of_factors(subject: Subject) -> list[Wrong]:
    """Return the rows about parts of an update: one device's share, half of the ranks, a transposed square."""

    def halved(path: str, BA: np.ndarray) -> np.ndarray:
        return np.concatenate([BA[: len(BA) // 2], 0 * BA[len(BA) // 2 :]])

    def of_one_device(path: str, BA: np.ndarray) -> np.ndarray:
        return halved(path, BA.T).T if path.endswith(("o_proj", "down_proj")) else halved(path, BA)

    rows = [
        Wrong("one-device-of-two-alone", "only the first of two devices applies its update: half of the inputs of "
              "o_proj and down_proj, and half of the others' outputs", {"update": of_one_device}),
        Wrong("a-square-update-is-transposed", "the update of a square weight is transposed",
              {"update": lambda path, BA: BA.T if BA.shape[0] == BA.shape[1] else BA}),
        Wrong("half-of-the-outputs-alone",
              "the update reaches only the first half of each module's outputs, as on one of two devices",
              {"update": halved}),
        Wrong("half-of-the-inputs-alone", "the update reads only the first half of each module's inputs, as on one "
              "of two devices", {"update": lambda path, BA: halved(path, BA.T).T}),
    ]  # fmt: skip
    if subject.config.mixture is None:  # MIXTURE_MISREADINGS has a row for this
        rows.append(Wrong("half-of-the-ranks-alone", "only the first half of the ranks is used",
                          {"factors": lambda path, A, B: (A[: len(A) // 2], B[:, : len(A) // 2])}))  # fmt: skip
    return rows


def _of_all(subject: Subject) -> list[Wrong]:
    """Return the rows about the scaling, the merged weights, and a prompt's keys and values."""
    ranks = {len(module.lora_A) for module in subject.given.modules.values()}
    rows = [
        Wrong("the-update-is-halved", "only half of the update is added", {"times": 0.5}),
        *(Wrong(f"{start}-{name}", f"{text} {name}", {"rounded": (which, dtype)})
          for start, (which, text) in ROUNDED_WEIGHTS.items()
          for name, dtype in (("bfloat16", "BF16"), ("float16", "F16"))),
        Wrong("keys-and-values-are-the-bases",
              "the prompt's keys and values are the base's: they are cached by its tokens only", {"cached": "base"}),
        Wrong("the-last-token-is-the-bases", "the adapter is applied to the prompt, but not to its last token",
              {"cached": "adapted"}),
    ]  # fmt: skip
    if len(ranks) > 1:
        by_largest = {"scale": lambda config, path: float(setting(config, "lora_alpha", path)) / max(ranks)}
        text = "alpha is divided by the largest rank of all modules"
        rows.append(Wrong("alpha-is-divided-by-the-largest-rank", text, by_largest))
    if subject.given.saved:
        text = "nothing in the file is applied, neither factors nor modules trained in full: this is the base"
        nothing: dict[str, Any] = {"applied": lambda path: False, "saved": lambda W, trained: W}
        rows.append(Wrong("nothing-in-the-file-is-applied", text, nothing))
    for alpha in ASSUMED_ALPHAS:
        text = f"lora_alpha is not read: the scaling is {alpha} / r"
        rows.append(Wrong(f"alpha-{alpha}-is-taken", text, {"scale": _alpha_over_rank(alpha, 1.0)}))
        if subject.given.config.get("use_rslora"):
            text = f"lora_alpha is not read: the scaling is {alpha} / sqrt(r)"
            rows.append(Wrong(f"alpha-{alpha}-is-taken-over-the-root", text, {"scale": _alpha_over_rank(alpha, 0.5)}))
    return rows


def _alpha_over_rank(alpha: int, power: float) -> Callable[[ConfigJson, str], float]:
    return lambda config, path: float(alpha / int(setting(config, "r", path)) ** power)


ROUNDED_WEIGHTS = {
    "merged-in": ("merged", "the weights with the update were rounded to"),
    "all-weights-in": ("all", "the adapter was merged, and then all weights of the model were rounded to"),
    "the-base-in": ("base", "the adapter is applied to a base whose weights were rounded to"),
}
"""The weights to round and the start of the sentence, keyed by the start of the flag; the type's name follows both.

Rounding is not a mistake if the engine declared that precision.
"""
