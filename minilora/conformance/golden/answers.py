"""The answers to a case: logits, next tokens, a merged weight, and the signatures of the bugs that show in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .cases import Case
from .exact import logits
from .formulas import Arrays, Formulas
from .misreadings import MISREADINGS

TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "float16": 0.06, "bfloat16": 0.3}
"""How far a logit may be off, by the precision that a program computes in."""
APART = 10 * TOLERANCE["bfloat16"]
"""How far a bug moves some logit at a prompt's end, and the least by which the likeliest next token leads."""
CACHED = next(bug.flag for bug in MISREADINGS if bug.parts.get("previous") == "cached")
SHOWN_ROWS, ROWS = 4, 1
"""How many rows of a merged weight stand in the answers, and in a signature."""


@dataclass(frozen=True)
class Answers:
    """Right numbers, and those of each bug that is told apart in a case, by its flag."""

    logits: np.ndarray  # (prompts, T, V)
    merged: tuple[str, np.ndarray] | None  # the name of a weight, and the weight with the adapters folded in
    signatures: dict[str, tuple[np.ndarray, np.ndarray]]  # logits at the prompts' ends (prompts, V), merged (ROWS, in)

    @property
    def lead(self) -> float:
        """By how much the likeliest next token leads, where it leads least."""
        last = np.sort(self.logits[:, -1], axis=-1)
        return float((last[:, -1] - last[:, -2]).min())

    def tensors(self) -> Arrays:
        """Return what stands in a case's file."""
        tensors = {"logits": self.logits, "next_tokens": self.logits[:, -1].argmax(axis=-1)}
        if self.merged is not None:
            name, weight = self.merged
            tensors[f"merged.{name}"] = weight[:SHOWN_ROWS].astype(np.float32)
        for flag, (last, rows) in self.signatures.items():
            tensors[f"signature.{flag}"] = last.astype(np.float32)
            if self.merged is not None:
                tensors[f"signature.{flag}.merged"] = rows.astype(np.float32)
        return tensors


def answers(case: Case) -> Answers:
    """Compute the answers to a case."""
    flags, arrays = _different(case)
    before, prompts = case.base.arrays, case.prompts
    right = logits(case.base.config, {**before, **{name: array[0] for name, array in arrays.items()}}, prompts)
    z = logits(case.base.config, {**before, **arrays}, prompts, last=1)[..., 0, :]
    z = np.broadcast_to(z, (len(flags), *z.shape[-2:]))
    weights = arrays.get(case.shown, before[case.shown][None].repeat(len(flags), axis=0))
    if case.previous:
        flags, weights = [*flags, CACHED], np.concatenate([weights, weights[:1]])
        z = np.concatenate([z, _with_old_cache(case, prompts)])
    apart: list[int] = []
    for i in range(1, len(flags)):
        if all(distance(z[i], z[j]) >= APART for j in (0, *apart)):
            apart.append(i)
    signatures = {flags[i]: (z[i], weights[i, :ROWS]) for i in apart}
    return Answers(right, (case.shown, weights[0]), signatures)


def _with_old_cache(case: Case, prompts: np.ndarray) -> np.ndarray:  # (1, prompts, V)
    """Return the logits at the end where the keys and values of all tokens but the last are the previous adapters'."""
    before = case.base.arrays
    old, new = (Formulas().changed(before, given) for given in (case.previous, case.given))
    names = {*old, *new}
    both = {name: np.stack([old.get(name, before[name]), new.get(name, before[name])]) for name in names}
    return logits(case.base.config, {**before, **both}, prompts, cached=prompts.shape[1] - 1, last=1)[1:, :, 0]


def distance(array: np.ndarray, expected: np.ndarray) -> float:
    """Return how far the entry is off that is off most."""
    return float(np.abs(array - expected).max())


def _different(case: Case) -> tuple[list[str], Arrays]:
    """Return the flags of all bugs that change something, "" first for none, and the changed arrays, one below another.

    Of bugs that change the same, only the first has its flag here.
    """
    before = case.base.arrays
    every = [("", Formulas()), *((bug.flag, Formulas(**bug.parts)) for bug in MISREADINGS)]
    misread = case.base.misread if case.given else case.base.misdecoded  # beside an adapter a decoder is not judged
    changed = [formulas.changed(before, case.given, misread, case.previous) for _, formulas in every]
    names = sorted({name for one in changed for name in one})
    usual = {name: before.get(name, np.zeros(before[_weight_of(name)].shape[:1])) for name in names}
    seen: dict[bytes, int] = {}
    for i, one in enumerate(changed):
        seen.setdefault(b"".join(one.get(name, usual[name]).tobytes() for name in names), i)
    first = sorted(seen.values())
    return [every[i][0] for i in first], {n: np.stack([changed[i].get(n, usual[n]) for i in first]) for n in names}


def _weight_of(name: str) -> str:
    return name.removesuffix("bias") + "weight" if name.endswith("bias") else name
