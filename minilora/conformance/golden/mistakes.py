"""What engines do wrong with an adapter of a person's own, for a model's own layers and widths.

Most rows are those of the golden adapters, `misreadings`. Those of that table that are about several adapters, or about
the golden models, are left out. Here are those that know how many layers a model has, and those about what an engine
does with what it has read. They replace parts of `Reading`, or these:

    given         a function of the adapter: as the engine takes it, with other factors
    rounded       (which, type): the weights that are rounded: "merged" ones, "all" after the merge, the "base"'s before
    cached        whose keys and values the prompt's are, before a last token of the other: "base" or "adapted"
    base          how the decoder itself is computed wrongly, see `bases.misdecoded`
    temperature   what all logits are divided by
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
from .reading import Config, Given, setting
from .subject import Subject

LAYER_NUMBER = re.compile(r"(?<=layers\.)\d+(?=\.)")
GENERAL_ALPHAS = (8, 16, 32)
"""What programs take for an alpha that they did not read."""
MOST_LAYERS = 40
"""Layers that are each left out in turn, where nothing else fits."""
ELSEWHERE = {"previous", "start", "weights", "config_of", "unweighted", "shared", "tokens"}
"""Parts of golden rows that are about several adapters, about the golden models, or about what is not computed here."""
OF_FOUR_BITS = ("swapped", "no mean")
"""How golden rows read a base in 4 bits wrongly, of which a model's own weights are not known here."""
PLAINEST = "the-adapter-is-not-applied"
"""What is named first of mistakes with the same numbers."""
OF_TWO_LAYERS = {"layers-are-swapped", "layer-0-is-left-out", "layer-1-is-left-out"}
"""Golden rows about models of two layers; `_of_layers` and `further_mistakes_of` have them for any."""
LEFT_OUT_TOGETHER = (
    ("k_proj", "v_proj"), ("q_proj", "k_proj"), ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"),
    ("o_proj", "down_proj"),
)  # fmt: skip
"""Modules that programs keep in one matrix, or split over devices in one way."""


def mistakes_of(subject: Subject) -> list[Wrong]:
    """Return the rows for a model and its adapter."""
    own = [*_of_heads(subject), *_of_layers(subject), *_of_modules(), *_of_factors(subject), *_of_all(subject)]
    flags = OF_TWO_LAYERS | {row.flag for row in own}
    patterns = any(subject.given.config.get(name) for name in ("rank_pattern", "alpha_pattern"))

    def is_here(row: Wrong) -> bool:
        parts = row.replaced_in(subject)
        elsewhere = ELSEWHERE & {*parts} or parts.get("base") in OF_FOUR_BITS or row.flag in flags
        return not elsewhere and (patterns or "pattern" not in row.flag)

    golden = MISREADINGS if subject.config.mixture is None else MIXTURE_MISREADINGS
    return sorted([*filter(is_here, golden), *own], key=lambda row: row.flag != PLAINEST)


def further_mistakes_of(subject: Subject) -> list[Wrong]:
    """Return a row for each layer and kind of module, left out or alone: many rows, for what no other one explains."""
    layers, kinds = range(min(subject.layers, MOST_LAYERS)), sorted({_kind(path) for path in subject.given.modules})
    rows = [Wrong(f"layer-{i}-is-left-out", f"the adapters of layer {i} are not applied",
                  {"applied": lambda path, i=i: _layer(path) != i}) for i in layers]  # fmt: skip
    rows += [Wrong(f"layer-{i}-alone", f"the adapters of layer {i} alone are applied",
                   {"applied": lambda path, i=i: _layer(path) == i}) for i in layers]  # fmt: skip
    rows += [Wrong(f"{kind.replace('_', '-')}-alone", f"the adapter of {kind} alone is applied",
                   {"applied": lambda path, kind=kind: _kind(path) == kind}) for kind in kinds]  # fmt: skip
    return rows


def _layer(path: str) -> int | None:
    """Return the number of the layer that a module is in, None outside of all."""
    match = LAYER_NUMBER.search(path)
    return int(match[0]) if match else None


def _kind(path: str) -> str:
    return path.rpartition(".")[2]


