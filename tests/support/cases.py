"""The layers and models under test, each with a second way to compute its forward: `CASES` has all of them.

A new layer is one more row there: ``case_of("Scale", scale_by_loops)``, where "Scale" is its row in
`minilora.verify.instances`. A case may also be made from a class, not from the library's own layer alone: `mutants.py`
hands in broken ones, and the claims that hold for ours must fail for those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from minilora import (
    MLP,
    NF4,
    Adapter,
    Conv1d,
    Conv2d,
    DoRA,
    DoRAAdapter,
    Embedding,
    Layer,
    Linear,
    LoRA,
    LoRALinear,
    QuantizedLinear,
    Tanh,
    attach,
)
from minilora.conformance.problems import Problem
from minilora.layers.activation import ACTIVATIONS
from minilora.layers.nf4 import scale_book
from minilora.variants.adapter import AdaptedRows
from minilora.variants.dropout import DroppingLoRALinear

from .claims import (
    CLAIMS,
    LINEAR_CLAIMS,
    ROW_CLAIMS,
    Arrays,
    Case,
    a_step_of_one_measures_the_slope_exactly,
    backward_is_the_slope_of_forward,
)
from .expert_cases import EXPERT_CASES
from .language_cases import LANGUAGE_CASES
from .loops import FUNCTIONS, Beside, case_of, child, each, linear_by_loops, named

LAYER_CLAIMS = CLAIMS + ROW_CLAIMS + LINEAR_CLAIMS
HIDDEN = 4


def lora_by_loops(p: Arrays, x: np.ndarray, alpha: float) -> np.ndarray:
    A, B = p["lora_A"], p["lora_B"]
    y = np.zeros((len(x), len(B)), x.dtype)
    for n, o in np.ndindex(y.shape):
        for k in range(len(A)):
            for i in range(x.shape[1]):
                y[n, o] += alpha / len(A) * x[n, i] * A[k, i] * B[o, k]
    return y


def linear_case(cls: type = Linear) -> Case:
    return Case(
        "Linear",
        lambda c: c.full,
        lambda c, p: cls(p["weight"], p.get("bias")),
        lambda c, p, x: linear_by_loops(p, x),
        claims=LAYER_CLAIMS,
    )


def lora_case() -> Case:
    return Case(
        "LoRA",
        lambda c: c.factors,
        lambda c, p: LoRA(p["lora_A"], p["lora_B"], c.alpha),
        lambda c, p, x: lora_by_loops(p, x, c.alpha),
        claims=LAYER_CLAIMS,
    )


def lora_linear_case(cls: type = LoRALinear) -> Case:
    def build(problem: Problem, p: Arrays) -> LoRALinear:
        frozen = {name: array.astype(p["lora_A"].real.dtype) for name, array in problem.full.items()}
        return cls(Linear(**frozen), LoRA(p["lora_A"], p["lora_B"], problem.alpha))

    def loops(problem: Problem, p: Arrays, x: np.ndarray) -> np.ndarray:
        return linear_by_loops(problem.full, x) + lora_by_loops(p, x, problem.alpha)

    return Case("LoRALinear", lambda c: c.factors, build, loops, claims=LAYER_CLAIMS)


def dropping_by_loops(layer: DroppingLoRALinear, p: Arrays, x: np.ndarray) -> np.ndarray:
    """Each row of x is a sequence of its own; what it draws does not depend on the other rows."""
    dropped = np.zeros_like(x)
    for row in range(len(x)):
        bits = np.random.Philox(key=np.array([layer.keys[row], layer.number], np.uint64))
        for i, drawn in enumerate(np.random.Generator(bits).random(x.shape[1], np.float32)):
            dropped[row, i] = 0 if drawn < layer.dropout else x[row, i] / (1 - layer.dropout)
    base = {"weight": layer.base.weight, "bias": layer.base.bias}
    return linear_by_loops(base, x) + lora_by_loops(p, dropped, layer.adapter.alpha)


def dropping_case() -> Case:
    """Of a small batch, all may be dropped: then the factors do not act on the output, and their gradients are zero."""
    claims = (*CLAIMS, a_step_of_one_measures_the_slope_exactly)
    return replace(case_of("LoRALinear, dropout", dropping_by_loops, claims), may_be_zero=("lora_A", "lora_B"))


def weight_by_loops(layer: QuantizedLinear) -> np.ndarray:
    """Return the weight of a layer in NF4, one number after another, from its bytes."""
    scales = [float(a) for a in layer.absmax]
    if layer.nested_absmax is not None:
        book, scales = scale_book(), []
        for b, t in enumerate(layer.absmax):
            scales.append(np.float32(np.float32(layer.nested_absmax[b // 256] * book[t]) + np.float32(layer.mean)))
    codes = [half for byte in layer.packed.tolist() for half in divmod(byte, 16)]
    W = np.zeros(math.prod(layer.shape), np.float32)
    for j in range(len(W)):
        W[j] = np.float32(scales[j // layer.block_size]) * NF4[codes[j]]
    return W.reshape(layer.shape)


def quantized_case(*, adapted: bool, double_quant: bool) -> Case:
    """A frozen layer in NF4, alone or with LoRA: it is the layer of the weight that its bytes stand for."""

    def base(problem: Problem, dtype: np.dtype) -> QuantizedLinear:
        full = problem.full
        layer = QuantizedLinear.from_linear(Linear(full["weight"]), block_size=32, double_quant=double_quant)
        names = ("packed", "absmax", "shape", "block_size", "nested_absmax", "mean")
        parts = {name: vars(layer)[name] for name in names}
        return QuantizedLinear(**parts, bias=full["bias"].astype(dtype) if problem.bias else None, dtype=dtype)

    def build(problem: Problem, p: Arrays) -> Layer:
        layer = base(problem, p["x"].real.dtype)
        return LoRALinear(layer, LoRA(p["lora_A"], p["lora_B"], problem.alpha)) if adapted else layer

    def loops(problem: Problem, p: Arrays, x: np.ndarray) -> np.ndarray:
        weight = weight_by_loops(base(problem, np.dtype("float64"))).astype("float64")
        y = linear_by_loops(problem.full | {"weight": weight}, x)
        return y + lora_by_loops(p, x, problem.alpha) if adapted else y

    claims = (*CLAIMS, *ROW_CLAIMS, a_step_of_one_measures_the_slope_exactly)
    name = f"QuantizedLinear, scales of {8 if double_quant else 32} bits{', LoRA' if adapted else ''}"
    return Case(name, lambda c: c.factors if adapted else {}, build, loops, claims=claims)


def away_from_zero(problem: Problem) -> np.ndarray:
    """The kink of ReLU is at 0, and a central difference across it measures no slope; some entry must be above."""
    x = problem.x + np.sign(problem.x)
    x[0, 0] = abs(x[0, 0])
    return x


def activation_case(name: str, cls: type) -> Case:
    return case_of(cls.__name__, lambda layer, p, x: FUNCTIONS[name](x), x=away_from_zero)


def mlp_arrays(problem: Problem) -> Arrays:
    """Of a size that leaves tanh its slope: where it is flat, nothing can be measured."""
    fc1 = {"weight": problem.randn("w1", HIDDEN, problem.in_features) / 4, "bias": problem.randn("b1", HIDDEN) / 4}
    fc2 = {
        "weight": problem.randn("w2", problem.out_features, HIDDEN),
        "bias": problem.randn("b2", problem.out_features),
    }
    return named("fc1", fc1) | named("fc2", fc2)


def mlp_by_loops(problem: Problem, p: Arrays, x: np.ndarray) -> np.ndarray:
    h = linear_by_loops(child("fc1", p), x)
    return linear_by_loops(child("fc2", p), each(math.tanh)(h))


def build_mlp(p: Arrays) -> MLP:
    return MLP(fc1=Linear(**child("fc1", p)), act=Tanh(), fc2=Linear(**child("fc2", p)))


def mlp_case() -> Case:
    return Case("MLP", mlp_arrays, lambda c, p: build_mlp(p), mlp_by_loops, claims=CLAIMS + ROW_CLAIMS)


def adapted_mlp_case(*targets: str) -> Case:
    """An MLP with LoRA beside the layers named, and what it should give: the merged weights in loops."""

    def arrays(problem: Problem) -> Arrays:
        found = {}
        for path in targets:
            weight = mlp_arrays(problem)[f"{path}.weight"]
            found |= {
                f"{path}.lora_A": problem.randn(f"{path} A", problem.rank, weight.shape[1]),
                f"{path}.lora_B": problem.randn(f"{path} B", weight.shape[0], problem.rank) / 4,
            }
        return found

    def build(problem: Problem, p: Arrays) -> MLP:
        dtype = p[f"{targets[0]}.lora_A"].real.dtype
        base = build_mlp({name: array.astype(dtype) for name, array in mlp_arrays(problem).items()})
        return attach(base, {path: LoRA(**child(path, p), alpha=problem.alpha / 8) for path in targets})

    def loops(problem: Problem, p: Arrays, x: np.ndarray) -> np.ndarray:
        merged = mlp_arrays(problem)
        for path in targets:
            A, B = p[f"{path}.lora_A"], p[f"{path}.lora_B"]
            merged[f"{path}.weight"] = merged[f"{path}.weight"] + problem.alpha / 8 / len(A) * (B @ A)
        return mlp_by_loops(problem, merged, x)

    return Case(f"MLP with LoRA on {', '.join(targets)}", arrays, build, loops, claims=CLAIMS + ROW_CLAIMS)


PRODUCTS = (linear_case(), lora_case(), lora_linear_case())
"""The layers of one product, which every test of training and devices takes."""
QUANTIZED_CASES = (
    quantized_case(adapted=False, double_quant=False),
    quantized_case(adapted=False, double_quant=True),
    quantized_case(adapted=True, double_quant=True),
)
ACTIVATION_CASES = tuple(activation_case(name, cls) for name, cls in ACTIVATIONS.items() if name in FUNCTIONS)
MODEL_CASES = (mlp_case(), adapted_mlp_case("fc1"), adapted_mlp_case("fc2"), adapted_mlp_case("fc1", "fc2"))


# --- embeddings, convolutions, and adapters of them -----------------------------------------------


def ids_of(problem: Problem) -> np.ndarray:
    """One id more than rows would need, so that some id comes twice wherever there is more than one row."""
    ids = np.random.default_rng([problem.seed, 1]).integers(0, problem.in_features, problem.n)
    ids[-1] = ids[0]
    return ids


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its input, drawn from the problem's seed."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    @cache
    def of(cls, seed: int, axes: int) -> Geometry:
        rng = np.random.default_rng([seed, axes])
        ends = {"kernel": (1, 4 - axes // 2), "stride": (1, 4), "padding": (0, 3), "dilation": (1, 3), "sizes": (0, 3)}
        drawn = {name: rng.integers(*range_, axes) for name, range_ in ends.items()}
        reach = drawn["dilation"] * (drawn["kernel"] - 1)
        # The kernel's last entry at the first place lies on the image, and so x has a slope.
        drawn |= {"padding": np.minimum(drawn["padding"], reach), "sizes": drawn["sizes"] + reach + 1}
        return cls(**{name: tuple(map(int, values)) for name, values in drawn.items()})

    @property
    def steps(self) -> dict[str, tuple[int, ...]]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}


def conv_by_loops(weight: np.ndarray, bias: np.ndarray | None, x: np.ndarray, g: Geometry) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (0, 0), *((p, p) for p in g.padding)))
    ends = zip(padded.shape[2:], g.kernel, g.stride, g.dilation, strict=True)
    y = np.zeros((len(x), len(weight), *(len(range(0, n - d * (k - 1), s)) for n, k, s, d in ends)), x.dtype)
    for position in np.ndindex(*y.shape[2:]):
        for offset in np.ndindex(*g.kernel):
            at = tuple(s * p + d * k for s, p, d, k in zip(g.stride, position, g.dilation, offset, strict=True))
            y[(..., *position)] += padded[(..., *at)] @ weight[(..., *offset)].T
    return y if bias is None else y + bias.reshape(-1, *(1 for _ in g.kernel))


@dataclass(frozen=True)
class Kind:
    """A kind of layer: its sizes, how it is built from its matrix (out, in), and its forward in loops."""

    name: str
    axes: int = 0

    def small(self, p: Problem) -> Problem:
        """Images have many entries, and each is moved for its slope: few channels will do."""
        few = {"n": 2, "in_features": 2, "out_features": 3, "rank": 4}
        return replace(p, **{name: min(getattr(p, name), most) for name, most in few.items()}) if self.axes else p

    def width(self, p: Problem) -> int:
        return p.in_features * math.prod(Geometry.of(p.seed, self.axes).kernel if self.axes else ())

    def matrix(self, p: Problem) -> np.ndarray:
        """No entry near 0, so that no row that DoRA divides by its length is short."""
        W = p.randn("weight", p.out_features, self.width(p))
        return W + np.sign(W)

    def bias(self, p: Problem) -> np.ndarray | None:
        return p.randn("bias", p.out_features) if p.bias and self.name != "embedding" else None

    def shape(self, p: Problem) -> tuple[int, ...]:
        return (p.out_features, p.in_features, *Geometry.of(p.seed, self.axes).kernel)

    def input(self, p: Problem) -> np.ndarray:
        p = self.small(p)
        if self.axes:
            return p.randn("x", p.n, p.in_features, *Geometry.of(p.seed, self.axes).sizes)
        return p.randn("x", p.n, p.out_features) if self.name == "embedding" else p.x

    def build(self, p: Problem, matrix: np.ndarray, bias: np.ndarray | None) -> Layer:
        if self.name == "linear":
            return Linear(matrix, bias)
        if self.name == "embedding":
            return Embedding(matrix.T)
        cls = {1: Conv1d, 2: Conv2d}[self.axes]
        return cls(matrix.reshape(self.shape(p)), bias, **Geometry.of(p.seed, self.axes).steps)

    def by_loops(self, p: Problem, matrix: np.ndarray, bias: np.ndarray | None, x: np.ndarray) -> np.ndarray:
        if self.axes:
            return conv_by_loops(matrix.reshape(self.shape(p)), bias, x, Geometry.of(p.seed, self.axes))
        if self.name == "embedding":
            return x + np.stack([matrix[:, i] for i in ids_of(p)])
        return linear_by_loops({"weight": matrix} | ({} if bias is None else {"bias": bias}), x)

    def on_ids(self, p: Problem, layer: Layer) -> Layer:
        return Beside(layer, ids_of(p)) if self.name == "embedding" else layer


KINDS = {kind.name: kind for kind in (Kind("linear"), Kind("embedding"), Kind("conv1d", 1), Kind("conv2d", 2))}

# What grows with every entry of an image is no longer exact in float16.
BILINEAR = (*CLAIMS, a_step_of_one_measures_the_slope_exactly)
SLOPE = (backward_is_the_slope_of_forward,)
ALL_BUT_SLOPE = tuple(claim for claim in CLAIMS if claim not in SLOPE)


def plain_case(kind: Kind) -> Case:
    """A layer whose weight trains."""

    def arrays(problem: Problem) -> Arrays:
        p = kind.small(problem)
        weight, bias = kind.matrix(p), kind.bias(p)
        weight = weight.T.copy() if kind.name == "embedding" else weight.reshape(kind.shape(p))
        return {"weight": weight} | ({} if bias is None else {"bias": bias})

    def matrix(p: Problem, arrays: Arrays) -> np.ndarray:
        return arrays["weight"].T if kind.name == "embedding" else arrays["weight"].reshape(p.out_features, -1)

    def build(problem: Problem, arrays: Arrays) -> Layer:
        p = kind.small(problem)
        return kind.on_ids(p, kind.build(p, matrix(p, arrays), arrays.get("bias")))

    def loops(problem: Problem, arrays: Arrays, x: np.ndarray) -> np.ndarray:
        p = kind.small(problem)
        return kind.by_loops(p, matrix(p, arrays), arrays.get("bias"), x)

    claims = BILINEAR if kind.axes else CLAIMS + LINEAR_CLAIMS
    return Case(kind.name, arrays, build, loops, kind.input, claims)


def adapted_case(kind: Kind, norm: str | None = None, *, held: bool = False) -> Case:
    """A frozen layer with LoRA or, where there is a norm, DoRA. Held, DoRA's norm is the constant that it is taken for.

    The factors are small beside the weight, so that no row of V = W + s B A is short. Nor does a row have one entry
    alone: divided by its own length, that would be 1 or -1, without a slope.
    """

    def small(problem: Problem) -> Problem:
        p = kind.small(problem)
        return replace(p, in_features=p.in_features + 1) if norm and p.in_features == 1 else p

    class OnRows(AdaptedRows):
        """With a DoRA of one's own."""

        def on_rows(self):
            layer = super().on_rows()
            return getattr(self, "dora", DoRA)(layer.base, layer.adapter)

    def arrays(problem: Problem) -> Arrays:
        p = small(problem)
        # Each has its part in this. A step of B alone moves V by s A, and too far where A is long: the norm bends.
        size = 1 if norm is None else 2 * math.sqrt(p.alpha)
        factors = {
            "lora_A": p.randn("lora_A", p.rank, kind.width(p)) / size,
            "lora_B": p.randn("lora_B", p.out_features, p.rank) / size,
        }
        return factors if norm is None else factors | {"magnitude": 1 + abs(p.randn("magnitude", p.out_features))}

    def direction(p: Problem, arrays: Arrays) -> np.ndarray:
        V = kind.matrix(p)
        for k in range(p.rank):
            V = V + p.alpha / p.rank * np.outer(arrays["lora_B"][:, k], arrays["lora_A"][k])
        return V

    def build(problem: Problem, found: Arrays) -> Layer:
        p, dtype = small(problem), found["lora_A"].real.dtype
        bias = kind.bias(p)
        layer = kind.build(p, kind.matrix(p).astype(dtype), None if bias is None else bias.astype(dtype))
        mine = {name: array for name, array in found.items() if name != "x"}
        of_dora = {} if norm is None else {"dora_norm": norm}
        adapter = (DoRAAdapter if of_dora else Adapter)(**mine, alpha=p.alpha, kind=kind.name, **of_dora)
        on_rows = DoRA
        if held:
            n = np.linalg.norm(direction(p, arrays(problem)), axis=1).astype(dtype)
            on_rows = type("Held", (DoRA,), {"norm": lambda self: n})
        if kind.name == "linear":
            return LoRALinear(layer, adapter) if norm is None else on_rows(layer, adapter)
        if norm is not None:
            layer = OnRows(layer, adapter)
            layer.dora = on_rows
            return kind.on_ids(p, layer)
        return kind.on_ids(p, AdaptedRows(layer, adapter))

    def loops(problem: Problem, found: Arrays, x: np.ndarray) -> np.ndarray:
        p = small(problem)
        V = direction(p, found)
        if norm is not None:
            V = V * (found["magnitude"] / np.sqrt([sum(v * v for v in row) for row in V]))[:, None]
        return kind.by_loops(p, V, kind.bias(p), x)

    if norm is None:
        claims = BILINEAR if kind.axes else CLAIMS + LINEAR_CLAIMS
        return Case(f"{kind.name} with LoRA", arrays, build, loops, lambda c: kind.input(small(c)), claims)
    claims = SLOPE if held else ALL_BUT_SLOPE if norm == "constant" else CLAIMS
    name = f"{kind.name} with DoRA, norm {'held' if held else norm}"
    return Case(name, arrays, build, loops, lambda c: kind.input(small(c)), claims)


def flatten_case() -> Case:
    return case_of("Flatten", lambda layer, p, x: np.stack([image.ravel() for image in x]))


REWRITTEN = tuple(kind for kind in KINDS.values() if kind.name != "linear")
REWRITTEN_CASES = (*map(plain_case, REWRITTEN), *map(adapted_case, REWRITTEN))
DORA_CASES = tuple(
    adapted_case(kind, norm, held=held)
    for norm, held in (("full", False), ("constant", False), ("constant", True))
    for kind in KINDS.values()
    if kind.name != "conv1d"
)
"""The full gradient is the slope of the forward; the constant norm's is that of a forward whose norm is held."""

CASES = (
    *PRODUCTS,
    dropping_case(),
    *QUANTIZED_CASES,
    *ACTIVATION_CASES,
    *MODEL_CASES,
    flatten_case(),
    *REWRITTEN_CASES,
    *DORA_CASES,
    *LANGUAGE_CASES,
    *EXPERT_CASES,
)
