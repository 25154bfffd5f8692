"""What an adapter's files make of a mixture's weights: the right formulas, each part of which can be replaced.

    W_e' = W_e + s B_e A_e               each expert e; a linear layer, and a router, is a stack of one
    A_e = r rows of A (E r, in)          the expert as the slow index
    B_e = r columns of B (out, r E)      the expert as the fast one, or where `lora_B_layout` says so as the slow one
    W_e' = W_e + s (B_e A_e)^T           by a PEFT up to 0.19.0, whose A is (E r, out), and B (in, r E)
    s = alpha / r, or alpha / sqrt(r)    r that of one expert

Names of before, such as ``block_sparse_moe.experts.3.w1``, are of one expert, and a part of its rows.

A reader's bug is these formulas with some parts replaced. Where the factors of an expert lie is in the suite's own
record, so a row of its table about that is a reader's bug too, as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ....files.experts import B_LAYOUTS, EXCHANGED_UNTIL, MIXTRAL, MIXTRAL_MLP, PARTS, version_of
from ....language.config import MixtureConfig
from ...problems.formulas import ExpertFormulas
from ..exact import product
from ..formulas import Arrays, Config, Given, Module, scale, setting
from .bases import SHARED


@dataclass(frozen=True)
class MixtureFormulas:
    """The parts of the formulas; by default the right ones."""

    packing: ExpertFormulas = field(default_factory=ExpertFormulas)
    scale: Callable[[Config, str], float] = scale
    rank: Callable[[Config, str], int] = lambda config, path: int(setting(config, "r", path))  # that slices are of
    times: float = 1.0  # what the update is multiplied by besides
    applied: Callable[[str], bool] = lambda path: True  # whether a path's adapter is
    place: Callable[[str], str] = lambda path: path  # the path that gets the adapter of another
    factors: Callable[[str, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] = lambda path, A, B: (A, B)
    gate_up: Callable[[np.ndarray], np.ndarray] = lambda BA: BA  # the update of an expert's gate_up_proj (2 m, d)
    layout: Callable[[Config], str | None] = lambda config: config.get("lora_B_layout")
    kept: Callable[[int], int] = lambda K: K  # how many experts a token keeps
    renormalised: Callable[[bool], bool] = lambda renormalised: renormalised
    unweighted: bool = False  # whether the update of each kept expert counts whole, and not by its share
    shared: float = 1.0  # how much of the shared expert there is

    def with_parts(self, **parts: Any) -> MixtureFormulas:
        """Return the formulas with some parts replaced, also those of where factors lie."""
        own = {name: part for name, part in parts.items() if name in READ}
        rest = {name: part for name, part in parts.items() if name not in own}
        return replace(self, packing=replace(self.packing, **own), **rest)

    def decoding(self, mixture: MixtureConfig) -> tuple[MixtureConfig, bool]:
        """Return what a mixture is read as, and whether updates count whole."""
        kept, renormalised = self.kept(mixture.num_experts_per_tok), self.renormalised(mixture.norm_topk_prob)
        return replace(mixture, num_experts_per_tok=kept, norm_topk_prob=renormalised), self.unweighted

    def changed(self, arrays: Arrays, adapter: Given) -> Arrays:
        """Return all arrays of the base that are not as they were."""
        after: Arrays = {}
        for path, module in adapter.modules.items():
            if self.applied(path):
                name, expert, rows = site(path, self.place(path), arrays)
                W = after.get(name, arrays[name])
                stack = (W if W.ndim == 3 else W[None]).copy()
                count = len(stack) if expert is None else 1
                for e in range(count):
                    at = e if expert is None else expert, rows
                    stack[at] += self._of_expert(adapter.config, path, module, e, count)
                after[name] = stack.reshape(W.shape)
        name = f"{SHARED}.down_proj.weight"
        if self.shared != 1.0 and name in arrays:
            after[name] = self.shared * after.get(name, arrays[name])
        return after

    def _of_expert(self, config: Config, path: str, module: Module, e: int, count: int) -> np.ndarray | float:
        """Return the change of expert e's weight, of so many experts in these factors."""
        r, packing = self.rank(config, path), self.packing
        taken = packing.factors_of(e, count)
        if taken >= count:
            return 0.0
        rows = packing.rows_of_A(count, r)
        slow = B_LAYOUTS.get(self.layout(config) or "", False)
        columns = np.arange(count * r).reshape(count, r) if slow else packing.columns_of_B(count, r)
        A, B = self.factors(path, module.lora_A[rows[taken]], module.lora_B[:, columns[taken]])
        BA = product(B, A.T)
        if count > 1 and is_turned(config) != (packing.exchanged and BA.shape[0] == BA.shape[1]):
            BA = BA.T
        BA = self.gate_up(BA) if path.endswith("gate_up_proj") else BA
        return np.asarray(self.times * packing.scaling_of(self.scale(config, path), e, count) * BA)


READ = {"rows_of_A", "columns_of_B", "factors_of", "scaling_of", "exchanged"}
"""What of the suite's record about experts is about files."""


def is_turned(config: Config) -> bool:
    """Return whether the factors are those of transposed weights."""
    version = version_of(config.get("peft_version"))
    return version is not None and version <= EXCHANGED_UNTIL


def site(path: str, place: str, arrays: Mapping[str, np.ndarray]) -> tuple[str, int | None, slice]:
    """Return the array that a path's adapter changes: all of it, or some rows of one expert's.

    It goes to another place where there is such a one.
    """
    for one in (place, path):
        name, expert, parts, part = _array_of(one, arrays)
        if name in arrays:
            break
    if expert is None:
        return name, None, slice(None)
    height, i = arrays[name].shape[1] // len(parts), parts.index(part)
    return name, expert, slice(i * height, (i + 1) * height)


def _array_of(path: str, arrays: Mapping[str, np.ndarray]) -> tuple[str, int | None, tuple[str, ...], str]:
    """Return the array of a path; of one expert's its number, the parts of such a one, and which of them it is."""
    of_one = re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)", path)
    if of_one is None:
        return path if path in arrays else f"{path}.weight", None, (), ""
    block, expert, old = of_one.groups()
    part = {old_name: name for name, old_name in MIXTRAL.items()}.get(old, old)
    array, parts = next((array, parts) for array, parts in PARTS.items() if part in parts)
    return f"{block.replace(MIXTRAL_MLP, 'mlp')}.experts.{array}", int(expert), parts, part
