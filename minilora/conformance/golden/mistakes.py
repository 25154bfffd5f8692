"""What engines do wrong with an adapter, for a model's own layers and widths.

Most rows are those of the golden adapters, `minilora.conformance.golden.misreadings`. Rows of that table that are about
its own models, or about the case before, give way to rows for this model: its heads' width, its layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...layers.rotary import halves_from_interleaved, interleaved_from_halves
from ..naming import Wrong
from .bases import EMBEDDING, HEAD
from .misreadings import MISREADINGS, MIXTURE_MISREADINGS
from .reading import Config, Given, Reading, setting
from .subject import Subject

LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")
GENERAL_ALPHAS = (8, 16, 32)
"""What programs take for an alpha that they did not read."""
MOST_LAYERS = 40
"""Layers that are each left out in turn, where nothing else fits."""
ELSEWHERE = {"previous", "start", "base", "weights", "config_of", "unweighted", "shared"}
"""Parts of golden rows that are about several adapters, about the golden models, or about a decoder of another kind."""
LEFT_OUT_TOGETHER = (
    ("k_proj", "v_proj"), ("q_proj", "k_proj"), ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"),
    ("o_proj", "down_proj"),
)  # fmt: skip
"""Modules that programs keep in one matrix, or split over devices in one way."""


@dataclass(frozen=True, eq=False)
class Mistake(Wrong):
    """One thing that an engine may do wrong: a misreading, or something that it does with what it read."""

    reading: Callable[[Given], Given] = lambda adapter: adapter  # the adapter as it takes it, with other factors
    rounded: str = ""  # the type that weights are rounded to
    which: str = ""  # of them: the "merged" ones, "all" after the merge, or the "base"'s before
    cached: str = ""  # whose keys and values the prompt's are: "base", or "adapted", before a last token of the other


def mistakes_of(subject: Subject) -> list[Mistake]:
    """Return the rows for a model and its adapter."""
    own = [*_of_heads(subject), *_of_layers(subject), *_of_modules(), *_of_factors(), *_of_all(subject)]
    replaced = {row.flag for row in own}
    patterns = any(subject.given.config.get(name) for name in ("rank_pattern", "alpha_pattern"))
    general = [
        Mistake(row.flag, row.says, row.parts, row.source)
        for row in (MISREADINGS if subject.config.mixture is None else MIXTURE_MISREADINGS)
        if row.flag not in replaced
        and not ELSEWHERE & {*row.of(subject)}
        and not re.fullmatch(r"layer-\d+-is-left-out|layers-are-swapped", row.flag)
        and (patterns or "pattern" not in row.flag)
    ]
    return [*general, *own]


def outline(subject: Subject, mistake: Mistake | None) -> tuple[Any, ...] | None:
    """Return what decides a mistake's numbers, where its parts say it without them; None where they do not.

    Of many rows it is plain that they change nothing here, as of those about DoRA, or the same as another one.
    """
    modules, parts = subject.given.modules, dict(mistake.of(subject)) if mistake is not None else {}
    of = {
        "magnitude": any(m.magnitude is not None for m in modules.values()),
        "bias": any(m.bias is not None for m in modules.values()),
        "trained_bias": any(m.trained_bias is not None for m in modules.values()),
        "saved": bool(subject.given.saved),
        "ties": any(f"{path}.weight" in (EMBEDDING, HEAD) for path in (*modules, *subject.given.saved)),
    }
    of |= dict.fromkeys(("gain", "length"), of["magnitude"])
    parts = {name: part for name, part in parts.items() if of.get(name, True)}
    if not parts.keys() <= {"scale", "times", "applied", "place"}:
        return None
    if mistake is not None and (mistake.rounded or mistake.cached or mistake.reading is not Mistake.reading):
        return None
    formulas = Reading(**parts)
    effects: list[tuple[str, float | None]] = []
    for path in modules:
        if not formulas.applied(path):
            effects.append((path, None))
            continue
        place = formulas.place(path)
        s = float(f"{formulas.scale(subject.given.config, path) * formulas.times:.12g}")
        effects.append((place if f"{place}.weight" in subject.arrays else path, s))
    return tuple(effects)


def _of_heads(subject: Subject) -> list[Mistake]:
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
    return [Mistake(flag, known[flag].says, parts, known[flag].source) for flag, parts in turns.items()]


def _of_layers(subject: Subject) -> list[Mistake]:
    """Return the rows about layers: adapters in other layers, and layers without theirs."""
    L = subject.layers
    if L < 2:
        return []

    def number(path: str) -> int | None:
        match = LAYER.search(path)
        return int(match[0]) if match else None

    def moved(to: Callable[[int], int]) -> dict[str, Any]:
        """Let each layer's adapter act in another layer, where there is one."""

        def applied(path: str) -> bool:
            i = number(path)
            return i is None or 0 <= to(i) < L

        return {"place": lambda path: LAYER.sub(lambda match: str(to(int(match[0]))), path), "applied": applied}

    def alone(holds: Callable[[int], bool]) -> dict[str, Any]:
        return {"applied": lambda path: (i := number(path)) is None or holds(i)}

    rows = [
        ("layers-are-shifted-up", "each layer's adapter acts in the next layer, and the last one's in the first",
         moved(lambda i: (i + 1) % L)),
        ("layers-are-shifted-down", "each layer's adapter acts in the layer before, and the first one's in the last",
         moved(lambda i: (i - 1) % L)),
        ("layers-are-one-too-high", "each layer's adapter acts in the next layer, and the last one's nowhere",
         moved(lambda i: i + 1)),
        ("layers-are-one-too-low", "each layer's adapter acts in the layer before, and the first one's nowhere",
         moved(lambda i: i - 1)),
        ("layers-are-reversed", "the layers' adapters act in the reverse order", moved(lambda i: L - 1 - i)),
        ("layers-are-sorted-as-text", "the layers' adapters act in the order of their names as text, 10 before 2",
         moved(lambda i: sorted(range(L), key=str).index(i))),
        ("the-first-half-of-the-layers-alone", "the adapters of the first half of the layers alone act",
         alone(lambda i: i < L // 2)),
        ("the-second-half-of-the-layers-alone", "the adapters of the second half of the layers alone act",
         alone(lambda i: i >= L // 2)),
        ("every-second-layer-alone", "the adapters of the layers 0, 2, 4 ... alone act", alone(lambda i: i % 2 == 0)),
        ("every-other-layer-alone", "the adapters of the layers 1, 3, 5 ... alone act", alone(lambda i: i % 2 == 1)),
    ]  # fmt: skip
    taken = _taken(lambda path: LAYER.sub("0", path))
    return [
        *(Mistake(*row) for row in rows),
        Mistake("layer-0-for-all", "the adapter of layer 0 acts in every layer", {}, reading=taken),
    ]


def layers_left_out(subject: Subject) -> list[Mistake]:
    """Return a row for each layer, whose adapters are left out: many rows, for what no other one explains."""

    def without(i: int) -> Callable[[str], bool]:
        return lambda path: (match := LAYER.search(path)) is None or int(match[0]) != i

    return [
        Mistake(f"layer-{i}-is-left-out", f"the adapters of layer {i} are not applied", {"applied": without(i)})
        for i in range(min(subject.layers, MOST_LAYERS))
    ]


def acting_alone(subject: Subject) -> list[Mistake]:
    """Return rows of one layer's adapters alone, and of one kind of module's: also for what no other one explains."""

    def of_layer(i: int) -> Callable[[str], bool]:
        return lambda path: (match := LAYER.search(path)) is not None and int(match[0]) == i

    def of_kind(kind: str) -> Callable[[str], bool]:
        return lambda path: path.rpartition(".")[2] == kind

    kinds = sorted({path.rpartition(".")[2] for path in subject.given.modules})
    return [
        *(
            Mistake(f"layer-{i}-alone", f"the adapters of layer {i} alone are applied", {"applied": of_layer(i)})
            for i in range(min(subject.layers, MOST_LAYERS))
        ),
        *(
            Mistake(
                f"{kind.replace('_', '-')}-alone", f"the adapter of {kind} alone is applied", {"applied": of_kind(kind)}
            )
            for kind in kinds
        ),
    ]


def _taken(other: Callable[[str], str], parts: str = "AB") -> Callable[[Given], Given]:
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


def _of_modules() -> list[Mistake]:
    """Return rows about modules that programs keep together: some left out, or read with another one's factors."""

    def without(names: tuple[str, ...]) -> dict[str, Any]:
        return {"applied": lambda path: not path.endswith(names)}

    def others(path: str) -> str:
        return re.sub(r"[kv]_proj$", "q_proj", path)

    rows = [
        Mistake(f"{'-'.join(names).replace('_proj', '')}-are-left-out", f"the adapters of {_and(names)} are not "
            f"applied",
                without(names))
        for names in LEFT_OUT_TOGETHER
    ]  # fmt: skip
    return [
        *rows,
        Mistake("q-and-v-alone", "the adapters of q_proj and v_proj alone are applied",
                {"applied": lambda path: path.endswith(("q_proj", "v_proj"))}),
        Mistake("gate-twice", "up_proj has gate_proj's adapter: it was read twice, and up_proj's never", {},
                "unslothai/unsloth-zoo #942", reading=_taken(lambda path: path.replace("up_proj", "gate_proj"))),
        Mistake("up-twice", "gate_proj has up_proj's adapter: it was read twice, and gate_proj's never", {},
                reading=_taken(lambda path: path.replace("gate_proj", "up_proj"))),
        Mistake("lora-a-of-q-for-all", "k_proj and v_proj have the lora_A of q_proj", {}, reading=_taken(others, "A")),
    ]  # fmt: skip


def _and(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _of_factors() -> list[Mistake]:
    """Return rows about parts of the factors: those of one device, of half of the ranks, and the way round."""

    def halved(path: str, BA: np.ndarray) -> np.ndarray:
        return np.concatenate([BA[: len(BA) // 2], 0 * BA[len(BA) // 2 :]])

    def of_one_device(path: str, BA: np.ndarray) -> np.ndarray:
        return halved(path, BA.T).T if path.endswith(("o_proj", "down_proj")) else halved(path, BA)

    return [
        Mistake("one-device-of-two-alone", "the update is that of the first device of two: half of the inputs of "
                "o_proj and down_proj, and half of the others' outputs", {"update": of_one_device}),
        Mistake("a-square-update-is-transposed", "the update of a square weight is transposed",
                {"update": lambda path, BA: BA.T if BA.shape[0] == BA.shape[1] else BA}),
        Mistake("half-of-the-ranks-alone", "the first half of the ranks alone is used",
                {"factors": lambda path, A, B: (A[: len(A) // 2], B[:, : len(A) // 2])}),
        Mistake("half-of-the-outputs-alone",
                "the update reaches the first half of each module's outputs alone, as on one device of two",
                {"update": halved}),
        Mistake("half-of-the-inputs-alone", "the update reads the first half of each module's inputs alone, as on one "
                "device of two", {"update": lambda path, BA: halved(path, BA.T).T}),
    ]  # fmt: skip


def _of_all(subject: Subject) -> list[Mistake]:
    """Return rows about the scaling, the merged weights, and the keys and values of a prompt."""
    largest = max((len(m.lora_A) for m in subject.given.modules.values()), default=1)
    rows = [
        Mistake("the-update-is-halved", "half of the update is added", {"times": 0.5}),
        Mistake("alpha-is-divided-by-the-largest-rank", "alpha is divided by the largest rank of all modules",
                {"scale": lambda config, path: float(setting(config, "lora_alpha", path)) / largest}),
        *ROUNDINGS,
        Mistake("keys-and-values-are-the-bases",
                "the prompt's keys and values are the base's: they are kept by its tokens alone", {}, cached="base"),
        Mistake("the-last-token-is-the-bases", "the adapter acts on the prompt, and not on its last token", {},
                cached="adapted"),
    ]  # fmt: skip
    if subject.given.saved:
        text = "nothing in the file is applied, neither factors nor modules trained in full: this is the base"
        nothing: dict[str, Any] = {"applied": lambda path: False, "saved": lambda W, trained: W}
        rows.append(Mistake("nothing-in-the-file-is-applied", text, nothing))
    for alpha in GENERAL_ALPHAS:
        text = f"lora_alpha is not read: the scaling is {alpha} / r"
        rows.append(Mistake(f"alpha-{alpha}-is-taken", text, {"scale": _alpha_over_rank(alpha, 1.0)}))
        if subject.given.config.get("use_rslora"):
            text = f"lora_alpha is not read: the scaling is {alpha} / the root of r"
            rows.append(Mistake(f"alpha-{alpha}-is-taken-over-the-root", text, {"scale": _alpha_over_rank(alpha, 0.5)}))
    return rows


def _alpha_over_rank(alpha: int, power: float) -> Callable[[Config, str], float]:
    return lambda config, path: float(alpha / int(setting(config, "r", path)) ** power)


ROUNDED = {
    "merged-in": ("merged", "the update was added to the weights, and these were rounded to"),
    "all-weights-in": ("all", "the adapter was merged, and then all weights of the model were rounded to"),
    "the-base-in": ("base", "the base's weights are rounded, and the adapter acts beside them: they are in"),
}
"""Which weights are rounded, and how that is said, by the beginning of a flag."""
ROUNDINGS = tuple(
    Mistake(f"{start}-{name}", f"{text} {name}", {}, rounded=dtype, which=which)
    for start, (which, text) in ROUNDED.items()
    for name, dtype in (("bfloat16", "BF16"), ("float16", "F16"))
)
"""Rows of weights that are rounded, which is no mistake where the engine computes in that type."""
