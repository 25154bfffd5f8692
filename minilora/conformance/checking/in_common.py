"""When something is wrong: the property that all problems have on which it is, and no other problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..problems.images import ConvolutionProblem
from ..problems.kinds import KINDS
from ..problems.lowprecision import MixedProblem
from ..problems.problem import Problem
from ..problems.several import CombineProblem, ExpertsProblem, FusedProblem

Properties = Mapping[str, Callable[[Any], bool]]


def in_common(failed: Sequence[Problem], every: Sequence[Problem]) -> str:
    """Say when it is wrong, where one property of the problems decides that."""
    for words, has in _properties(failed[0]).items():
        if len(failed) < len(every) and [p for p in every if has(p)] == list(failed):
            return f", {words},"
    return ""


def _properties(problem: Problem) -> Properties:
    """Return what problems of a kind may have, in the order in which it is told."""
    if isinstance(problem, FusedProblem):  # whose slots have ranks and alphas of their own
        return OF_SLOTS
    if isinstance(problem, CombineProblem):
        return OF_SUMS
    if isinstance(problem, ExpertsProblem):
        return {**OF_EXPERTS, **PROPERTIES}
    if isinstance(problem, ConvolutionProblem):
        return {**OF_IMAGES, **PROPERTIES}
    return {**(OF_MIXED if isinstance(problem, MixedProblem) else OF_LAYERS), **PROPERTIES}


PROPERTIES: Properties = {
    "wherever there is a bias": lambda p: p.bias,
    "wherever there is no bias": lambda p: not p.bias,
    "at rank 1": lambda p: p.rank == 1,
    "at a single row": lambda p: p.n == 1,
    "for more than one row": lambda p: p.n > 1,
    "where alpha is below the rank": lambda p: p.alpha < p.rank,
    "where alpha is above the rank": lambda p: p.alpha > p.rank,
    "where alpha / r is no whole number": lambda p: p.alpha % p.rank != 0,
    "where lora_B is zero": lambda p: p.start,
}
"""What a problem may have, in the order in which it is told."""


def _met(part: Callable[[Problem], Any]) -> Callable[[Any], bool]:
    """Return whether an earlier problem has the same part."""
    problems = KINDS["linear"].problems
    parts = [part(problem) for problem in problems]
    again = {problem for i, problem in enumerate(problems) if parts[i] in parts[:i]}
    return lambda problem: problem in again


OF_LAYERS: Properties = {
    "with the sizes of an earlier problem (is something kept between calls?)": lambda p: (p.seed, p.alpha) == (7, 4.5),
    "with lora_A's shape of an earlier problem (is something kept between calls?)": _met(
        lambda p: (p.rank, p.in_features)
    ),
    "with lora_B's shape of an earlier problem (is something kept between calls?)": _met(
        lambda p: (p.out_features, p.rank)
    ),
    "with the weight's shape of an earlier problem (is something kept between calls?)": _met(
        lambda p: (p.out_features, p.in_features)
    ),
    "where in = out": lambda p: p.in_features == p.out_features,
    "where in and out differ": lambda p: p.in_features != p.out_features,
    "where in is below out": lambda p: p.in_features < p.out_features,
    "where in is above out": lambda p: p.in_features > p.out_features,
    "at ranks above 32": lambda p: p.rank > 32,
    "at a rank that is a multiple of 32": lambda p: p.rank % 32 == 0,
    "for more than 128 rows": lambda p: p.n > 128,
    "for more than 128 outputs": lambda p: p.out_features > 128,
    "where the rank is above a width": lambda p: p.rank > min(p.in_features, p.out_features),
    "in wide layers": lambda p: p.in_features > 100,
    "in layers that are not wide": lambda p: p.in_features <= 100,
}
OF_MIXED: Properties = {"where the update cancels the base's output": lambda p: p.near}
OF_SLOTS: Properties = {
    "where a slot has no adapter": lambda p: 0 in p.ranks,
    "where every slot has an adapter": lambda p: 0 not in p.ranks,
    "where slots differ in width": lambda p: len(set(p.widths)) > 1,
    "of three slots": lambda p: len(p.widths) == 3,
    "of two slots": lambda p: len(p.widths) == 2,
    "where slots differ in rank": lambda p: len(set(p.ranks) - {0}) > 1,
    **{words: PROPERTIES[words] for words in ("wherever there is a bias", "wherever there is no bias")},
    **{words: PROPERTIES[words] for words in ("at a single row", "where lora_B is zero")},
}
OF_EXPERTS: Properties = {
    "where an expert has no row": lambda p: len(set(p.expert_ids)) < p.experts,
    "where every expert has a row": lambda p: len(set(p.expert_ids)) == p.experts,
    "where there is one expert": lambda p: p.experts == 1,
    "where there is more than one expert": lambda p: p.experts > 1,
    "where in = out": lambda p: p.in_features == p.out_features,
    "where out = 2 in": lambda p: p.out_features == 2 * p.in_features,
    "where the rank and the number of experts are above 1": lambda p: p.rank > 1 and p.experts > 1,
}
OF_SUMS: Properties = {
    "where a weight is below zero": lambda p: min(p.weights) < 0,
    "where every adapter has rsLoRA's scaling": lambda p: all(p.stabilised),
    "where an adapter has rsLoRA's scaling": lambda p: any(p.stabilised),
    "where no adapter has rsLoRA's scaling": lambda p: not any(p.stabilised),
    "where some adapters have rsLoRA's scaling and others not": lambda p: len(set(p.stabilised)) > 1,
    "where ranks differ": lambda p: len(set(p.ranks)) > 1,
    "of more than two adapters": lambda p: len(p.ranks) > 2,
    "of one adapter": lambda p: len(p.ranks) == 1,
    "of more than one adapter": lambda p: len(p.ranks) > 1,
    "where the rank is below the sum's": lambda p: p.rank < sum(p.ranks),
    "where in = out": lambda p: p.in_features == p.out_features,
}
OF_IMAGES: Properties = {
    "where the kernel has more than one entry": lambda p: max(p.kernel) > 1,
    "at a stride above 1": lambda p: max(p.stride) > 1,
    "with padding": lambda p: max(p.padding) > 0,
    "with dilation": lambda p: max(p.dilation) > 1,
    "with groups": lambda p: p.groups > 1,
    "where it is depthwise": lambda p: p.groups == p.in_features > 1,
}
