"""Problems that Hypothesis draws for a layer, a loss or Adam, with what must hold for each: `holds`.

A problem is a frozen record, so it prints as the line of Python that makes it again. Every field shrinks towards what
is smallest: one entry, float64, no scale, arrays as NumPy lays them. Sizes are small and begin with 1 (a number of rows
with 0), so equal sizes, a rank above both widths and single entries come often, and `zero` makes one of the arrays
zero.

A slope is measured here, by a few lines that know neither `gradcheck` nor a backward, in float64 at the values that the
array has in its own precision. A layer whose output is linear in each of its arrays is handed small integers, times a
power of two: central differences with a step of one are then exact, and so is every sum in float32, in whatever
order. So the gradients must be equal to the slopes, to the last bit, in both precisions. Where there is a root or an
exponential, the slope is measured by a complex step, and rounding is allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from minilora import (
    Adam,
    Conv1d,
    Conv2d,
    DoRA,
    DoRAAdapter,
    Embedding,
    Layer,
    Linear,
    LoRA,
    LoRALinear,
    cross_entropy,
    mse,
)
from minilora.fast.blockwise import Blocks, BlockwiseAttention
from minilora.layer import freeze
from minilora.layers.attention import Attention
from minilora.layers.norm import RMSNorm
from minilora.layers.rotary import Rotary, frequencies
from minilora.variants.adapter import AdaptedRows, Adapter
from minilora.variants.dropout import DroppingLoRALinear

Arrays = dict[str, np.ndarray]

BY_DEFAULT = 200
LOOKED_AT = {"night": 3000, "mutation": 20}.get(settings.get_current_profile_name(), BY_DEFAULT)
"""How many problems of each family are drawn."""

ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": np.copy,
    "F": lambda a: a.copy(order="F"),
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "backwards": lambda a: np.flip(np.flip(a).copy()),
}
"""How the entries of an array lie in memory."""
SMALLEST, LARGEST = 2.0**-13, 2.0**13
"""About 1e-4 and 1e4."""


def of(*first: Any) -> Any:
    """Return a field that is drawn from these values, and shrinks towards the first."""
    return field(metadata={"drawn": st.sampled_from(first)})


def seldom(*names: str) -> Any:
    """Return a field that is mostly the empty text, and now and then one of these."""
    return of(*("",) * 4 * len(names), *names)


def drawn(strategy: st.SearchStrategy) -> Any:
    return field(metadata={"drawn": strategy})


SHAPES = ((1,), (2,), (3,), (1, 1), (2, 1), (1, 2), (2, 2), (2, 3), (3, 2), (1, 3, 2), (2, 1, 3), (2, 2, 2))
SOME_ROWS = (*SHAPES, (), ())
ROWS = (*SOME_ROWS, (0,), (2, 0), (0, 2))
"""The axes before the last: one of a batch, none of a vector, and up to three; (2, 0) has no rows."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What every problem has. A subclass has its sizes, makes a layer of arrays, and says which arrays there are."""

    dtype: str = of("float64", "float32")
    scale: float = of(1.0, SMALLEST, LARGEST)
    order: str = of(*ORDERS)
    seed: int = drawn(st.integers(0, 2**16 - 1))

    @classmethod
    def drawn(cls) -> st.SearchStrategy[Any]:
        """Return what draws problems of this kind."""
        return st.builds(cls, **{each.name: each.metadata["drawn"] for each in fields(cls)})

    def rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *name.encode()])

    def integers(self, name: str, *shape: int) -> np.ndarray:
        """Return small integers, zeros among them."""
        return self.rng(name).choice(np.array([-9.0, -3.0, -1.0, 0.0, 1.0, 2.0, 7.0]), shape)

    def gaussian(self, name: str, *shape: int) -> np.ndarray:
        return self.rng(name).standard_normal(shape)

    def laid(self, values: np.ndarray) -> np.ndarray:
        """Return values in the problem's precision, laid out its way, and never to be written to."""
        array = ORDERS[self.order](values.astype(self.dtype))
        array.flags.writeable = False
        return array


def difference(f: Callable[[np.ndarray], Any], at: np.ndarray) -> np.ndarray:
    """Return how f changes along each entry, by a step of one to either side: exact where f is quadratic there."""
    ways = np.eye(at.size).reshape(at.size, *at.shape)
    changes = np.array([(f(at + way) - f(at - way)) / 2 for way in ways])
    return changes.reshape(*at.shape, *changes.shape[1:])


