"""Known bugs of LoRA implementations, a row each: what it computes, in whose code it was made, which claim it breaks.

A bug is the right formulas with a part replaced. A row is all there is to add: `check` names the bug, the vectors flag
the problems that show it, and the tests plant it in functions and in a layer.

Which formulas a row is about follows from the claim that it breaks: `AdamFormulas` for "adam", `StartFormulas` for
"start", and `Formulas` for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np

from ...layers.nf4 import NF4
from ..problems.adam_answers import rest
from ..problems.kinds import BLOCK, SETS, FourBits, Images
from ..problems.mixed import in_half
from ..problems.problem import Problem
from ..problems.reference import QUANTITIES, SCALINGS
from ..problems.slots import Fused

Parts = Mapping[str, Any]
EVERY = tuple(SETS)
DORA = ("dora", "dora-full")
PLAIN = tuple(kind for kind in EVERY if kind != "rslora")  # of the scaling alpha / r
ROWS = ("linear", "rslora", *DORA)
CONVOLUTIONS = ("conv2d", "conv1d")
ALL_BUT_EMBEDDING = tuple(kind for kind in EVERY if kind != "embedding")  # there A may be zero, and B random
DROPPED = ("dropout",)
FUSED = ("fused",)
MIXED = ("mixed",)
ONE_ADAPTER = tuple(kind for kind in EVERY if kind != "fused")  # where all ranks are of one adapter
ADAM = ("adam",)
OF_NUMBERS = ("forward", "scaling", "slope", "merge")
"""The claims that compare a layer's numbers with those of `Formulas`."""


@dataclass(frozen=True, eq=False)  # a row is itself alone: what it predicts can be kept
class Bug:
    """A known bug. ``str(bug)`` is its name, and where it was made."""

    flag: str  # its identifier, which stays: a sentence may be rephrased, a flag may not
    name: str  # the diagnosis, as the report prints it
    parts: Parts | Callable[[Any], Parts]  # the parts that it replaces; or a function of the problem that returns them
    breaks: str  # the claim that it breaks, by the name that the report prints
    source: str = ""  # where it was made in public, as "owner/repository #issue" or "package version"
    kinds: tuple[str, ...] = EVERY  # of problems, as `SETS` has them, or "adam"; the tests plant it in the first
    shows: tuple[str, ...] = tuple(QUANTITIES)  # the answers in which it may show
    rounds: bool = False  # whether it rounds to bfloat16 on the way, where a number near a tie may go either way

    def by(self, problem: Problem | None = None) -> Parts:
        """Return the parts that it replaces for a problem of one of its kinds; none where it makes no difference."""
        return self.parts(problem) if callable(self.parts) else self.parts

    def largest(self, problem: Problem) -> Parts:
        """Return its parts at their largest: what the rounding of its answers is measured in."""
        return self.by(problem)

    def __str__(self) -> str:
        return f"{self.name} (made in {self.source})" if self.source else self.name


def bugs_of(kind: str, breaks: Sequence[str] = OF_NUMBERS) -> list[Bug]:
    """Return the known bugs of a kind that break one of some claims, in the order of the table."""
    return [bug for bug in BUGS if kind in bug.kinds and bug.breaks in breaks]


WITHOUT_MASK: Parts = {name: lambda x, mask: x for name in ("dropped", "dropped_in_dA", "dropped_in_dx")}


# --- parts that take more than a line -------------------------------------------------------------


def _kernels(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Images], Parts]:
    """Return a merge whose update has each kernel, (out, C, *kernel), changed."""

    def parts(problem: Images) -> Parts:
        def merged(W: np.ndarray, BA: np.ndarray, s: float) -> np.ndarray:
            kernels = change(BA.reshape(len(BA), -1, *problem.kernel))
            return W + s * (kernels.reshape(BA.shape) if kernels.size == BA.size else BA)

        return {"merged": merged}

    return parts


def _upright(kernels: np.ndarray) -> np.ndarray:
    """Return kernels with height and width exchanged, where that fits."""
    return kernels.swapaxes(-1, -2) if kernels.shape[-1] == kernels.shape[-2] else kernels


def _turned(problem: Images) -> Parts:
    axes = tuple(range(2, 2 + len(problem.kernel)))
    return {"turned": lambda z: np.flip(z.reshape(len(z), -1, *problem.kernel), axes).reshape(z.shape)}


def _turned_in_A(problem: Images) -> Parts:
    return {"down": _turned(problem)["turned"]}


def _last_of_each(X: np.ndarray) -> np.ndarray:
    """Return one-hot rows in which an id that comes again is left out the first time."""
    return np.asarray(X * (np.cumsum(X[::-1], axis=0)[::-1] == 1))


def _without_first_id(X: np.ndarray) -> np.ndarray:
    return X * (np.arange(X.shape[1]) > 0)


def _no_groups(problem: Images) -> Parts:
    one_group = {"hidden": lambda B: B.sum(axis=1, keepdims=True) + 0 * B}
    return one_group if problem.groups == problem.rank > 1 else {}


def _depthwise(problem: Images) -> Parts:
    return _no_groups(problem) if problem.groups == problem.in_features else {}


def _all_ranks_but_one(problem: Problem) -> Parts:
    kept = np.arange(problem.rank) < problem.rank - 1
    return {"hidden": lambda B: B * kept, "s_in_dB": lambda s: s * kept}


def _ranks_up_to_32(problem: Problem) -> Parts:
    if problem.rank <= 32:
        return {}
    kept = np.arange(problem.rank) < 32
    return {"hidden": lambda B: B * kept, "s_in_dB": lambda s: s * kept}


def _rows_up_to_128(problem: Problem) -> Parts:
    return {"update": (np.arange(problem.n) < 128)[:, None] * 1.0} if problem.n > 128 else {}


