"""Apply an adapter's files to a base's weights, by formulas whose parts can be replaced.

    delta = s B A                                  a linear layer's W (out, in); an embedding's W (V, dim) gets A^T B^T
    s = alpha / r, or alpha / sqrt(r)              use_rslora; r and alpha by rank_pattern and alpha_pattern
    W' = W + sum_i w_i delta_i                     several adapters with weights w
    W' = (m / |V|) V,  V = W + delta               use_dora; |V| is the length of each row
    b' = s b                                       lora_bias
    W' = the weight in the file                    modules_to_save
    b' = the bias in the file                      bias="lora_only", for a module with an adapter
    W'[t] = the row in the file                    trainable_token_indices, for each such token t

The factors of E experts are packed into one pair, (E r, in) and (out, r E), where r is one expert's rank:

    W_e' = W_e + s B_e A_e               each expert e; a matrix is a stack of one
    A_e = r rows of A                    the expert as the slow index
    B_e = r columns of B                 the expert as the fast index, or as the slow one if `lora_B_layout` says so
    W_e' = W_e + s (B_e A_e)^T           from PEFT up to 0.19.0, whose A is (E r, out), and B (in, r E)

Old names, such as ``block_sparse_moe.experts.3.w1``, mean some rows of one expert's matrix.

A reader's bug is these formulas with some parts replaced: see `minilora.conformance.golden.misreadings`. The layout of
experts' factors uses the suite's own formulas, so the rows of its table about that layout are readers' bugs too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...files.expert_adapters import B_LAYOUTS, EXCHANGED_UNTIL, version_of
from ...files.experts import EXPERT_PARTS, MIXTRAL, MIXTRAL_MLP
from ...language.config import MixtureConfig
from ..problems.several import ExpertFormulas
from .bases import EMBEDDING_TENSOR, HEAD_TENSOR, SHARED_EXPERT
from .exact import product, sums

NamedArrays = dict[str, np.ndarray]
ConfigJson = Mapping[str, Any]


@dataclass(frozen=True)
class AdapterModule:
    """An adapter's arrays for one module, in float64."""

    lora_A: np.ndarray  # (r, in)
    lora_B: np.ndarray  # (out, r)
    bias: np.ndarray | None = None  # (out,), with lora_bias
    magnitude: np.ndarray | None = None  # (out,), with DoRA
    trained_bias: np.ndarray | None = None  # (out,), the base's own bias after training, with bias="lora_only"


@dataclass(frozen=True, eq=False)  # compared by identity, so that results for an adapter can be cached
class AdapterData:
    """The contents of an adapter's two files: adapter_config.json, and the arrays by module path."""

    config: ConfigJson
    modules: Mapping[str, AdapterModule]
    starts: Mapping[str, np.ndarray] = field(default_factory=dict)
    """For PiSSA's own files, the product B A before training, (out, in), which is not in the files."""
    saved: Mapping[str, np.ndarray] = field(default_factory=dict)
    """The weights of modules that were trained in full, by module path."""
    tokens: Mapping[str, tuple[Sequence[int], np.ndarray]] = field(default_factory=dict)
    """The token ids and the rows of embeddings with trained rows, by module path."""
    stored: str = ""  # the type of the factors in the file, if it is not float32


PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}


def matching_values(config: ConfigJson, key: str, path: str) -> list[Any]:
    """Return the values of all patterns that match a module's path by PEFT's rule, in their order."""
    patterns = config.get(PATTERNS[key], {})
    return [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)]


def setting(config: ConfigJson, key: str, path: str) -> Any:
    """Return r or lora_alpha for a module: the value of the first pattern that matches, or else the general one."""
    return next(iter(matching_values(config, key, path)), config[key])


def scaled(config: ConfigJson, alpha: float, rank: int) -> float:
    """Return alpha / r, or alpha / sqrt(r) with use_rslora."""
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def scale(config: ConfigJson, path: str) -> float:
    """Return the scaling of a module."""
    return scaled(config, setting(config, "lora_alpha", path), setting(config, "r", path))


def is_turned(config: ConfigJson) -> bool:
    """Return whether packed factors are for transposed weights, by PEFT's version."""
    version = version_of(config.get("peft_version"))
    return version is not None and version <= EXCHANGED_UNTIL


