"""Known bugs of LoRA implementations: what each one computes, in whose code it was made, and which claim it breaks.

A diagnosis is found by its sign: the implementation's answers are wrong, and they are, on every problem, what the right
formulas give with one part replaced. So it is named only where it explains all the numbers that it speaks of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .reference import Arrays, Trial


@dataclass(frozen=True)
class Bug:
    """A known bug.

    Attributes
    ----------
    name : str
        The diagnosis, as it is told.
    parts : dict
        The parts of `minilora.conformance.reference.Formulas` that it replaces.
    shows : tuple of str
        The answers in which it shows, of ``"y"``, ``"x"``, ``"lora_A"``, ``"lora_B"``, ``"merged"``.
    breaks : str
        The claim that it breaks.
    source : str
        Where it was made in public, or "".
    """

    name: str
    parts: Mapping[str, Any]
    shows: tuple[str, ...]
    breaks: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.name} (made in {self.source})" if self.source else self.name


ALL = ("y", "x", "lora_A", "lora_B", "merged")
GRADIENTS = ("x", "lora_A", "lora_B")
FACTORS = ("lora_A", "lora_B")


def _everywhere(name: str, scaling: Callable[[float, int], float], source: str = "") -> list[Bug]:
    """Return a wrong scaling as it shows where all is computed with it, and where only a part is."""
    bugs = [Bug(f"{name}, in all that is computed", {"scaling": scaling}, ALL, "scaling", source)]
    parts = {"in the forward alone": ("y",), "in the backward alone": GRADIENTS, "in merge alone": ("merged",)}
    for what, shows in parts.items():
        bugs.append(Bug(f"{name}, {what}", {"scaling": scaling}, shows, "scaling", source))
    return bugs


BUGS: Sequence[Bug] = (
    *_everywhere(
        "alpha is not divided by the rank: the scaling is alpha, and should be alpha / r",
        lambda alpha, r: alpha,
        "rasbt/LLMs-from-scratch #821, Blaizzy/mlx-vlm #846",
    ),
    *_everywhere(
        "alpha is divided by the root of the rank, as in rsLoRA, and should be divided by the rank",
        lambda alpha, r: alpha / r**0.5,
    ),
    *_everywhere(
        "rsLoRA's root is ignored: alpha is divided by the rank, and should be divided by its root",
        lambda alpha, r: alpha / r,
        "NVIDIA/TensorRT-LLM #1668, huggingface/peft #2733",
    ),
    *_everywhere("alpha is ignored: the scaling is 1 / r", lambda alpha, r: 1 / r),
    *_everywhere("there is no scaling: the update is added as it is", lambda alpha, r: 1.0),
    *_everywhere("the scaling is r / alpha, upside down", lambda alpha, r: r / alpha),
    *_everywhere("the scaling is applied twice", lambda alpha, r: (alpha / r) ** 2),
    Bug("the output lacks the update: the adapter is not applied", {"update": 0.0}, ("y",), "forward"),
    Bug("the update is subtracted from the output", {"update": -1.0}, ("y",), "forward"),
    Bug("the update is added twice", {"update": 2.0}, ("y",), "forward"),
    Bug("the output lacks x W^T: the base is not applied", {"base": lambda x, W: 0.0 * (x @ W.T)}, ("y",), "forward"),
    Bug("the output lacks the bias", {"bias": 0.0}, ("y",), "forward"),
    Bug("the bias is added twice", {"bias": 2.0}, ("y",), "forward"),
    Bug(
        "the base's weight is taken transposed: W (out, in) is read as (in, out)",
        {"base": lambda x, W: x @ W if W.shape[0] == W.shape[1] else x @ W.T},
        ("y",),
        "forward",
    ),
    Bug(
        "dx lacks dy W: the base passes no gradient, as under torch.no_grad()",
        {"dx_base": 0.0},
        ("x",),
        "slope",
        "lora-pytorch 0.2.0",
    ),
    Bug("dx lacks the adapter's path, s dy B A", {"dx_update": 0.0}, ("x",), "slope"),
    Bug("lora_A's gradient lacks the scaling alpha / r", {"s_in_dA": lambda s: 1.0}, ("lora_A",), "slope"),
    Bug("lora_B's gradient lacks the scaling alpha / r", {"s_in_dB": lambda s: 1.0}, ("lora_B",), "slope"),
    Bug(
        "the gradients of both factors lack the scaling alpha / r",
        {"s_in_dA": lambda s: 1.0, "s_in_dB": lambda s: 1.0},
        FACTORS,
        "slope",
    ),
    Bug("the adapter's path in dx lacks the scaling alpha / r", {"s_in_dx": lambda s: 1.0}, ("x",), "slope"),
    Bug("lora_A's gradient has the scaling twice", {"s_in_dA": lambda s: s * s}, ("lora_A",), "slope"),
    Bug("lora_B's gradient has the scaling twice", {"s_in_dB": lambda s: s * s}, ("lora_B",), "slope"),
    Bug("lora_A's gradient has the opposite sign", {"s_in_dA": lambda s: -s}, ("lora_A",), "slope"),
    Bug("lora_B's gradient has the opposite sign", {"s_in_dB": lambda s: -s}, ("lora_B",), "slope"),
    Bug("the gradients of the factors are means over the rows, not sums", {"rows": lambda n: 1 / n}, FACTORS, "slope"),
    Bug(
        "merge adds the change transposed",
        {"merged": lambda W, BA, s: W + s * (BA.T if W.shape[0] == W.shape[1] else BA)},
        ("merged",),
        "merge",
    ),
    Bug("merge adds the change twice", {"merged": lambda W, BA, s: W + 2 * s * BA}, ("merged",), "merge"),
    Bug("merge subtracts the change", {"merged": lambda W, BA, s: W - s * BA}, ("merged",), "merge"),
    Bug("merge returns the change alone", {"merged": lambda W, BA, s: s * BA}, ("merged",), "merge"),
    Bug("merge returns the weight as it was", {"merged": lambda W, BA, s: W}, ("merged",), "merge"),
)


def diagnose(trials: Sequence[Trial], found: Sequence[Arrays], wrong: frozenset[str]) -> list[Bug]:
    """Return the known bugs that explain what is wrong, those that explain most of it first.

    Parameters
    ----------
    trials : sequence of Trial
        The problems.
    found : sequence of dict
        The implementation's answers to each of them.
    wrong : frozenset of str
        The answers that are wrong on some problem.

    Returns
    -------
    list of Bug
        No bug is in it whose part another one explains too.
    """
    explained: set[str] = set()
    chosen = []
    candidates = [bug for bug in BUGS if _explains(bug, trials, found, wrong)]
    for bug in sorted(candidates, key=lambda bug: -len(wrong & set(bug.shows))):
        if not explained & set(bug.shows):
            chosen.append(bug)
            explained |= wrong & set(bug.shows)
    return chosen


def _explains(bug: Bug, trials: Sequence[Trial], found: Sequence[Arrays], wrong: frozenset[str]) -> bool:
    """Return whether a bug's numbers are those that were found, on every problem, and all that it shows in is wrong."""
    offered = {name for answers in found for name in answers}
    shows = set(bug.shows) & offered
    if not shows or not shows <= wrong:
        return False
    predicted = [trial.by(**bug.parts) for trial in trials]
    return all(
        trial.agrees(name, answers[name], prediction[name], looser=4.0)
        for trial, answers, prediction in zip(trials, found, predicted, strict=True)
        for name in shows
        if name in answers
    ) and any(not trial.agrees(name, p[name]) for trial, p in zip(trials, predicted, strict=True) for name in shows)


def describe_unknown(name: str, found: np.ndarray, expected: np.ndarray) -> str:
    """Return what can be said of a wrong answer that no known bug explains: its shape, or ratio and worst entry."""
    if np.shape(found) != np.shape(expected):
        return f"has shape {np.shape(found)}, expected {np.shape(expected)}"
    found = np.asarray(found, np.float64)
    if not np.isfinite(found).all():
        return "is not finite"
    at = np.unravel_index(int(np.abs(found - expected).argmax()), expected.shape)
    where = ", ".join(map(str, at))
    text = f"is off by {abs(found[at] - expected[at]):.3g} at [{where}]: {found[at]:.7g}, expected {expected[at]:.7g}"
    seen = np.abs(expected) > 1e-3 * np.abs(expected).max()
    ratios = found[seen] / expected[seen]
    if np.ptp(ratios) <= 1e-4 * abs(ratios).max():
        text += f"; every entry is off by the factor {np.median(ratios):.6g}"
    return text