def complex_step(f: Callable[[np.ndarray], Any], at: np.ndarray) -> np.ndarray:
    """Return how f changes along each entry, by a step of 1e-20 i: nothing is subtracted, so nothing cancels."""
    ways = np.eye(at.size).reshape(at.size, *at.shape)
    changes = np.array([f(at + 1e-20j * way).imag / 1e-20 for way in ways])
    return changes.reshape(*at.shape, *changes.shape[1:])


def same(name: str, found: Any, expected: np.ndarray, allowed: Any = 0.0) -> None:
    """Require the shape and the numbers."""
    assert np.shape(found) == expected.shape, f"{name} has shape {np.shape(found)}, expected {expected.shape}"
    if not (np.abs(found - expected) <= allowed).all():
        raise AssertionError(f"{name} is {found}, expected {expected} within {np.max(allowed):.1g}")


# --- layers ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LayerProblem(Problem):
    """A layer and its input: `holds` says what must hold for its backward."""

    exact: ClassVar[bool] = True  # whether the output is linear in each array
    tolerance: ClassVar[dict[str, float]] = {"float64": 1e-11, "float32": 1e-4}
    """Where it is not: how far off a gradient may be, as a share of what the array of the most influence changes."""

    def trained(self) -> Arrays:
        """Return the arrays that have a slope: what trains and, unless the input is of ids, x."""
        raise NotImplementedError

    def fixed(self) -> Arrays:
        """Return the arrays that do not train."""
        return {}

    def layer(self, arrays: Arrays) -> Layer:
        """Return the layer of all these arrays, in whatever precision they are."""
        raise NotImplementedError

    def measured(self, arrays: Arrays) -> Layer:
        """Return the layer whose slope the backward is: itself."""
        return self.layer(arrays)

    def input(self, arrays: Arrays) -> np.ndarray:
        return arrays["x"]

    def holds(self) -> None:
        """Require the slope for each gradient; the same without dx; and of a frozen layer the same dx alone."""
        scales = {"x": self.scale}
        at = {n: self.laid(a * scales.get(n, 1.0) * (n != self.zero)) for n, a in self.trained().items()}
        fixed = {name: self.laid(array) for name, array in self.fixed().items()}
        layer, x = self.layer(fixed | at), self.input(at)
        y, cache = layer.forward(x)
        dy = self.laid(self.integers("dy", *y.shape) * (self.zero != "dy"))
        dx, grads = layer.backward(dy, cache)
        assert grads.keys() == layer.trainable().keys(), f"gradients of {list(grads)}, not of what trains"

        found = grads if "x" not in at else {"x": dx, **grads}
        changes = self.changes(at, fixed, dy)
        sizes = (abs(change).sum(axis=-1).max(initial=0) * scales.get(name, 1.0) for name, change in changes.items())
        size = max(self.scale, *sizes)  # no less than x has: where W and s B A cancel, their rounding is measured too
        for name, change in changes.items():
            slope = change.sum(axis=-1)
            allowed = 0.0 if self.exact else self.tolerance[self.dtype] * size / scales.get(name, 1.0)
            same(f"the gradient of {name}", found[name], slope, allowed)
            assert found[name].dtype == self.dtype, f"the gradient of {name} is {found[name].dtype}"

        none, alone = layer.backward(dy, cache, need_dx=False)
        assert none is None, "dx where nobody asked for it"
        for name, grad in grads.items():
            same(f"without dx, the gradient of {name}", alone[name], grad)
        frozen = freeze(layer)
        frozen_dx, nothing = frozen.backward(dy, frozen.forward(x)[1])
        assert not nothing, f"a frozen layer has gradients of {list(nothing)}"
        if dx is not None:
            same("dx of the frozen layer", frozen_dx, dx)

    def changes(self, at: Arrays, fixed: Arrays, dy: np.ndarray) -> Arrays:
        """Return how each entry changes each term of sum(dy * y), along a last axis, in float64."""
        change, kind = (difference, "float64") if self.exact else (complex_step, "complex128")
        at, fixed = {n: a.astype(kind) for n, a in at.items()}, {n: a.astype("float64") for n, a in fixed.items()}

        def terms(name: str, moved: np.ndarray) -> np.ndarray:
            arrays = fixed | at | {name: moved}
            return (dy.astype("float64") * self.measured(arrays)(self.input(arrays))).ravel()

        return {name: change(partial(terms, name), a).reshape(*a.shape, dy.size) for name, a in at.items()}