def target_array(path: str, place: str, arrays: NamedArrays) -> tuple[str, int | None, slice]:
    """Return the name of the array that a path's adapter changes, with the expert and rows if it changes only these.

    The array is that of `place` if it exists, and otherwise that of `path`.
    """
    for one in (place, path):
        name, expert, parts, part = _array_of(one, arrays)
        if name in arrays:
            break
    if expert is None:
        return name, None, slice(None)
    height, i = arrays[name].shape[1] // len(parts), parts.index(part)
    return name, expert, slice(i * height, (i + 1) * height)


def _array_of(path: str, arrays: NamedArrays) -> tuple[str, int | None, tuple[str, ...], str]:
    """Return the name of a path's array; for a path of one expert, also its number, the array's parts, and its part."""
    of_one = re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)", path)
    if of_one is None:
        return path if path in arrays else f"{path}.weight", None, (), ""
    block, expert, old = of_one.groups()
    part = {old_name: name for name, old_name in MIXTRAL.items()}.get(old, old)
    array, parts = next((array, parts) for array, parts in EXPERT_PARTS.items() if part in parts)
    return f"{block.replace(MIXTRAL_MLP, 'mlp')}.experts.{array}", int(expert), parts, part


def row_lengths(V: np.ndarray) -> np.ndarray:  # (out, in) -> (out, 1)
    """Return the length of each row."""
    return np.asarray(np.sqrt(sums(V * V)))


