"""Known bugs of LoRA implementations: what each one computes, in whose code it was made, and which claim it breaks.

A diagnosis is found by its sign: the implementation's answers are wrong, and they are, on every problem, what the right
formulas give with one part replaced. So it is named only where it explains all the numbers that it speaks of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from .kinds import Ids, Images
from .problems import Arrays, Problem
from .reference import QUANTITIES, SCALINGS, TOLERANCE, UNIT, Trial

Parts = Mapping[str, Any]
OF_DORA = ("length", "gain", "through_norm", "dm", "bias_in_dm")
"""Parts that other kinds do not have."""


@dataclass(frozen=True)
class Bug:
    """A known bug.

    Attributes
    ----------
    name : str
        The diagnosis, as it is told.
    parts : dict, or callable
        The parts of `minilora.conformance.reference.Formulas` that it replaces; or a function of the problem that
        returns them.
    breaks : str
        The claim that it breaks.
    source : str
        Where it was made in public, or "".
    shows : tuple of str
        The answers in which it may show.
    """

    name: str
    parts: Parts | Callable[[Problem], Parts]
    breaks: str
    source: str = ""
    shows: tuple[str, ...] = tuple(QUANTITIES)

    def by(self, trial: Trial) -> Parts:
        """Return the parts that it replaces for a trial; none where the trial has no such part."""
        parts = self.parts(trial.problem) if callable(self.parts) else self.parts
        return parts if "magnitude" in trial.arrays else {k: part for k, part in parts.items() if k not in OF_DORA}

    def __str__(self) -> str:
        return f"{self.name} (made in {self.source})" if self.source else self.name


def _kernels(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Problem], Parts]:
    """Return a merge whose update has each kernel, (out, C, *kernel), changed."""

    def parts(problem: Problem) -> Parts:
        if not isinstance(problem, Images):
            return {}

        def merged(W: np.ndarray, BA: np.ndarray, s: float) -> np.ndarray:
            kernels = change(BA.reshape(len(BA), -1, *problem.kernel))
            return W + s * (kernels.reshape(BA.shape) if kernels.size == BA.size else BA)

        return {"merged": merged}

    return parts


def _upright(kernels: np.ndarray) -> np.ndarray:
    """Return kernels with height and width exchanged, where that fits."""
    return kernels.swapaxes(-1, -2) if kernels.shape[-1] == kernels.shape[-2] else kernels


def _turned(problem: Problem) -> Parts:
    if not isinstance(problem, Images):
        return {}
    axes = tuple(range(2, 2 + len(problem.kernel)))
    return {"turned": lambda z: np.flip(z.reshape(len(z), -1, *problem.kernel), axes).reshape(z.shape)}


def _last_of_each(X: np.ndarray) -> np.ndarray:
    """Return one-hot rows in which an id that comes again is left out the first time."""
    return np.asarray(X * (np.cumsum(X[::-1], axis=0)[::-1] == 1))


def _without_first_id(X: np.ndarray) -> np.ndarray:
    return X * (np.arange(X.shape[1]) > 0)


def _ids(seen: Callable[[np.ndarray], np.ndarray]) -> Callable[[Problem], Parts]:
    """Return a part for the one-hot rows of an embedding; other rows are not of that kind."""
    return lambda problem: {"seen_by_dA": seen} if isinstance(problem, Ids) else {}


def _no_groups(problem: Problem) -> Parts:
    groups = getattr(problem, "groups", 1)
    return {"hidden": lambda B: B.sum(axis=1, keepdims=True) + 0 * B} if groups == problem.rank > 1 else {}


def _whole(V: np.ndarray) -> np.ndarray:
    return np.full((len(V), 1), np.linalg.norm(V))


BUGS: Sequence[Bug] = (
    Bug(
        "alpha is not divided by the rank: the scaling is alpha, and should be alpha / r",
        {"scaling": SCALINGS["alpha"]},
        "scaling",
        "rasbt/LLMs-from-scratch #821, Blaizzy/mlx-vlm #846",
    ),
    Bug(
        "alpha is divided by the root of the rank, as in rsLoRA, and should be divided by the rank",
        {"scaling": SCALINGS["alpha / sqrt(r)"]},
        "scaling",
    ),
    Bug(
        "rsLoRA's root is ignored: alpha is divided by the rank, and should be divided by its root",
        {"scaling": SCALINGS["alpha / r"]},
        "scaling",
        "NVIDIA/TensorRT-LLM #1668, huggingface/peft #2733",
    ),
    Bug("alpha is ignored: the scaling is 1 / r", {"scaling": lambda alpha, r: 1 / r}, "scaling"),
    Bug("there is no scaling: the update is added as it is", {"scaling": SCALINGS["1"]}, "scaling"),
    Bug("the scaling is r / alpha, upside down", {"scaling": lambda alpha, r: r / alpha}, "scaling"),
    Bug("the scaling is applied twice", {"scaling": lambda alpha, r: (alpha / r) ** 2}, "scaling"),
    Bug(
        "alpha is divided by the rank in whole numbers: the scaling is alpha // r, and should be alpha / r",
        {"scaling": lambda alpha, r: alpha // r},
        "scaling",
    ),
    Bug("alpha is divided by the rank twice", {"scaling": lambda alpha, r: alpha / r**2}, "scaling"),
    Bug("the scaling is alpha r: alpha is multiplied by the rank", {"scaling": lambda alpha, r: alpha * r}, "scaling"),
    Bug("the output lacks the update: the adapter is not applied", {"update": 0.0}, "forward"),
    Bug("the update is subtracted from the output", {"update": -1.0}, "forward"),
    Bug("the update is added twice", {"update": 2.0}, "forward"),
    Bug("the output lacks x W^T: the base is not applied", {"base": lambda x, W: 0.0 * (x @ W.T)}, "forward"),
    Bug("the output lacks the bias", {"bias": lambda b, G: 0 * b}, "forward"),
    Bug("the bias is added twice", {"bias": lambda b, G: 2 * b}, "forward"),
    Bug("the scaling multiplies the bias too", {"s_in_bias": lambda s: s}, "forward"),
    Bug("the scaling multiplies the base too: it is s (x W^T + x A^T B^T)", {"s_in_base": lambda s: s}, "forward"),
    Bug(
        "the scaling multiplies the base and the bias too",
        {"s_in_base": lambda s: s, "s_in_bias": lambda s: s},
        "forward",
    ),
    Bug(
        "the base's weight is taken transposed: W (out, in) is read as (in, out)",
        {"base": lambda x, W: x @ W if W.shape[0] == W.shape[1] else x @ W.T},
        "forward",
    ),
    Bug(
        "dx lacks dy W: the base passes no gradient, as under torch.no_grad()",
        {"dx_base": 0.0},
        "slope",
        "lora-pytorch 0.2.0",
    ),
    Bug("dx lacks the adapter's path, s dy B A", {"dx_update": 0.0}, "slope"),
    Bug("dx is zero", {"dx_base": 0.0, "dx_update": 0.0}, "slope"),
    Bug("lora_A's gradient lacks the scaling alpha / r", {"s_in_dA": lambda s: 1.0}, "slope"),
    Bug("lora_B's gradient lacks the scaling alpha / r", {"s_in_dB": lambda s: 1.0}, "slope"),
    Bug(
        "the gradients of both factors lack the scaling alpha / r",
        {"s_in_dA": lambda s: 1.0, "s_in_dB": lambda s: 1.0},
        "slope",
    ),
    Bug("the adapter's path in dx lacks the scaling alpha / r", {"s_in_dx": lambda s: 1.0}, "slope"),
    Bug("lora_A's gradient has the scaling twice", {"s_in_dA": lambda s: s * s}, "slope"),
    Bug("lora_B's gradient has the scaling twice", {"s_in_dB": lambda s: s * s}, "slope"),
    Bug("lora_A's gradient has the opposite sign", {"s_in_dA": lambda s: -s}, "slope"),
    Bug("lora_B's gradient has the opposite sign", {"s_in_dB": lambda s: -s}, "slope"),
    Bug(
        "all gradients have the opposite sign",
        {"dx_base": -1.0, "dx_update": -1.0, "s_in_dA": lambda s: -s, "s_in_dB": lambda s: -s},
        "slope",
    ),
    Bug("lora_A's gradient is zero: A does not train", {"s_in_dA": lambda s: 0.0}, "slope"),
    Bug("lora_B's gradient is zero: B does not train", {"s_in_dB": lambda s: 0.0}, "slope"),
    Bug("the gradients of the factors are means over the rows, not sums", {"rows": lambda n: 1 / n}, "slope"),
    Bug(
        "merge adds the change transposed",
        {"merged": lambda W, BA, s: W + s * (BA.T if W.shape[0] == W.shape[1] else BA)},
        "merge",
    ),
    Bug("merge adds the change twice", {"merged": lambda W, BA, s: W + 2 * s * BA}, "merge"),
    Bug("merge subtracts the change", {"merged": lambda W, BA, s: W - s * BA}, "merge"),
    Bug("merge returns the change alone", {"merged": lambda W, BA, s: s * BA}, "merge"),
    Bug("merge returns the weight as it was", {"merged": lambda W, BA, s: W}, "merge"),
    # DoRA
    Bug(
        "DoRA's norm is taken along the wrong axis: of each column of V, and should be of each row",
        {"length": lambda W, BA, s: np.linalg.norm(W + s * BA, axis=0, keepdims=True)},
        "forward",
        "wanshuiyin/ARIS-in-AI-Offer #17, KohakuBlueleaf/LyCORIS #216",
    ),
    Bug(
        "DoRA's norm is that of W, and should be that of V = W + s B A",
        {"length": lambda W, BA, s: np.linalg.norm(W, axis=1, keepdims=True)},
        "forward",
        "Comfy-Org/ComfyUI #15458",
    ),
    Bug(
        "DoRA's norm lacks the scaling: it is that of W + B A, and should be that of V = W + s B A",
        {"length": lambda W, BA, s: np.linalg.norm(W + BA, axis=1, keepdims=True)},
        "forward",
    ),
    Bug("DoRA divides by the square of the norm", {"gain": lambda m, n: m[:, None] / n**2}, "forward"),
    Bug("DoRA's norm is one number for the whole of V", {"length": lambda W, BA, s: _whole(W + s * BA)}, "forward"),
    Bug("DoRA does not divide by the norm: the output is m x V^T", {"gain": lambda m, n: m[:, None]}, "forward"),
    Bug("DoRA's magnitude is not applied: rows have the length 1", {"gain": lambda m, n: 1 / n}, "forward"),
    Bug("the magnitude is ignored: this is LoRA", {"gain": lambda m, n: np.ones((len(m), 1))}, "forward"),
    Bug(
        "DoRA's magnitude multiplies the bias too",
        {"bias": lambda b, G: G[:, 0] * b, "bias_in_dm": 1.0},
        "forward",
        "torchtune 0.6.1",
    ),
    Bug(
        "DoRA's magnitude is not trained: its gradient is zero",
        {"dm": lambda dm, n: 0 * dm},
        "slope",
        "meta-pytorch/torchtune #2250",
    ),
    Bug("magnitude's gradient has the opposite sign", {"dm": lambda dm, n: -dm}, "slope"),
    Bug("magnitude's gradient is not divided by the norm", {"dm": lambda dm, n: dm * n.max(axis=1)}, "slope"),
    Bug(
        "the gradient passes through DoRA's norm, which detached_norm declares a constant",
        {"through_norm": 1.0},
        "slope",
    ),
    Bug(
        "the gradient takes DoRA's norm for a constant, where detached_norm = False declares that it passes through",
        {"through_norm": 0.0},
        "slope",
    ),
    Bug("the gradient through DoRA's norm is added, and should be subtracted", {"through_norm": -1.0}, "slope"),
    # embeddings
    Bug(
        "lora_A's gradient overwrites where an id comes again, and should add up",
        _ids(_last_of_each),
        "slope",
    ),
    Bug("lora_A's gradient is a mean over an id's rows", _ids(lambda X: X / np.maximum(X.sum(axis=0), 1)), "slope"),
    Bug("lora_A's gradient is zero for id 0, as for padding", _ids(_without_first_id), "slope"),
    # convolutions
    Bug("the kernels are turned round: a convolution, where torch's is a cross-correlation", _turned, "forward"),
    Bug("merge turns the kernels round", _kernels(lambda k: np.flip(k, tuple(range(2, k.ndim)))), "merge"),
    Bug("merge exchanges the channels and the kernel's axes", _kernels(lambda k: np.moveaxis(k, 1, -1)), "merge"),
    Bug(
        "merge reads the kernel's axes first and the channels last",
        _kernels(lambda k: np.moveaxis(k.reshape(len(k), *k.shape[2:], k.shape[1]), -1, 1)),
        "merge",
    ),
    Bug("merge exchanges the kernel's height and width", _kernels(_upright), "merge"),
    Bug(
        "B's groups are ignored: each output sums all of the hidden channels, and should take its group's",
        _no_groups,
        "forward",
        "Tencent/YOLO-Master #228",
        ("y", "x"),
    ),
)


@dataclass(frozen=True)
class Found:
    """A bug, or two at once, and the answers that it explains.

    Attributes
    ----------
    bugs : tuple of Bug
        One or two.
    explains : tuple of str
        Answers that are wrong, and just so.
    where : str
        What of all that is computed they are; empty where the bug shows in one answer only.
    """

    bugs: tuple[Bug, ...]
    explains: tuple[str, ...]
    where: str = ""

    def __str__(self) -> str:
        names = " and, at once, ".join(bug.name for bug in self.bugs) + self.where
        sources = ", ".join(bug.source for bug in self.bugs if bug.source)
        return f"{names} (made in {sources})" if sources else names


def diagnose(
    trials: Sequence[Trial], found: Sequence[Arrays], wrong: frozenset[str], more: Sequence[Bug] = ()
) -> list[Found]:
    """Return the known bugs that explain what is wrong, those that explain most of it first.

    Parameters
    ----------
    trials : sequence of Trial
        The problems.
    found : sequence of dict
        The implementation's answers to each of them.
    wrong : frozenset of str
        The answers that are wrong on some problem.
    more : sequence of Bug
        To be tried after the table's.

    Returns
    -------
    list of Found
        Each explains what those before it do not: alone, or on top of the first.
    """
    chosen: list[Found] = []
    left, bugs = set(wrong), [bug for bug in (*BUGS, *more) if any(bug.by(trial) for trial in trials)]
    while left:
        before = chosen[0].bugs if chosen else ()
        candidates = [_explained((bug,), (), trials, found, left) for bug in bugs]
        if before:
            candidates += [_explained((bug,), before, trials, found, left) for bug in bugs]
        if not any(candidates) and trials[0].unit <= UNIT["float32"]:
            pairs = product((bug for bug in bugs if bug.breaks == "scaling"), bugs)
            candidates = [_explained(pair, (), trials, found, left) for pair in pairs]
        best = max(filter(None, candidates), key=lambda candidate: candidate[0], default=None)
        if best is None:
            break
        chosen.append(best[1])
        left -= set(best[1].explains)
    return chosen


def _explained(
    bugs: tuple[Bug, ...], before: tuple[Bug, ...], trials: Sequence[Trial], found: Sequence[Arrays], left: set[str]
) -> tuple[tuple[int, int, int], Found] | None:
    """Return a rank, and the answers that bugs explain on top of others: all whose numbers are as they have them."""
    shows = {name for bug in bugs for name in bug.shows if name in left}
    affected: set[str] = set()
    offered = {name for answers in found for name in answers}
    furthest = 0.0
    for trial, answers in zip(trials, found, strict=True):
        predicted = _predicted((*before, *bugs), trial)
        for name in shows & answers.keys():
            distance = trial.distance(name, answers[name], predicted[name])
            if distance > 4 * TOLERANCE:
                shows.discard(name)
            else:
                furthest = max(furthest, distance)
        if not shows:
            return None
        without = _predicted(before, trial)
        affected |= {k for k in answers.keys() - affected if not trial.agrees(k, predicted[k], without[k])}
    explains = shows & affected
    if not explains:
        return None
    rank = (len(explains), -len(affected - explains), -round(furthest))
    return rank, Found(
        bugs, tuple(name for name in QUANTITIES if name in explains), _where(explains, affected, offered)
    )


def _predicted(bugs: tuple[Bug, ...], trial: Trial) -> Arrays:
    parts = {name: part for bug in bugs for name, part in bug.by(trial).items()}
    return trial.by(**parts) if parts else trial.right


def _where(explains: set[str], affected: set[str], offered: set[str]) -> str:
    """Say in which answers a bug shows, where it could show in others too."""
    if explains == affected:
        return ", in all that is computed" if affected == offered and len(affected) > 1 else ""
    told = [QUANTITIES[name].split(",")[0] for name in QUANTITIES if name in explains]
    return f", in {listed(told)} alone"


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence has them."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def unexplained(wrong: frozenset[str], found: Sequence[Found]) -> Iterator[str]:
    """Yield the answers that no bug explains, in the order of the report."""
    told = {name for one in found for name in one.explains}
    return (name for name in QUANTITIES if name in wrong - told)


EVERY_ENTRY = "every entry is off by the factor"


def describe_unknown(name: str, found: np.ndarray, trial: Trial) -> str:
    """Return what can be said of a wrong answer that no known bug explains: its shape, or ratio and worst entry."""
    expected = trial.right[name]
    if np.ndim(found) == np.ndim(expected) == 2 and trial.agrees(name, np.transpose(found)):
        return "is transposed"
    if np.shape(found) != np.shape(expected):
        return f"has shape {np.shape(found)}, expected {np.shape(expected)}{_steps(np.shape(found), trial.problem)}"
    found = np.asarray(found, np.float64)
    if not np.isfinite(found).all():
        return "is not finite"
    at = np.unravel_index(int(np.abs(found - expected).argmax()), expected.shape)
    where = ", ".join(map(str, at))
    text = f"is off by {abs(found[at] - expected[at]):.3g} at [{where}]: {found[at]:.7g}, expected {expected[at]:.7g}"
    seen = np.abs(expected) > 1e-3 * np.abs(expected).max()
    ratios = found[seen] / expected[seen]
    if ratios.size and np.ptp(ratios) <= 1e-4 * abs(ratios).max() and abs(np.median(ratios) - 1) > 1e-3:
        text += f"; {EVERY_ENTRY} {np.median(ratios):.6g}"
    return text


def _steps(shape: tuple[int, ...], problem: Problem) -> str:
    """Say which other steps of a kernel would give an output of a shape."""
    if not isinstance(problem, Images):
        return ""
    one, none = (1,) * len(problem.kernel), (0,) * len(problem.kernel)
    others: dict[str, dict[str, Any]] = {
        "if stride were 1": {"stride": one},
        "without padding": {"padding": none},
        "if dilation were 1": {"dilation": one},
        "if stride and dilation were exchanged": {"stride": problem.dilation, "dilation": problem.stride},
        "if a step of two axes were exchanged": {
            name: getattr(problem, name)[::-1] for name in ("stride", "padding", "dilation")
        },
    }
    found = (words for words, steps in others.items() if replace(problem, **steps).positions == shape[2:])
    return next((f", as it would be {words}" for words in found), "")