def _outputs_up_to_128(problem: Problem) -> Parts:
    if problem.out_features <= 128:
        return {}
    kept = (np.arange(problem.out_features) < 128)[:, None]
    return {"hidden": lambda B: B * kept, "s_in_dB": lambda s: s * kept}


def _whole(V: np.ndarray) -> np.ndarray:
    return np.full((len(V), 1), np.linalg.norm(V))


def _other_weight(only_double: bool = False, **changes: Any) -> Callable[[Any], Parts]:
    """Return a weight in NF4 that is decoded otherwise; where scales are quantised too, if that is what is wrong."""

    def parts(problem: Any) -> Parts:
        if not isinstance(problem, FourBits) or (only_double and not problem.double):
            return {}
        return {"weight": lambda W: problem.weight(**changes)}

    return parts


def _without_scales(problem: Any) -> Parts:
    if not isinstance(problem, FourBits):
        return {}
    plain = replace(problem, double=False)  # the same codes
    return {"weight": lambda W: plain.weight(absmax=np.ones(plain.blocks, np.float32))}


def _column_after_column(problem: Any) -> Parts:
    if not isinstance(problem, FourBits):
        return {}
    return {"weight": lambda W: problem.weight().reshape(problem.in_features, problem.out_features).T}


def _packed(
    weight: np.ndarray,
    scale: Callable[[np.ndarray], np.ndarray] = lambda blocks: np.abs(blocks).max(axis=1),
    nearest: Callable[[np.ndarray], np.ndarray] = lambda v: np.abs(NF4[:, None, None] - v).argmin(axis=0),
    high: int = 16,
    low: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and scales of a weight in NF4, each part as it is given."""
    blocks = np.pad(weight.ravel(), (0, -weight.size % BLOCK)).reshape(-1, BLOCK)
    a = scale(blocks)
    with np.errstate(invalid="ignore"):
        codes = nearest(blocks / np.where(a == 0, 1, a)[:, None]).ravel()
    return (high * codes[0::2] + low * codes[1::2]).astype(np.uint8)[: (weight.size + 1) // 2], a


def _no_scale_of_zeros(blocks: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.asarray((blocks / np.abs(blocks).max(axis=1)[:, None]).max(axis=1) * np.abs(blocks).max(axis=1))


def _middle_quantiles() -> np.ndarray:
    """Return the 16 quantiles at (i + 1/2) / 16, divided by the largest: a book without a 0."""
    book = np.array([NormalDist().inv_cdf((i + 0.5) / 16) for i in range(16)])
    return np.asarray((book / book[-1]).astype(np.float32))


def _rows_by(place: Callable[[Fused, int], Any]) -> Callable[[Fused], Parts]:
    """Return slots whose updates are added to other rows, where these are rows of the weight."""

    def parts(fused: Fused) -> Parts:
        places = [place(fused, i) for i in fused.adapted]
        there = all(rows is None or rows.max() < fused.out_features for rows in places)
        return {"slot_rows": place} if there else {}

    return parts


def _from(fused: Fused, i: int, first: int) -> np.ndarray:
    """Return the rows of a slot's update, if it began at another one."""
    return first + np.arange(fused.widths[i])


def _alike(fused: Fused, i: int) -> list[int]:
    """Return the slots that are as wide as one, itself among them."""
    return [j for j, width in enumerate(fused.widths) if width == fused.widths[i]]


def _exchanged(fused: Fused, i: int) -> np.ndarray:
    alike = _alike(fused, i)
    return fused.rows_of(alike[::-1][alike.index(i)])


def _to_the_next(fused: Fused, i: int) -> np.ndarray:
    following = min(i + 1, len(fused.widths) - 1)
    return fused.rows_of(following if following in _alike(fused, i) else i)


def _grouped(fused: Fused, groups: Callable[[Fused], int]) -> dict[int, np.ndarray]:
    """Return the rows of each slot where all are cut into groups, and the slots' first groups come first."""
    n, owner = groups(fused), []
    for _ in range(n):
        for i, width in enumerate(fused.widths):
            owner += [i] * (width // n)
    return {i: np.flatnonzero(np.array(owner) == i) for i in range(len(fused.widths))}


def _by_groups(groups: Callable[[Fused], int]) -> Callable[[Fused], Parts]:
    def parts(fused: Fused) -> Parts:
        if any(width % groups(fused) for width in fused.widths):
            return {}
        return {"slot_rows": lambda fused, i: _grouped(fused, groups)[i]}

    return parts


def _one_down(fused: Fused) -> Parts:
    one_rank = len({fused.ranks[i] for i in fused.adapted}) == 1
    return {"slot_down": lambda fused, i: fused.adapted[0]} if one_rank else {}


def _packed_slots(fused: Fused, i: int) -> np.ndarray:
    return _from(fused, i, sum(fused.widths[j] for j in fused.adapted if j < i))


def _autocast() -> Parts:
    """Return an adapter that computes in bfloat16: its factors are rounded, and so is each of its products."""

    def updated(update: np.ndarray, x: np.ndarray, A: np.ndarray, B: np.ndarray, s: float) -> np.ndarray:
        return in_half(s * in_half(in_half(x @ in_half(A).T) @ in_half(B).T))

    def passed(path: np.ndarray, dy: np.ndarray, A: np.ndarray, B: np.ndarray, s: float) -> np.ndarray:
        return in_half(in_half(in_half(s * dy) @ in_half(B)) @ in_half(A))

    def trained(
        dA: np.ndarray, dB: np.ndarray, dy: np.ndarray, x: np.ndarray, A: np.ndarray, B: np.ndarray, s: float
    ) -> tuple[np.ndarray, np.ndarray]:
        du = in_half(s * dy)
        return in_half(in_half(du @ in_half(B)).T @ x), in_half(du.T @ in_half(x @ in_half(A).T))

    return {"updated": updated, "passed": passed, "trained": trained}


# --- the table ------------------------------------------------------------------------------------

BUGS: Sequence[Bug] = (
    # the scaling
    Bug(
        "alpha-is-not-divided-by-the-rank",
        "alpha is not divided by the rank: the scaling is alpha, and should be alpha / r",
        {"scaling": SCALINGS["alpha"]},
        "scaling",
        "rasbt/LLMs-from-scratch #821, Blaizzy/mlx-vlm #846",
    ),
    Bug(
        "alpha-is-divided-by-the-root-of-the-rank",
        "alpha is divided by the root of the rank, as in rsLoRA, and should be divided by the rank",
        {"scaling": SCALINGS["alpha / sqrt(r)"]},
        "scaling",
    ),
    Bug(
        "rslora-root-is-ignored",
        "rsLoRA's root is ignored: alpha is divided by the rank, and should be divided by its root",
        {"scaling": SCALINGS["alpha / r"]},
        "scaling",
        "NVIDIA/TensorRT-LLM #1668, huggingface/peft #2733",
        kinds=("rslora", *EVERY),  # any kind may declare that scaling; the tests plant it in rslora
    ),
    Bug(
        "alpha-is-ignored",
        "alpha is ignored: the scaling is 1 / r",
        {"scaling": lambda alpha, r: 1 / r},
        "scaling",
    ),
    Bug(
        "there-is-no-scaling",
        "there is no scaling: the update is added as it is",
        {"scaling": SCALINGS["1"]},
        "scaling",
    ),
    Bug(
        "the-scaling-is-r-alpha",
        "the scaling is r / alpha, upside down",
        {"scaling": lambda alpha, r: r / alpha},
        "scaling",
    ),
    Bug(
        "the-scaling-is-applied-twice",
        "the scaling is applied twice",
        {"scaling": lambda alpha, r: (alpha / r) ** 2},
        "scaling",
    ),
    Bug(
        "alpha-is-divided-by-the-rank-in-whole-numbers",
        "alpha is divided by the rank in whole numbers: the scaling is alpha // r, and should be alpha / r",
        {"scaling": lambda alpha, r: alpha // r},
        "scaling",
    ),
    Bug(
        "alpha-is-divided-by-the-rank-twice",
        "alpha is divided by the rank twice",
        {"scaling": lambda alpha, r: alpha / r**2},
        "scaling",
    ),
    Bug(
        "the-scaling-is-alpha-r",
        "the scaling is alpha r: alpha is multiplied by the rank",
        {"scaling": lambda alpha, r: alpha * r},
        "scaling",
    ),
    # the output
    Bug(
        "the-output-lacks-the-update",
        "the output lacks the update: the adapter is not applied",
        {"update": 0.0},
        "forward",
    ),
    Bug(
        "the-update-is-subtracted-from-the-output",
        "the update is subtracted from the output",
        {"update": -1.0},
        "forward",
    ),
    Bug(
        "the-update-is-added-twice",
        "the update is added twice",
        {"update": 2.0},
        "forward",
    ),
    Bug(
        "the-output-lacks-x-w-t",
        "the output lacks x W^T: the base is not applied",
        {"base": lambda x, W: 0.0 * (x @ W.T)},
        "forward",
    ),
    Bug(
        "the-output-lacks-the-bias",
        "the output lacks the bias",
        {"bias": lambda b, G: 0 * b},
        "forward",
    ),
    Bug(
        "the-bias-is-added-twice",
        "the bias is added twice",
        {"bias": lambda b, G: 2 * b},
        "forward",
    ),
    Bug(
        "the-scaling-multiplies-the-bias-too",
        "the scaling multiplies the bias too",
        {"s_in_bias": lambda s: s},
        "forward",
    ),
    Bug(
        "the-scaling-multiplies-the-base-too",
        "the scaling multiplies the base too: it is s (x W^T + x A^T B^T)",
        {"s_in_base": lambda s: s},
        "forward",
    ),
    Bug(
        "the-scaling-multiplies-the-base-and-the-bias-too",
        "the scaling multiplies the base and the bias too",
        {"s_in_base": lambda s: s, "s_in_bias": lambda s: s},
        "forward",
    ),
    Bug(
        "the-base-weight-is-taken-transposed",
        "the base's weight is taken transposed: W (out, in) is read as (in, out)",
        {"base": lambda x, W: x @ W if W.shape[0] == W.shape[1] else x @ W.T},
        "forward",
    ),
    # the gradients
    Bug(
        "dx-lacks-dy-w",
        "dx lacks dy W: the base passes no gradient, as under torch.no_grad()",
        {"dx_base": 0.0},
        "slope",
        "lora-pytorch 0.2.0",
    ),
    Bug(
        "dx-lacks-the-adapter-path",
        "dx lacks the adapter's path, s dy B A",
        {"dx_update": 0.0},
        "slope",
    ),
    Bug(
        "dx-is-zero",
        "dx is zero",
        {"dx_base": 0.0, "dx_update": 0.0},
        "slope",
    ),
    Bug(
        "lora-a-gradient-lacks-the-scaling-alpha-r",
        "lora_A's gradient lacks the scaling alpha / r",
        {"s_in_dA": lambda s: 1.0},
        "slope",
    ),
    Bug(
        "lora-b-gradient-lacks-the-scaling-alpha-r",
        "lora_B's gradient lacks the scaling alpha / r",
        {"s_in_dB": lambda s: 1.0},
        "slope",
    ),
    Bug(
        "the-gradients-of-both-factors-lack-the-scaling-alpha-r",
        "the gradients of both factors lack the scaling alpha / r",
        {"s_in_dA": lambda s: 1.0, "s_in_dB": lambda s: 1.0},
        "slope",
    ),
    Bug(
        "the-adapter-path-in-dx-lacks-the-scaling-alpha-r",
        "the adapter's path in dx lacks the scaling alpha / r",
        {"s_in_dx": lambda s: 1.0},
        "slope",
    ),
    Bug(
        "lora-a-gradient-has-the-scaling-twice",
        "lora_A's gradient has the scaling twice",
        {"s_in_dA": lambda s: s * s},
        "slope",
    ),
    Bug(
        "lora-b-gradient-has-the-scaling-twice",
        "lora_B's gradient has the scaling twice",
        {"s_in_dB": lambda s: s * s},
        "slope",
    ),
    Bug(
        "lora-a-gradient-has-the-opposite-sign",
        "lora_A's gradient has the opposite sign",
        {"s_in_dA": lambda s: -s},
        "slope",
    ),
    Bug(
        "lora-b-gradient-has-the-opposite-sign",
        "lora_B's gradient has the opposite sign",
        {"s_in_dB": lambda s: -s},
        "slope",
    ),
    Bug(
        "all-gradients-have-the-opposite-sign",
        "all gradients have the opposite sign",
        {"dx_base": -1.0, "dx_update": -1.0, "s_in_dA": lambda s: -s, "s_in_dB": lambda s: -s},
        "slope",
    ),
    Bug(
        "lora-a-gradient-is-zero",
        "lora_A's gradient is zero: A does not train",
        {"s_in_dA": lambda s: 0.0},
        "slope",
    ),
    Bug(
        "lora-b-gradient-is-zero",
        "lora_B's gradient is zero: B does not train",
        {"s_in_dB": lambda s: 0.0},
        "slope",
    ),
    Bug(
        "the-gradients-of-the-factors-are-means-over-the-rows",
        "the gradients of the factors are means over the rows, not sums",
        {"rows": lambda n: 1 / n},
        "slope",
    ),
    # the merge
    Bug(
        "merge-adds-the-change-transposed",
        "merge adds the change transposed",
        {"merged": lambda W, BA, s: W + s * (BA.T if W.shape[0] == W.shape[1] else BA)},
        "merge",
    ),
    Bug(
        "merge-adds-the-change-twice",
        "merge adds the change twice",
        {"merged": lambda W, BA, s: W + 2 * s * BA},
        "merge",
    ),
    Bug(
        "merge-subtracts-the-change",
        "merge subtracts the change",
        {"merged": lambda W, BA, s: W - s * BA},
        "merge",
    ),
    Bug(
        "merge-returns-the-change-alone",
        "merge returns the change alone",
        {"merged": lambda W, BA, s: s * BA},
        "merge",
    ),
    Bug(
        "merge-returns-the-weight-as-it-was",
        "merge returns the weight as it was",
        {"merged": lambda W, BA, s: W},
        "merge",
    ),
    # DoRA
    Bug(
        "dora-norm-is-taken-along-the-wrong-axis",
        "DoRA's norm is taken along the wrong axis: of each column of V, and should be of each row",
        {"length": lambda W, BA, s: np.linalg.norm(W + s * BA, axis=0, keepdims=True)},
        "forward",
        "wanshuiyin/ARIS-in-AI-Offer #17, KohakuBlueleaf/LyCORIS #216",
        kinds=DORA,
    ),
    Bug(
        "dora-norm-is-that-of-w",
        "DoRA's norm is that of W, and should be that of V = W + s B A",
        {"length": lambda W, BA, s: np.linalg.norm(W, axis=1, keepdims=True)},
        "forward",
        "Comfy-Org/ComfyUI #15458",
        kinds=DORA,
    ),
    Bug(
        "dora-norm-lacks-the-scaling",
        "DoRA's norm lacks the scaling: it is that of W + B A, and should be that of V = W + s B A",
        {"length": lambda W, BA, s: np.linalg.norm(W + BA, axis=1, keepdims=True)},
        "forward",
        kinds=DORA,
    ),
    Bug(
        "dora-divides-by-the-square-of-the-norm",
        "DoRA divides by the square of the norm",
        {"gain": lambda m, n: m[:, None] / n**2},
        "forward",
        kinds=DORA,
    ),
    Bug(
        "dora-norm-is-one-number-for-the-whole-of-v",
        "DoRA's norm is one number for the whole of V",
        {"length": lambda W, BA, s: _whole(W + s * BA)},
        "forward",
        kinds=DORA,
    ),
    Bug(
        "dora-does-not-divide-by-the-norm",
        "DoRA does not divide by the norm: the output is m x V^T",
        {"gain": lambda m, n: m[:, None]},
        "forward",
        kinds=DORA,
    ),
    Bug(
        "dora-magnitude-is-not-applied",
        "DoRA's magnitude is not applied: rows have the length 1",
        {"gain": lambda m, n: 1 / n},
        "forward",
        kinds=DORA,
    ),
    Bug(
        "dora-adds-the-base-twice",
        "DoRA adds the base twice: once with its gain, and once as it is",
        {"gain_in_base": lambda G: 1 + G},
        "forward",
        kinds=DORA,
        shows=("y",),
    ),
    Bug(
        "dora-magnitude-is-not-applied-to-the-base",
        "DoRA's magnitude is not applied to the base, and should be to all of V",
        {"gain_in_base": np.ones_like},
        "forward",
        kinds=DORA,
        shows=("y",),
    ),
    Bug(
        "dora-magnitude-is-not-applied-to-the-update",
        "DoRA's magnitude is not applied to the update, and should be to all of V",
        {"gain_in_update": np.ones_like},
        "forward",
        kinds=DORA,
        shows=("y",),
    ),
    Bug(
        "the-magnitude-is-ignored",
        "the magnitude is ignored: this is LoRA",
        {"gain": lambda m, n: np.ones((len(m), 1))},
        "forward",
        kinds=DORA,
    ),
    Bug(
        "dora-magnitude-multiplies-the-bias-too",
        "DoRA's magnitude multiplies the bias too",
        {"bias": lambda b, G: G[:, 0] * b, "bias_in_dm": 1.0},
        "forward",
        "torchtune 0.6.1",
        kinds=DORA,
    ),
    Bug(
        "dora-magnitude-is-not-trained",
        "DoRA's magnitude is not trained: its gradient is zero",
        {"dm": lambda dm, n: 0 * dm},
        "slope",
        "meta-pytorch/torchtune #2250",
        kinds=DORA,
    ),
    Bug(
        "backward-returns-no-gradient-of-magnitude",
        "backward returns no gradient of magnitude: DoRA's does not train",
        {"dm": lambda dm, n: None},
        "slope",
        "meta-pytorch/torchtune #2250",
        kinds=DORA,
    ),
    Bug(
        "magnitude-gradient-has-the-opposite-sign",
        "magnitude's gradient has the opposite sign",
        {"dm": lambda dm, n: -dm},
        "slope",
        kinds=DORA,
    ),
    Bug(
        "magnitude-gradient-is-not-divided-by-the-norm",
        "magnitude's gradient is not divided by the norm",
        {"dm": lambda dm, n: dm * n.max(axis=1)},
        "slope",
        kinds=DORA,
    ),
    Bug(
        "the-gradient-passes-through-dora-norm",
        "the gradient passes through DoRA's norm, which detached_norm declares a constant",
        {"through_norm": 1.0},
        "slope",
        kinds=("dora",),
    ),
    Bug(
        "the-gradient-takes-dora-norm-for-a-constant",
        "the gradient takes DoRA's norm for a constant, where detached_norm = False declares that it passes through",
        {"through_norm": 0.0},
        "slope",
        kinds=("dora-full",),
    ),
    Bug(
        "the-gradient-through-dora-norm-is-added",
        "the gradient through DoRA's norm is added, and should be subtracted",
        {"through_norm": -1.0},
        "slope",
        kinds=("dora-full", "dora"),
    ),
    # embeddings
    Bug(
        "lora-a-gradient-overwrites-where-an-id-comes-again",
        "lora_A's gradient overwrites where an id comes again, and should add up",
        {"seen_by_dA": _last_of_each},
        "slope",
        kinds=("embedding",),
    ),
    Bug(
        "lora-a-gradient-is-a-mean-over-an-id-rows",
        "lora_A's gradient is a mean over an id's rows",
        {"seen_by_dA": lambda X: X / np.maximum(X.sum(axis=0), 1)},
        "slope",
        kinds=("embedding",),
    ),
    Bug(
        "lora-a-gradient-is-zero-for-id-0",
        "lora_A's gradient is zero for id 0, as for padding",
        {"seen_by_dA": _without_first_id},
        "slope",
        kinds=("embedding",),
    ),
    # convolutions
    Bug(
        "the-kernels-are-turned-round",
        "the kernels are turned round: a convolution, where torch's is a cross-correlation",
        _turned,
        "forward",
        kinds=CONVOLUTIONS,
    ),
    Bug(
        "the-kernels-of-lora-a-are-turned-round",
        "lora_A's kernels are turned round: a convolution, where torch's is a cross-correlation",
        _turned_in_A,
        "forward",
        kinds=CONVOLUTIONS,
        shows=("y", "x", "merged"),
    ),
    Bug(
        "merge-turns-the-kernels-round",
        "merge turns the kernels round",
        _kernels(lambda k: np.flip(k, tuple(range(2, k.ndim)))),
        "merge",
        kinds=CONVOLUTIONS,
    ),
    Bug(
        "merge-exchanges-the-channels-and-the-kernel-axes",
        "merge exchanges the channels and the kernel's axes",
        _kernels(lambda k: np.moveaxis(k, 1, -1)),
        "merge",
        kinds=CONVOLUTIONS,
    ),
    Bug(
        "merge-reads-the-kernel-axes-first-and-the-channels-last",
        "merge reads the kernel's axes first and the channels last",
        _kernels(lambda k: np.moveaxis(k.reshape(len(k), *k.shape[2:], k.shape[1]), -1, 1)),
        "merge",
        kinds=CONVOLUTIONS,
    ),
    Bug(
        "merge-exchanges-the-kernel-height-and-width",
        "merge exchanges the kernel's height and width",
        _kernels(_upright),
        "merge",
        kinds=CONVOLUTIONS,
    ),
    Bug(
        "b-groups-are-ignored",
        "B's groups are ignored: each output sums all of the hidden channels, and should take its group's",
        _no_groups,
        "forward",
        "Tencent/YOLO-Master #228",
        kinds=CONVOLUTIONS,
        shows=("y", "x"),
    ),
    Bug(
        "groups-are-ignored-in-a-depthwise-convolution",
        "groups are ignored where there is one for each channel: each output sums all of the hidden channels",
        _depthwise,
        "forward",
        kinds=CONVOLUTIONS,
        shows=("y", "x"),
    ),
    # dropout
    Bug("dropout-is-not-applied", "the mask is not applied", WITHOUT_MASK, "forward", kinds=DROPPED),
    Bug(
        "dropout-is-applied-to-the-base-too",
        "the mask is applied to the base too, and should be in the adapter's path alone",
        {"dropped_in_base": lambda x, mask: x * mask},
        "forward",
        kinds=DROPPED,
    ),
    Bug(
        "what-dropout-keeps-is-not-scaled",
        "what the mask keeps is not scaled by 1 / (1 - p)",
        {name: lambda x, mask: x * (mask != 0) for name in WITHOUT_MASK},
        "forward",
        kinds=DROPPED,
    ),
    Bug(
        "dx-lacks-the-mask",
        "dx lacks the mask: the adapter's path passes a gradient to what was dropped",
        {"dropped_in_dx": lambda dx, mask: dx},
        "slope",
        kinds=DROPPED,
    ),
    Bug(
        "lora-a-gradient-lacks-the-mask",
        "lora_A's gradient lacks the mask: it is by x, and should be by what was kept of it",
        {"dropped_in_dA": lambda x, mask: x},
        "slope",
        kinds=DROPPED,
    ),
    # how the factors are read
    Bug(
        "lora-b-is-reshaped-where-it-lies-transposed",
        "lora_B is read as (r, out) and reshaped: it should be transposed",
        {"hidden": lambda B: B.T.reshape(B.shape)},
        "forward",
        "unslothai/unsloth-zoo #1269",
        shows=("y", "x", "merged"),
    ),
    Bug(
        "lora-a-is-reshaped-where-it-lies-transposed",
        "lora_A is read as (in, r) and reshaped: it should be transposed",
        {"down": lambda A: A.T.reshape(A.shape)},
        "forward",
        shows=("y", "x", "merged"),
    ),
    Bug(
        "lora-b-is-reshaped-in-the-place-of-its-transpose",
        "lora_B (out, r) is reshaped to (r, out): it should be transposed",
        {"hidden": lambda B: B.reshape(B.shape[::-1]).T},
        "forward",
        "unslothai/unsloth-zoo #1269",
        shows=("y", "x", "merged"),
    ),
    Bug(
        "lora-a-is-reshaped-in-the-place-of-its-transpose",
        "lora_A (r, in) is reshaped to (in, r): it should be transposed",
        {"down": lambda A: A.reshape(A.shape[::-1]).T},
        "forward",
        shows=("y", "x", "merged"),
    ),
    Bug(
        "the-base-weight-is-reshaped-in-the-place-of-its-transpose",
        "the base's weight (out, in) is reshaped to (in, out): it should be transposed",
        {"base": lambda x, W: x @ W.reshape(W.shape[::-1])},
        "forward",
        shows=("y",),
    ),
    Bug(
        "the-ranks-of-the-factors-stand-in-opposite-orders",
        "the ranks of lora_B stand in the opposite order to those of lora_A",
        {"hidden": lambda B: B[:, ::-1]},
        "forward",
        shows=("y", "x", "merged"),
    ),
    Bug(
        "the-halves-of-the-ranks-are-exchanged",
        "the halves of the ranks are exchanged in one of the factors",
        {"hidden": lambda B: np.roll(B, B.shape[1] // 2, axis=1)},
        "forward",
        "huggingface/diffusers #13998, sgl-project/sglang #27274",
        shows=("y", "x", "merged"),
    ),
    Bug(
        "the-last-rank-is-left-out",
        "the last rank is left out: the last row of lora_A and the last column of lora_B do not count",
        _all_ranks_but_one,
        "forward",
        kinds=ONE_ADAPTER,
    ),
    # sizes at which a kernel's tiles end
    Bug(
        "ranks-above-32-are-left-out",
        "ranks above 32 are left out: only the first 32 rows of lora_A and columns of lora_B count",
        _ranks_up_to_32,
        "forward",
        "predibase/lorax #70",
        kinds=ROWS,
    ),
    Bug(
        "rows-from-128-on-lack-the-update",
        "rows from 128 on lack the update",
        _rows_up_to_128,
        "forward",
        kinds=ROWS,
        shows=("y",),
    ),
    Bug(
        "outputs-from-128-on-lack-the-update",
        "outputs from 128 on lack the update",
        _outputs_up_to_128,
        "forward",
        kinds=ROWS,
    ),
    # the edge of the contract
    Bug(
        "an-alpha-of-0-is-taken-for-1",
        "an alpha of 0 is taken for 1, as by `alpha or 1`",
        {"scaling": lambda alpha, r: (alpha or 1) / r},
        "alpha of 0",
        kinds=PLAIN,
    ),
    Bug(
        "an-alpha-of-0-is-taken-for-the-rank",
        "an alpha of 0 is taken for the rank, as by `alpha or r`",
        {"scaling": lambda alpha, r: (alpha or r) / r},
        "alpha of 0",
        kinds=PLAIN,
    ),
    Bug(
        "rslora-an-alpha-of-0-is-taken-for-the-rank",
        "an alpha of 0 is taken for the rank, as by `alpha or r`, and rsLoRA divides that by its root",
        {"scaling": lambda alpha, r: (alpha or r) / r**0.5},
        "alpha of 0",
        kinds=("rslora",),
    ),
    Bug(
        "dora-divides-by-the-length-of-a-row-of-zeros",
        "DoRA divides by the length of a row of zeros: the output there is not a number, and should be the bias",
        {"gain": lambda m, n: m[:, None] / n},
        "row of zeros",
        "huggingface/peft #2049, huggingface/peft #3237",
        kinds=DORA,
    ),
    # four bits
    Bug(
        "nf4-the-halves-of-a-byte-are-exchanged",
        "the two codes of a byte are exchanged: the high half is the earlier one",
        _other_weight(low_first=True),
        "forward",
        kinds=("nf4",),
        shows=("y", "x", "merged"),
    ),
    Bug(
        "nf4-the-scales-of-the-scales-are-left-out",
        "the scales of the scales are left out",
        _other_weight(only_double=True, nested_absmax=np.ones(2, np.float32)),
        "forward",
        "bitsandbytes-foundation/bitsandbytes #1549",
        kinds=("nf4",),
        shows=("y", "x", "merged"),
    ),
    Bug(
        "nf4-the-mean-of-the-scales-is-not-added",
        "the mean of the scales is not added",
        _other_weight(only_double=True, mean=np.zeros(1, np.float32)),
        "forward",
        kinds=("nf4",),
        shows=("y", "x", "merged"),
    ),
    Bug(
        "nf4-the-mean-of-the-scales-is-read-in-bfloat16",
        "the mean of the scales is rounded to bfloat16",
        _other_weight(only_double=True, mean=np.array([1.453125], np.float32)),
        "forward",
        "bitsandbytes-foundation/bitsandbytes #1971",
        kinds=("nf4",),
        shows=("y", "x", "merged"),
    ),
    Bug(
        "nf4-the-code-book-is-of-middle-quantiles",
        "the code book is the quantiles at (i + 1/2) / 16, which have no 0",
        _other_weight(book=_middle_quantiles()),
        "forward",
        kinds=("nf4",),
        shows=("y", "x", "merged"),
    ),
    Bug(
        "nf4-the-code-book-has-even-steps",
        "the code book has even steps from -1 to 1",
        _other_weight(book=np.linspace(-1, 1, 16)),
        "forward",
        kinds=("nf4",),
        shows=("y", "x", "merged"),
    ),
    Bug(
        "nf4-the-scales-of-the-blocks-are-left-out",
        "the scales of the blocks are left out",
        _without_scales,
        "forward",
        kinds=("nf4",),
        shows=("y", "x", "merged"),
    ),
    Bug(
        "nf4-the-codes-are-read-column-after-column",
        "the codes are read column after column, and lie row after row",
        _column_after_column,
        "forward",
        kinds=("nf4",),
        shows=("y", "x", "merged"),
    ),
    Bug(
        "nf4-pack-exchanges-the-halves-of-a-byte",
        "pack puts the earlier code into the low half of a byte, and should put it into the high one",
        {"pack": partial(_packed, high=1, low=16)},
        "codes",
        kinds=("nf4",),
    ),
    Bug(
        "nf4-pack-takes-the-next-lower-code",
        "pack takes the next lower code, and should take the nearest",
        {"pack": partial(_packed, nearest=lambda v: np.maximum(np.searchsorted(NF4, v, side="right") - 1, 0))},
        "codes",
        kinds=("nf4",),
    ),
    Bug(
        "nf4-pack-scales-by-the-largest-and-not-absolute",
        "pack scales by the largest weight of a block, and should by the largest absolute value",
        {"pack": partial(_packed, scale=lambda blocks: blocks.max(axis=1))},
        "codes",
        kinds=("nf4",),
    ),
    Bug(
        "nf4-pack-divides-a-block-of-zeros-by-its-scale",
        "pack divides a block of zeros by its scale, which makes it not a number",
        {"pack": partial(_packed, scale=_no_scale_of_zeros)},
        "codes",
        kinds=("nf4",),
    ),
    # slots
    Bug(
        "slots-of-one-width-are-exchanged",
        "slots of one width are exchanged, as v's update in k's rows and k's in v's",
        _rows_by(_exchanged),
        "forward",
        kinds=FUSED,
    ),
    Bug(
        "slots-stand-in-the-opposite-order",
        "the slots' updates stand in the opposite order",
        _rows_by(lambda fused, i: _from(fused, i, sum(fused.widths[i + 1 :]))),
        "forward",
        kinds=FUSED,
    ),
    Bug(
        "a-slots-update-is-added-to-the-next",
        "a slot's update is added to the rows of the next one, as k's to those of v",
        _rows_by(_to_the_next),
        "forward",
        kinds=FUSED,
    ),
    Bug(
        "slots-are-taken-for-equally-wide",
        "the slots are taken for equally wide: each begins at a multiple of out / slots",
        _rows_by(lambda fused, i: _from(fused, i, i * (fused.out_features // len(fused.widths)))),
        "forward",
        "Lightning-AI/litgpt #357",
        kinds=FUSED,
    ),
    Bug(
        "the-rows-of-slots-alternate-by-groups",
        "the slots are taken for cut into two groups, q1 k1 v1 q2 k2 v2, and each stands in one piece",
        _by_groups(lambda fused: 2),
        "forward",
        "Lightning-AI/litgpt #891",
        kinds=FUSED,
    ),
    Bug(
        "the-rows-of-slots-alternate",
        "the rows of the slots are taken for alternating, and each slot stands in one piece",
        _by_groups(lambda fused: min(fused.widths)),
        "forward",
        kinds=FUSED,
    ),
    Bug(
        "a-slot-without-an-adapter-gets-an-update",
        "a slot without an adapter gets an update: those of the others are added from the first row on, without gaps",
        _rows_by(_packed_slots),
        "forward",
        kinds=FUSED,
    ),
    Bug(
        "the-last-slots-update-is-left-out",
        "the last slot's update is left out",
        lambda fused: {"slot_rows": lambda fused, i: fused.rows_of(i) if i != fused.adapted[-1] else None},
        "forward",
        kinds=FUSED,
    ),
    Bug(
        "the-first-slot-alone-gets-its-update",
        "the first slot alone gets its update",
        lambda fused: {"slot_rows": lambda fused, i: fused.rows_of(i) if i == fused.adapted[0] else None},
        "forward",
        kinds=FUSED,
    ),
    Bug(
        "one-scaling-for-all-slots",
        "the first slot's scaling is taken for all",
        {"slot_scale": lambda fused, i: (fused.alphas[fused.adapted[0]], fused.ranks[fused.adapted[0]])},
        "forward",  # one number for the whole output, which the claim "scaling" is about, is not what is wrong
        "huggingface/diffusers #14409",
        kinds=FUSED,
    ),
    Bug(
        "alpha-is-divided-by-the-ranks-of-all-slots",
        "alpha is divided by the ranks of all slots together, as where their lora_A are one array",
        {"slot_scale": lambda fused, i: (fused.alphas[i], sum(fused.ranks))},
        "forward",
        "kohya-ss/sd-scripts #2204",
        kinds=FUSED,
    ),
    Bug(
        "one-lora-a-for-all-slots",
        "the first slot's lora_A is used for all",
        _one_down,
        "forward",
        kinds=FUSED,
    ),
    Bug(
        "dx-has-the-first-slots-path-alone",
        "dx has the first slot's path alone, and should have those of all",
        {"slot_in_dx": lambda fused, i: float(i == fused.adapted[0])},
        "slope",
        kinds=FUSED,
    ),
    # float32 beside bfloat16
    Bug(
        "mixed-the-factors-are-rounded",
        "lora_A and lora_B are rounded to bfloat16, the base's precision, and should stay in float32",
        {"down": in_half, "hidden": in_half},
        "forward",
        "axolotl-ai-cloud/axolotl #3143",
        kinds=MIXED,
    ),
    Bug(
        "mixed-lora-a-is-rounded",
        "lora_A is rounded to bfloat16, the base's precision, and should stay in float32",
        {"down": in_half},
        "forward",
        kinds=MIXED,
    ),
    Bug(
        "mixed-lora-b-is-rounded",
        "lora_B is rounded to bfloat16, the base's precision, and should stay in float32",
        {"hidden": in_half},
        "forward",
        kinds=MIXED,
    ),
    Bug(
        "mixed-the-adapter-computes-in-bfloat16",
        "the adapter computes in bfloat16, as under autocast: its factors and each of its products are rounded",
        _autocast(),
        "forward",
        "AgileRL/AgileRL #623",
        kinds=MIXED,
        rounds=True,
    ),
    Bug(
        "mixed-the-update-is-rounded-before-the-sum",
        "the update is rounded to bfloat16 before it is added: the sum is taken in the base's precision",
        {"updated": lambda update, *_: in_half(update)},
        "forward",
        kinds=MIXED,
        rounds=True,
    ),
    Bug(
        "mixed-the-gradients-are-rounded",
        "the gradients of lora_A and lora_B are rounded to bfloat16, and should be float32 as these are",
        {"trained": lambda dA, dB, *_: (in_half(dA), in_half(dB))},
        "slope",
        kinds=MIXED,
        rounds=True,
    ),
    Bug(
        "mixed-the-output-is-float32",
        "the output is not rounded to bfloat16, the precision of the base and of x (or declare output = 'float32')",
        {},
        "output dtype",
        "mflux-community/mflux #740",
        kinds=MIXED,
    ),
    # the start
    Bug(
        "a-starts-with-the-fan-of-the-rank",
        "A's start has the spread of fan r",
        {"fan": lambda r, n_in, n_out, kernel: r},
        "start",
        "lora-pytorch 0.2.0",
        kinds=ALL_BUT_EMBEDDING,
    ),
    Bug(
        "a-starts-with-the-fan-of-the-output",
        "A's start has the spread of fan out",
        {"fan": lambda r, n_in, n_out, kernel: n_out},
        "start",
        kinds=ALL_BUT_EMBEDDING,
    ),
    Bug(
        "a-starts-with-the-fan-of-the-channels-alone",
        "A's start has the spread of the channels alone, without the kernel",
        {"fan": lambda r, n_in, n_out, kernel: n_in},
        "start",
        kinds=CONVOLUTIONS,
    ),
    # Adam
    Bug(
        "adam-eps-stands-inside-the-root",
        "Adam's eps stands inside the root",
        {"direction": lambda m_hat, v_hat, eps: m_hat / np.sqrt(v_hat + eps)},
        "adam",
        kinds=ADAM,
    ),
    Bug(
        "adam-has-no-bias-correction",
        "Adam has no bias correction",
        {"m_hat": lambda m, beta, t: m, "v_hat": lambda v, beta, t: v},
        "adam",
        kinds=ADAM,
    ),
    Bug(
        "adam-corrects-no-bias-of-v",
        "Adam corrects no bias of v",
        {"v_hat": lambda v, beta, t: v},
        "adam",
        kinds=ADAM,
    ),
    Bug(
        "adam-corrects-no-bias-of-m",
        "Adam corrects no bias of m",
        {"m_hat": lambda m, beta, t: m},
        "adam",
        kinds=ADAM,
    ),
    Bug(
        "adam-eps-is-added-before-the-correction",
        "Adam's eps is added before the correction",
        {"eps": lambda eps, beta2, t: eps / np.sqrt(1 - beta2**t)},
        "adam",
        kinds=ADAM,
    ),
    Bug("adam-has-no-eps", "Adam has no eps", {"eps": lambda eps, beta2, t: 0.0}, "adam", kinds=ADAM),
    Bug(
        "adam-eps-is-1e-6",
        "Adam's eps is 1e-6, and should be 1e-8",
        {"eps": lambda eps, beta2, t: 1e-6},
        "adam",
        kinds=ADAM,
    ),
    Bug(
        "adam-divides-by-v",
        "Adam divides by v, not by its root",
        {"direction": lambda m_hat, v_hat, eps: m_hat / (v_hat + eps)},
        "adam",
        kinds=ADAM,
    ),
    Bug("adam-goes-uphill", "Adam goes uphill", {"step": lambda d, theta, g: -d}, "adam", kinds=ADAM),
    Bug(
        "adam-takes-the-size-of-the-gradient-for-its-square",
        "Adam's v is a mean of |g|, and should be of g^2",
        {"v": lambda v, g, beta: beta * v + rest(beta) * abs(g)},
        "adam",
        kinds=ADAM,
    ),
    Bug(
        "adam-betas-are-exchanged",
        "Adam's betas are exchanged",
        {"betas": lambda betas: betas[::-1]},
        "adam",
        kinds=ADAM,
    ),
    Bug(
        "a-weight-decay-of-0-01-is-added-to-adam-step",
        "a weight decay of 0.01 is added to Adam's step, as in AdamW",
        {"step": lambda d, theta, g: d + 0.01 * theta},
        "adam",
        kinds=ADAM,
    ),
    Bug(
        "the-step-is-plain-gradient-descent",
        "the step is plain gradient descent",
        {"step": lambda d, theta, g: g},
        "adam",
        kinds=ADAM,
    ),
    Bug(
        "the-step-moves-nothing", "the step moves nothing", {"step": lambda d, theta, g: 0 * theta}, "adam", kinds=ADAM
    ),
)