@dataclass(frozen=True, kw_only=True)
class LinearProblem(LayerProblem):
    """The layer that is adapted, here trained itself."""

    rows: tuple[int, ...] = of(*ROWS)
    in_features: int = of(1, 2, 3)
    out_features: int = of(1, 2, 3)
    bias: bool = of(False, True)
    zero: str = seldom("x", "dy", "weight")

    def trained(self) -> Arrays:
        bias = {"bias": self.integers("bias", self.out_features)} if self.bias else {}
        return {"x": self.integers("x", *self.rows, self.in_features), **self.weight(), **bias}

    def weight(self) -> Arrays:
        return {"weight": self.integers("weight", self.out_features, self.in_features)}

    def layer(self, arrays: Arrays) -> Layer:
        return Linear(arrays["weight"], arrays.get("bias"))


@dataclass(frozen=True, kw_only=True)
class LoRAProblem(LinearProblem):
    """The adapter alone. Its scaling alpha / r is a power of two, far from 1 now and then, and so exact."""

    rank: int = of(1, 2, 3, 4)
    scaling: float = of(1.0, 2.0, 0.5, 256.0, 1 / 256)
    bias: bool = of(False)
    zero: str = seldom("x", "dy", "lora_A", "lora_B")

    @property
    def alpha(self) -> float:
        return self.scaling * self.rank

    def factors(self) -> Arrays:
        return {
            "lora_A": self.integers("lora_A", self.rank, self.in_features),
            "lora_B": self.integers("lora_B", self.out_features, self.rank),
        }

    def trained(self) -> Arrays:
        return {"x": super().trained()["x"], **self.factors()}

    def layer(self, arrays: Arrays) -> Layer:
        return LoRA(arrays["lora_A"], arrays["lora_B"], self.alpha)


@dataclass(frozen=True, kw_only=True)
class LoRALinearProblem(LoRAProblem):
    """An adapter beside its base; with dropout, by which all of its input may be dropped."""

    bias: bool = of(False, True)
    dropout: float | None = of(None, 0.5, 0.875)

    def fixed(self) -> Arrays:
        return {name: array for name, array in LinearProblem.trained(self).items() if name != "x"}

    def layer(self, arrays: Arrays) -> Layer:
        base, adapter = LinearProblem.layer(self, arrays), super().layer(arrays)
        if self.dropout is None:
            return LoRALinear(base, adapter)
        return DroppingLoRALinear(base, adapter, self.dropout, keys=(self.seed,))


@dataclass(frozen=True, kw_only=True)
class DoRAProblem(LoRALinearProblem):
    """DoRA. With the constant norm, its backward is the slope of the forward whose norm is held.

    A row of V = W + s B A may be zero; there the norm is taken for 1, and has no slope.
    """

    exact: ClassVar[bool] = False
    norm: str = of("constant", "full")
    dropout: None = of(None)
    scaling: float = of(1.0, 2.0, 0.5, 0.25)
    zero: str = seldom("x", "dy", "lora_A", "lora_B", "magnitude", "V")

    def trained(self) -> Arrays:
        arrays = super().trained() | {"magnitude": self.integers("magnitude", self.out_features)}
        return arrays | {"lora_B": 0 * arrays["lora_B"]} if self.zero == "V" else arrays

    def fixed(self) -> Arrays:
        arrays = super().fixed()
        return arrays | {"weight": 0 * arrays["weight"]} if self.zero == "V" else arrays

    def layer(self, arrays: Arrays) -> Layer:
        names = ("lora_A", "lora_B", "magnitude")
        adapter = DoRAAdapter(**{name: arrays[name] for name in names}, alpha=self.alpha, dora_norm=self.norm)
        return DoRA(LinearProblem.layer(self, arrays), adapter)

    def measured(self, arrays: Arrays) -> Layer:
        layer = self.layer(arrays)
        V = arrays["weight"] + self.scaling * arrays["lora_B"] @ arrays["lora_A"]
        held = np.sqrt((V.real**2).sum(axis=1))
        n = np.sqrt((V**2).sum(axis=1, where=held[:, None] > 0, initial=0)) if self.norm == "full" else held
        layer.norm = lambda: np.where(held > 0, n, 1.0)
        return layer