def _of_heads(subject: Subject) -> list[Wrong]:
    """Return the rows of the golden table that know the width of a head, for the model's own."""
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
    """Return the rows about layers: adapters in other layers, and layers without theirs."""
    L = subject.layers
    if L < 2:
        return []

    def moved(to: Callable[[int], int]) -> dict[str, Any]:
        """Let each layer's adapter act in another layer, where there is one."""

        def applied(path: str) -> bool:
            i = _layer(path)
            return i is None or 0 <= to(i) < L

        return {"place": lambda path: LAYER_NUMBER.sub(lambda match: str(to(int(match[0]))), path), "applied": applied}

    def alone(holds: Callable[[int], bool]) -> dict[str, Any]:
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
        Wrong("layers-are-reversed", "the layers' adapters act in the reverse order", moved(lambda i: L - 1 - i)),
        Wrong("layers-are-sorted-as-text", "the layers' adapters act in the order of their names as text, 10 before 2",
              moved(as_text.index)),
        Wrong("the-first-half-of-the-layers-alone", "the adapters of the first half of the layers alone act",
              alone(lambda i: i < L // 2)),
        Wrong("the-second-half-of-the-layers-alone", "the adapters of the second half of the layers alone act",
              alone(lambda i: i >= L // 2)),
        Wrong("every-second-layer-alone", "the adapters of the layers 0, 2, 4 ... alone act",
              alone(lambda i: i % 2 == 0)),
        Wrong("every-other-layer-alone", "the adapters of the layers 1, 3, 5 ... alone act",
              alone(lambda i: i % 2 == 1)),
        Wrong("layer-0-for-all", "the adapter of layer 0 acts in every layer",
              {"given": _with_factors_of(lambda path: LAYER_NUMBER.sub("0", path))}),
    ]  # fmt: skip


def _with_factors_of(other: Callable[[str], str], parts: str = "AB") -> Callable[[Given], Given]:
    """Return a function that lets modules have another module's factors, where these have the shapes of their own."""

    def given_otherwise(given: Given) -> Given:
        modules = {}
        for path, module in given.modules.items():
            theirs = given.modules.get(other(path), module)
            A = theirs.lora_A if "A" in parts and theirs.lora_A.shape == module.lora_A.shape else module.lora_A
            B = theirs.lora_B if "B" in parts and theirs.lora_B.shape == module.lora_B.shape else module.lora_B
            modules[path] = replace(module, lora_A=A, lora_B=B)
        return replace(given, modules=modules)

    return given_otherwise


def _of_modules() -> list[Wrong]:
    """Return rows about modules that programs keep together: some left out, or read with another one's factors."""
    rows = []
    for names in LEFT_OUT_TOGETHER:
        flag, several = "-".join(names).replace("_proj", ""), f"{', '.join(names[:-1])} and {names[-1]}"
        rows.append(Wrong(f"{flag}-are-left-out", f"the adapters of {several} are not applied",
                          {"applied": lambda path, names=names: not path.endswith(names)}))  # fmt: skip
    return [
        *rows,
        Wrong("q-and-v-alone", "the adapters of q_proj and v_proj alone are applied",
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
    """Return rows about parts of the factors: those of one device, of half of the ranks, and the way round."""

    def halved(path: str, BA: np.ndarray) -> np.ndarray:
        return np.concatenate([BA[: len(BA) // 2], 0 * BA[len(BA) // 2 :]])

    def of_one_device(path: str, BA: np.ndarray) -> np.ndarray:
        return halved(path, BA.T).T if path.endswith(("o_proj", "down_proj")) else halved(path, BA)

    rows = [
        Wrong("one-device-of-two-alone", "the update is that of the first device of two: half of the inputs of "
              "o_proj and down_proj, and half of the others' outputs", {"update": of_one_device}),
        Wrong("a-square-update-is-transposed", "the update of a square weight is transposed",
              {"update": lambda path, BA: BA.T if BA.shape[0] == BA.shape[1] else BA}),
        Wrong("half-of-the-outputs-alone",
              "the update reaches the first half of each module's outputs alone, as on one device of two",
              {"update": halved}),
        Wrong("half-of-the-inputs-alone", "the update reads the first half of each module's inputs alone, as on one "
              "device of two", {"update": lambda path, BA: halved(path, BA.T).T}),
    ]  # fmt: skip
    if subject.config.mixture is None:  # that of a mixture has a row of its own
        rows.append(Wrong("half-of-the-ranks-alone", "the first half of the ranks alone is used",
                          {"factors": lambda path, A, B: (A[: len(A) // 2], B[:, : len(A) // 2])}))  # fmt: skip
    return rows


def _of_all(subject: Subject) -> list[Wrong]:
    """Return rows about the scaling, the merged weights, and the keys and values of a prompt."""
    ranks = {len(module.lora_A) for module in subject.given.modules.values()}
    rows = [
        Wrong("the-update-is-halved", "half of the update is added", {"times": 0.5}),
        *(Wrong(f"{start}-{name}", f"{text} {name}", {"rounded": (which, dtype)})
          for start, (which, text) in ROUNDED_WEIGHTS.items()
          for name, dtype in (("bfloat16", "BF16"), ("float16", "F16"))),
        Wrong("keys-and-values-are-the-bases",
              "the prompt's keys and values are the base's: they are kept by its tokens alone", {"cached": "base"}),
        Wrong("the-last-token-is-the-bases", "the adapter acts on the prompt, and not on its last token",
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
    for alpha in GENERAL_ALPHAS:
        text = f"lora_alpha is not read: the scaling is {alpha} / r"
        rows.append(Wrong(f"alpha-{alpha}-is-taken", text, {"scale": _alpha_over_rank(alpha, 1.0)}))
        if subject.given.config.get("use_rslora"):
            text = f"lora_alpha is not read: the scaling is {alpha} / the root of r"
            rows.append(Wrong(f"alpha-{alpha}-is-taken-over-the-root", text, {"scale": _alpha_over_rank(alpha, 0.5)}))
    return rows


def _alpha_over_rank(alpha: int, power: float) -> Callable[[Config, str], float]:
    return lambda config, path: float(alpha / int(setting(config, "r", path)) ** power)


ROUNDED_WEIGHTS = {
    "merged-in": ("merged", "the update was added to the weights, and these were rounded to"),
    "all-weights-in": ("all", "the adapter was merged, and then all weights of the model were rounded to"),
    "the-base-in": ("base", "the base's weights are rounded, and the adapter acts beside them: they are in"),
}
"""Which weights are rounded, and how that is said, by the beginning of a flag. It is no mistake in that precision."""
