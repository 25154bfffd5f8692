"""The bugs of programs that read adapters of mixtures, a row each.

Three kinds of rows: the suite's own about a stack of experts, by their flags; those of `..misreadings` that replace
parts which a mixture has too; and those here. Of rows with the same numbers the first is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import sqrt

import numpy as np

from ...problems import bugs as table
from ..formulas import Config, scaled, setting
from ..misreadings import MISREADINGS, Misreading, known
from .formulas import READ

Change = Callable[[np.ndarray], np.ndarray]


def of_the_suite(flag: str) -> Misreading:
    """Return a row of the suite's table as it stands: its parts are those of where an expert's factors lie."""
    bug = table.known(flag)
    return known(flag, bug.of(None))


def _without(pattern: str) -> Callable[[str], bool]:
    return lambda path: re.search(pattern, path) is None


def _scaled_by(factor: Callable[[Config, str], float]) -> Callable[[Config, str], float]:
    """Return a scaling that is the right one times a factor."""
    return lambda config, path: scaled(config, *_alpha_and_rank(config, path)) * factor(config, path)


def _alpha_and_rank(config: Config, path: str) -> tuple[float, int]:
    return float(setting(config, "lora_alpha", path)), int(setting(config, "r", path))


def _fused_root(config: Config, path: str) -> float:
    """Return the root of 2 for gate and up: when the two are put into one, r and alpha are doubled."""
    in_one = re.search(r"\.experts\.\d+\.(w1|w3|gate_proj|up_proj)$", path)
    return sqrt(2) if config.get("use_rslora") and in_one else 1.0


def _exchanged(BA: np.ndarray) -> np.ndarray:
    return np.roll(BA, len(BA) // 2, axis=0)


def _apart(BA: np.ndarray) -> np.ndarray:
    """Return the even rows above the odd ones."""
    return np.concatenate([BA[::2], BA[1::2]])


def _alternating(BA: np.ndarray) -> np.ndarray:
    """Return the rows of the two halves by turns."""
    return BA.reshape(2, -1, BA.shape[1]).swapaxes(0, 1).reshape(BA.shape)


def _halves(gate: float, up: float) -> Change:
    """Return an update of which the gate's half and the up projection's count so much."""
    return lambda BA: np.repeat([gate, up], len(BA) // 2)[:, None] * BA


def _gate_twice(BA: np.ndarray) -> np.ndarray:
    return np.concatenate([BA[: len(BA) // 2]] * 2)


def _shifted(E: int, r: int) -> np.ndarray:
    return np.roll(np.arange(E * r), -1).reshape(E, r)


# fmt: off
OWN: Sequence[Misreading] = (
    # one array, or one kind of module, is left out
    Misreading("experts-gate-up-proj-is-left-out", "the adapter of the experts' gate_up_proj is not applied",
               {"applied": _without(r"experts\.(\d+\.(w1|w3|gate_proj|up_proj)|gate_up_proj)$")}),
    Misreading("experts-down-proj-is-left-out", "the adapter of the experts' down_proj is not applied",
               {"applied": _without(r"experts\.(\d+\.(w2|down_proj)|down_proj)$")}),
    Misreading("experts-are-left-out", "the adapter of the experts is not applied, the others are",
               {"applied": _without(r"\.experts\.")}),
    Misreading("experts-the-shared-experts-adapter-is-left-out", "the adapter of the shared expert is not applied",
               {"applied": _without("shared_expert")}),
    Misreading("experts-the-routers-adapter-is-left-out", "the adapter of the router is not applied",
               {"applied": _without(r"mlp\.gate\.weight")}),
    # gate and up in one array
    Misreading("experts-gate-and-up-are-exchanged",
               "the update's halves are exchanged: gate_up_proj is taken for [up; gate], and is [gate; up]",
               {"gate_up": _exchanged}),
    Misreading("experts-gate-and-up-are-taken-for-alternating",
               "the update's rows are taken for alternating, gate, up, gate, up, and its halves are gate and up",
               {"gate_up": _apart}),
    Misreading("experts-gate-and-up-are-made-alternating",
               "the update's halves are put into alternating rows, gate, up, gate, up, and the weight's are not",
               {"gate_up": _alternating}),
    Misreading("experts-the-gates-half-counts-twice",
               "the update's first half is taken for gate and for up, its second half for neither",
               {"gate_up": _gate_twice}, "unslothai/unsloth-zoo #942"),
    Misreading("experts-the-up-half-is-left-out", "the update's second half, of up, is left out",
               {"gate_up": _halves(1, 0)}),
    Misreading("experts-the-gates-half-is-left-out", "the update's first half, of the gate, is left out",
               {"gate_up": _halves(0, 1)}),
    # ranks and scalings
    Misreading("experts-ranks-begin-a-row-late", "each expert's rows of lora_A begin one row late",
               {"rows_of_A": _shifted}),
    Misreading("experts-the-first-half-of-the-ranks-counts-alone",
               "the first half of each expert's ranks is used alone",
               {"factors": lambda path, A, B: (A[: len(A) // 2], B[:, : len(A) // 2])}),
    Misreading("experts-slices-are-of-the-configurations-rank",
               "each expert's slice is of the configuration's r, and rank_pattern has another for this array",
               {"rank": lambda config, path: int(config["r"])}),
    Misreading("experts-the-root-is-that-of-the-packed-rank",
               "rsLoRA's root is that of the packed factors' rank, E r, and should be that of one expert's",
               {"scaling_of": lambda s, e, E: s / sqrt(E)}),
    Misreading("experts-rslora-root-is-taken-twice",
               "rsLoRA's root is taken twice: alpha is divided by the fourth root of the rank",
               {"scale": lambda c, p: _alpha_and_rank(c, p)[0] / _alpha_and_rank(c, p)[1] ** 0.25}),
    Misreading("experts-rslora-root-is-that-of-gate-and-up-together",
               "rsLoRA's root is that of gate's and up's ranks together, with alpha doubled: their update is too large "
               "by the root of 2",
               {"scale": _scaled_by(_fused_root)}, "peft 0.21.2"),
    Misreading("experts-the-update-is-divided-by-the-kept",
               "the update is divided by how many experts a token keeps",
               {"scale": _scaled_by(lambda config, path: 0.5 if ".experts." in path else 1.0)}),
    # what a PEFT of before, or another program, packed otherwise
    Misreading("experts-lora-b-layout-is-not-read",
               "lora_B_layout is not read: it says that lora_B has the expert as its slow index",
               {"layout": lambda config: None}),
    # the mixture itself
    Misreading("experts-the-update-is-not-weighted",
               "each kept expert's update counts whole, and should count by the router's share",
               {"unweighted": True}),
    Misreading("experts-the-shares-are-renormalised-wrongly",
               "a token's shares are made to sum to 1, and norm_topk_prob says no; or they are not, and it says yes",
               {"renormalised": lambda renormalised: not renormalised}),
    Misreading("experts-one-is-kept", "one expert is kept for a token, and num_experts_per_tok says 2",
               {"kept": lambda K: 1}),
    Misreading("experts-three-are-kept", "three experts are kept for a token, and num_experts_per_tok says 2",
               {"kept": lambda K: 3}),
    Misreading("experts-the-shared-expert-is-left-out", "the shared expert is left out, with its adapter",
               {"shared": 0.0}),
)
# fmt: on
PACKINGS = tuple(
    of_the_suite(bug.flag)
    for bug in table.BUGS
    if bug.flag.startswith("experts-") and not callable(bug.parts) and set(bug.parts) <= READ
)
ALSO = (
    "rslora-root-is-ignored",
    "rank-pattern-is-dropped-in-the-scaling",
    "the-adapter-is-not-applied",
    "the-update-is-added-twice",
    "alpha-is-not-divided-by-the-rank",
    "alpha-is-divided-by-the-root-of-the-rank",
    "there-is-no-scaling",
    "the-scaling-is-applied-twice",
    "the-last-rank-is-dropped",
)
"""Bugs of readers of all adapters, whose parts are parts here."""
MIXTURE_MISREADINGS = (*PACKINGS, *OWN, *(row for row in MISREADINGS if row.flag in ALSO))