@dataclass(frozen=True, kw_only=True)
class EmbeddingProblem(LayerProblem):
    """A table of vectors, or one that is frozen and has an adapter; a rank of 0 is none. Ids may repeat."""

    rows: tuple[int, ...] = of(*ROWS)
    ids: int = of(1, 2, 3)
    width: int = of(1, 2, 3)
    rank: int = of(0, 1, 2, 3, 5)
    scaling: float = of(1.0, 2.0, 0.5)
    zero: str = seldom("dy", "lora_B")

    def table(self) -> Arrays:
        return {"weight": self.integers("weight", self.ids, self.width)}

    def trained(self) -> Arrays:
        factors = {"lora_A": (self.rank, self.ids), "lora_B": (self.width, self.rank)}
        return {n: self.integers(n, *shape) for n, shape in factors.items()} if self.rank else self.table()

    def fixed(self) -> Arrays:
        return self.table() if self.rank else {}

    def layer(self, arrays: Arrays) -> Layer:
        table = Embedding(arrays["weight"])
        if not self.rank:
            return table
        adapter = Adapter(arrays["lora_A"], arrays["lora_B"], self.scaling * self.rank, kind="embedding")
        return AdaptedRows(table, adapter)

    def input(self, arrays: Arrays) -> np.ndarray:
        return self.rng("ids").integers(0, self.ids, self.rows)


@dataclass(frozen=True)
class Axis:
    """How a kernel moves along one axis of an image."""

    size: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    @classmethod
    def drawn(cls) -> st.SearchStrategy[Axis]:
        """Return what draws axes on which the kernel has a place, such as steps longer than the kernel."""

        def axis(more: int, kernel: int, stride: int, padding: int, dilation: int) -> Axis:
            reach = dilation * (kernel - 1) + 1
            return cls(max(1, reach - 2 * padding) + more, kernel, stride, padding, dilation)

        return st.builds(axis, *map(st.sampled_from, ((0, 1, 2), (1, 2, 2, 1, 3, 2), (1, 2, 3), (0, 1, 2), (1, 2))))


@dataclass(frozen=True, kw_only=True)
class ConvolutionProblem(LayerProblem):
    """A convolution over one axis or two, or one that is frozen and has an adapter; a rank of 0 is none."""

    axes: tuple[Axis, ...] = drawn(st.tuples(Axis.drawn()) | st.tuples(Axis.drawn(), Axis.drawn()))
    images: int = of(1, 2, 0)
    channels: int = of(1, 2)
    out_features: int = of(1, 2, 3)
    bias: bool = of(False, True)
    rank: int = of(0, 0, 0, 1, 2, 3)
    scaling: float = of(1.0, 2.0, 0.5)
    zero: str = seldom("x", "dy", "lora_B")

    def full(self) -> Arrays:
        bias = {"bias": self.integers("bias", self.out_features)} if self.bias else {}
        kernel = (axis.kernel for axis in self.axes)
        return {"weight": self.integers("weight", self.out_features, self.channels, *kernel), **bias}

    def trained(self) -> Arrays:
        x = self.integers("x", self.images, self.channels, *(axis.size for axis in self.axes))
        if not self.rank:
            return {"x": x, **self.full()}
        width = self.channels * int(np.prod([axis.kernel for axis in self.axes]))
        A, B = self.integers("lora_A", self.rank, width), self.integers("lora_B", self.out_features, self.rank)
        return {"x": x, "lora_A": A, "lora_B": B}

    def fixed(self) -> Arrays:
        return self.full() if self.rank else {}

    def layer(self, arrays: Arrays) -> Layer:
        steps = {n: tuple(getattr(axis, n) for axis in self.axes) for n in ("stride", "padding", "dilation")}
        cls, kind = ((Conv1d, "conv1d"), (Conv2d, "conv2d"))[len(self.axes) - 1]
        base = cls(arrays["weight"], arrays.get("bias"), **steps)
        if not self.rank:
            return base
        kernel = tuple(axis.kernel for axis in self.axes)
        factors = arrays["lora_A"], arrays["lora_B"]
        return AdaptedRows(base, Adapter(*factors, self.scaling * self.rank, kind=kind, kernel=kernel))