@dataclass(frozen=True)
class Reading:
    """The parts of the formulas. The defaults are right."""

    scale: Callable[[ConfigJson, str], float] = scale
    times: float = 1.0  # an additional factor of the update
    applied: Callable[[str], bool] = lambda path: True  # whether a module's adapter is applied
    place: Callable[[str], str] = lambda path: path  # the module that gets the adapter of a path
    factors: Callable[[str, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] = lambda path, A, B: (A, B)
    update: Callable[[str, np.ndarray], np.ndarray] = lambda path, BA: BA
    length: Callable[[np.ndarray, np.ndarray, float], np.ndarray] = lambda W, BA, s: row_lengths(W + s * BA)
    magnitude: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda m, W: m[:, None]
    gain: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda m, n: m / n
    bias: Callable[[np.ndarray, float], np.ndarray] = lambda b, s: s * b
    trained_bias: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda b, trained: trained
    saved: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda W, trained: trained  # modules_to_save
    tokens: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda rows, trained: trained
    read: Callable[[str, np.ndarray], np.ndarray] = lambda stored, x: x  # a factor read in its type
    previous: str = ""  # how the previous case's adapters remain: "instead", "beside", or "cached"
    weights: Callable[[Sequence[float]], Sequence[float]] = lambda weights: weights  # the weights of several adapters
    config_of: Callable[[int], int] = lambda i: i  # the adapter whose configuration is used for adapter i
    start: float = 1.0  # the share of PiSSA's start that is subtracted
    ties: bool = False  # whether the head is changed with a tied embedding, and vice versa
    base: str = ""  # how the base is misread, see `Base.misread` and `misdecoded`
    product: Callable[[np.ndarray, np.ndarray], np.ndarray] = product  # x W^T: bit-identical everywhere, or fast
    # packed experts; fields of `ExpertFormulas` keep their names
    rank: Callable[[ConfigJson, str], int] = lambda config, path: int(setting(config, "r", path))  # the rank of a slice
    gate_up: Callable[[np.ndarray], np.ndarray] = lambda BA: BA  # the update of an expert's gate_up_proj (2 m, d)
    layout: Callable[[ConfigJson], str | None] = lambda config: config.get("lora_B_layout")
    rows_of_A: Callable[[int, int], np.ndarray] = ExpertFormulas.rows_of_A
    columns_of_B: Callable[[int, int], np.ndarray] = ExpertFormulas.columns_of_B
    factors_of: Callable[[int, int], int] = ExpertFormulas.factors_of
    scaling_of: Callable[[float, int, int], float] = ExpertFormulas.scaling_of
    exchanged: bool = ExpertFormulas.exchanged
    # the mixture itself
    kept: Callable[[int], int] = lambda K: K  # the number of active experts per token
    renormalised: Callable[[bool], bool] = lambda renormalised: renormalised
    unweighted: bool = False  # whether active experts' updates are not scaled by the router's weights
    shared: bool = True  # whether the shared expert is used

    def decoding(self, mixture: MixtureConfig) -> tuple[MixtureConfig, bool]:
        """Return the mixture that a reader uses, and whether updates are not scaled by the router's weights."""
        kept, renormalised = self.kept(mixture.num_experts_per_tok), self.renormalised(mixture.norm_topk_prob)
        return replace(mixture, num_experts_per_tok=kept, norm_topk_prob=renormalised), self.unweighted

    def changed(
        self, arrays: NamedArrays, adapters: Sequence[tuple[AdapterData, float]],
        misread: Mapping[str, NamedArrays] | None = None, previous: Sequence[tuple[AdapterData, float]] = (),
    ) -> NamedArrays:  # fmt: skip
        """Return all arrays of the base that change, and new biases; `misread` is `Base.misread` or `misdecoded`.

        `previous` has the adapters of the previous case, which a faulty program may not remove.
        """
        if previous and self.previous in ("instead", "beside"):
            adapters = [*previous, *(adapters if self.previous == "beside" else ())]
        read = (misread or {}).get(self.base, arrays)
        after = {name: array for name, array in read.items() if array is not arrays[name]}
        weights = self.weights([weight for _, weight in adapters])
        for i, ((adapter, _), weight) in enumerate(zip(adapters, weights, strict=True)):
            config = adapters[self.config_of(i)][0].config
            for path in filter(self.applied, adapter.modules):
                self._add(after, read, config, adapter, path, weight)
            for path, trained in adapter.saved.items():
                after[f"{path}.weight"] = self.saved(read[f"{path}.weight"], trained)
            for path, (which, trained) in adapter.tokens.items():
                rows = after.get(f"{path}.weight", read[f"{path}.weight"]).copy()
                rows[which] = self.tokens(rows[which], trained)
                after[f"{path}.weight"] = rows
        if self.ties:
            for name, other in ((EMBEDDING_TENSOR, HEAD_TENSOR), (HEAD_TENSOR, EMBEDDING_TENSOR)):
                if name in after:
                    after.setdefault(other, after[name])
        down = f"{SHARED_EXPERT}.down_proj.weight"
        if not self.shared and down in read:
            after[down] = 0 * after.get(down, read[down])
        return after

    def _add(
        self, after: NamedArrays, read: NamedArrays, config: ConfigJson, adapter: AdapterData, path: str, weight: float
    ) -> None:
        """Add a module's update to the changed arrays. A matrix is treated as a stack of one."""
        module, start = adapter.modules[path], adapter.starts.get(path)
        A, B = (self.read(adapter.stored, factor) for factor in (module.lora_A, module.lora_B))
        name, expert, rows = target_array(path, self.place(path), read)
        W, s = after.get(name, read[name]), self.scale(config, path) * self.times
        stack = (W if W.ndim == 3 else W[None]).copy()
        count = len(stack) if expert is None else 1
        for e in range(count):
            pair = self._pair(config, path, A, B, e, count)
            if pair is None:
                continue
            BA = self.update(path, self.product(pair[1], pair[0].T))
            if count > 1 and is_turned(config) != (self.exchanged and BA.shape[0] == BA.shape[1]):
                BA = BA.T
            if path.endswith("gate_up_proj"):
                BA = self.gate_up(BA)
            if start is not None:
                BA = BA - self.start * start
            at = (e if expert is None else expert), rows
            old = stack[at].T if name == EMBEDDING_TENSOR else stack[at]
            new = self._updated(old, BA, self.scaling_of(s, e, count), weight, module.magnitude)
            stack[at] = new.T if name == EMBEDDING_TENSOR else new
        after[name] = stack.reshape(W.shape)
        bias = f"{name.removesuffix('.weight')}.bias"
        if module.bias is not None:
            after[bias] = self.bias(module.bias, s)
        if module.trained_bias is not None:
            after[bias] = self.trained_bias(read[bias], module.trained_bias)

    def _pair(
        self, config: ConfigJson, path: str, A: np.ndarray, B: np.ndarray, e: int, count: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the factors of expert e of `count`, or None if it gets no factors."""
        r, taken = len(A) if count == 1 else self.rank(config, path), self.factors_of(e, count)
        if taken >= count:
            return None
        slow = B_LAYOUTS.get(self.layout(config) or "", False)
        columns = np.arange(count * r).reshape(count, r) if slow else self.columns_of_B(count, r)
        return self.factors(path, A[self.rows_of_A(count, r)[taken]], B[:, columns[taken]])

    def _updated(self, W: np.ndarray, BA: np.ndarray, s: float, weight: float, m: np.ndarray | None) -> np.ndarray:
        """Return a matrix with its update added, rescaled if DoRA's magnitude `m` is given."""
        if m is None:
            return np.asarray(W + weight * s * BA)
        return self.gain(self.magnitude(m, W), self.length(W, BA, s)) * (W + s * BA)