@dataclass(frozen=True, kw_only=True)
class AttentionProblem(LayerProblem):
    """Attention with grouped queries, whole or by blocks, with norms or without. Large inputs meet small weights."""

    exact: ClassVar[bool] = False
    rows: tuple[int, ...] = of((), (1,), (2,), (3,), (2, 1), (1, 2), (2, 2), (0,))
    positions: int = of(1, 2, 3)
    width: int = of(1, 2, 3)
    kv_heads: int = of(1, 2)
    group: int = of(1, 2)
    head: int = of(2, 4)
    normed: bool = of(False, True)
    blocks: tuple[int, int] | None = of(None, None, None, (1, 1), (1, 2), (2, 2))
    zero: str = seldom("x", "dy", "q_proj.weight", "v_proj.weight")

    def trained(self) -> Arrays:
        KD = self.kv_heads * self.head
        shapes = {"q_proj": (KD * self.group, self.width), "k_proj": (KD, self.width), "v_proj": (KD, self.width)}
        arrays = {f"{n}.weight": self.gaussian(n, *shape) / self.scale for n, shape in shapes.items()}
        arrays["o_proj.weight"] = self.gaussian("o_proj", self.width, KD * self.group)
        if self.normed:
            arrays |= {f"{n}.weight": self.gaussian(n, self.head) for n in ("q_norm", "k_norm")}
        return {"x": self.gaussian("x", *self.rows, self.positions, self.width), **arrays}

    def layer(self, arrays: Arrays) -> Layer:
        parts = {n: Linear(arrays[f"{n}.weight"]) for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        norms = {n: RMSNorm(arrays[f"{n}.weight"], eps=0.3) for n in ("q_norm", "k_norm") if self.normed}
        parts |= {"rotary": Rotary(frequencies(self.head, 50.0)), **norms}
        if self.blocks is None:
            return Attention(**parts)
        return BlockwiseAttention(**parts, blocks=Blocks(*self.blocks, plain_up_to=0))


# --- losses and Adam, beside formulas of their own ------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MSEProblem(Problem):
    """The mean of squares. Of integers, only the division by their number is rounded."""

    shape: tuple[int, ...] = of(*SHAPES)
    equal: bool = of(False, True)  # whether the prediction meets its target

    def holds(self) -> None:
        """Require the mean, and its slope."""
        p = self.laid(self.scale * self.integers("p", *self.shape))
        t = p if self.equal else self.laid(self.scale * self.integers("t", *self.shape))
        wide_p, wide_t = p.astype("float64") / self.scale, t.astype("float64") / self.scale  # integers again
        squares = ((wide_p - wide_t) ** 2).sum() / p.size * self.scale**2
        slope = difference(lambda a: ((a - wide_t) ** 2).sum(), wide_p) / p.size * self.scale
        rounding = 4 * float(np.finfo(self.dtype).eps)
        loss, dp = mse(p, t)
        same("the loss", loss, squares, rounding * squares)
        same("the gradient", dp, slope, rounding * abs(slope))
        assert (loss.dtype, dp.dtype) == (self.dtype, self.dtype)


@dataclass(frozen=True, kw_only=True)
class CrossEntropyProblem(Problem):
    """Cross-entropy, with rows that do not count, some or all, and logits beyond what exp can take."""

    rows: tuple[int, ...] = of(*SOME_ROWS)
    classes: int = of(1, 2, 3, 4)
    counted: str = of("all", "some", "none")
    scale: float = of(1.0, SMALLEST, 1024.0)
    ids: str = of("int64", "int32")
    in_place: bool = of(False, True)

    def holds(self) -> None:
        """Require the mean over the rows that count, and its slope; in other rows, zero."""
        logits = self.laid(self.scale * self.gaussian("logits", *self.rows, self.classes))
        targets = self.rng("targets").integers(0, self.classes, self.rows).astype(self.ids)
        ignored = {"all": 1.0, "some": 0.5, "none": 0.0}[self.counted] <= self.rng("counted").random(self.rows)
        targets = np.where(ignored, targets.dtype.type(-100), targets)
        M = max(1, int((~ignored).sum()))

        def written_out(z: np.ndarray) -> Any:
            total = 0.0
            for row in np.ndindex(self.rows):
                if not ignored[row]:
                    away = z[row] - z[row][targets[row]]
                    top = away.real.max()
                    total += top + np.log(np.exp(away - top).sum())
            return total / M

        wide = logits.astype("float64")
        value, slope = np.float64(written_out(wide)), complex_step(written_out, wide)
        share = {"float64": 1e-12, "float32": 1e-5}[self.dtype]
        if self.in_place:
            logits = logits.copy(order="K")
        loss, dz = cross_entropy(logits, targets, out=logits if self.in_place else None)
        same("the loss", loss, value, share * max(1.0, value))
        same("the gradient", dz, slope, share / M)
        assert (loss.dtype, dz.dtype) == (self.dtype, self.dtype)
        assert not dz[ignored].any()


@dataclass(frozen=True, kw_only=True)
class AdamProblem(Problem):
    """A few steps of Adam for two arrays, one of which may have gradients of zero, at the start or always."""

    shape: tuple[int, ...] = of(*SHAPES)
    steps: int = of(1, 2, 3, 5)
    lr: float = of(0.5, 1e-3)
    betas: tuple[float, float] = of((0.9, 0.999), (0.0, 0.0), (0.5, 0.25), (0.0, 0.99), (0.99, 0.0))
    eps: float = of(1e-8, 1.0)
    weight_decay: float = of(0.0, 0.1)
    max_grad_norm: float | None = of(None, 1e-3, 1.0, 1e3)
    zero: str = of("", "first", "later", "always")  # the steps in which the second array's gradient is zero

    def gradients(self, step: int) -> Arrays:
        still = {"": False, "first": step == 1, "later": step > 1, "always": True}[self.zero]
        sizes = {"a": self.scale, "b": 0.0 if still else self.scale}
        return {name: self.laid(size * self.gaussian(f"{name}{step}", *self.shape)) for name, size in sizes.items()}

    def holds(self) -> None:
        """Require the parameters that Algorithm 1 gives in float64, and of each gradient that it stays as it is."""
        start = {name: self.laid(self.gaussian(name, *self.shape)) for name in "ab"}
        params = {name: ORDERS[self.order](p) for name, p in start.items()}
        options = {"weight_decay": self.weight_decay, "max_grad_norm": self.max_grad_norm}
        optimizer = Adam(params, self.lr, self.betas, self.eps, **options)
        theta = {name: p.astype("float64") for name, p in start.items()}
        # Beside m and v, the mean of |g|, which is what m may be off by, and how far that may move theta.
        m, v, most, way = ({name: np.zeros(self.shape) for name in "ab"} for _ in range(4))
        beta1, beta2 = self.betas
        for t in range(1, self.steps + 1):
            given = self.gradients(t)
            optimizer.step(given)
            wide = {name: g.astype("float64") for name, g in given.items()}
            length = np.sqrt(sum((g**2).sum() for g in wide.values()))
            shorter = 1.0 if self.max_grad_norm is None else min(1.0, self.max_grad_norm / length)
            for name, whole in wide.items():
                g = shorter * whole
                m[name] = beta1 * m[name] + (1 - beta1) * g
                v[name] = beta2 * v[name] + (1 - beta2) * g**2
                most[name] = beta1 * most[name] + (1 - beta1) * abs(g)
                theta[name] *= 1 - self.lr * self.weight_decay
                root = np.sqrt(v[name] / (1 - beta2**t)) + self.eps
                theta[name] -= self.lr * m[name] / (1 - beta1**t) / root
                way[name] += self.lr * most[name] / (1 - beta1**t) / root
        assert optimizer.t == self.steps
        for name, p in params.items():
            allowed = 200 * float(np.finfo(self.dtype).eps) * (way[name] + abs(start[name]) + abs(theta[name]))
            same(f"{name} after step {self.steps}", p, theta[name], allowed)
            assert p.dtype == self.dtype


FAMILIES: dict[str, type[Problem]] = {
    "linear": LinearProblem,
    "LoRA": LoRAProblem,
    "LoRALinear": LoRALinearProblem,
    "DoRA": DoRAProblem,
    "embedding": EmbeddingProblem,
    "convolution": ConvolutionProblem,
    "attention": AttentionProblem,
    "mean squared error": MSEProblem,
    "cross-entropy": CrossEntropyProblem,
    "Adam": AdamProblem,
}
