"""What an implementation of LoRA is, and what it must do.

An implementation is a module or an object with functions on NumPy arrays; only ``forward`` is required::

    forward(x, weight, bias, lora_A, lora_B, alpha) -> y
    backward(dy, x, weight, bias, lora_A, lora_B, alpha) -> {"x": ..., "lora_A": ..., "lora_B": ...}
    merge(weight, lora_A, lora_B, alpha) -> weight
    init(in_features, out_features, rank, rng) -> (lora_A, lora_B)
    step(params, grads, state) -> (params, state)          Adam with lr 1e-3; state is None at first
    merging(weight, bias, lora_A, lora_B, alpha) -> layer  a layer that keeps its state: it has forward(x), merge() and
                                                           unmerge(), after each of which forward gives the same
    kinds = {"conv2d": another such object}                other kinds of layers

    dtype = "float64"            the precision to be checked in: "float64", "float32", "float16" or "bfloat16"; if
                                 nothing is said, float64, or that in which it answers where its output is not right
                                 in float64
    scaling = "alpha / r"        or "alpha / sqrt(r)", "alpha", "1"
    orientation = "out, in"      how its weights lie: "out, in" as in PyTorch, or "in, out": weight (in, out),
                                 lora_A (in, r), lora_B (r, out)
    fan_in_fan_out = False       True where the weight and the merged weight lie (in, out), however the factors do, as
                                 PEFT has it for GPT-2's Conv1D

x is (N, in), weight (out, in), bias (out,) or None, lora_A (r, in), lora_B (out, r). Each function gets all that it
needs: a backward may not count on which forward was called last. The kinds are "rslora", "dora", "embedding",
"conv1d", "conv2d", "dropout", "nf4", "mixed", "fused", "experts" and "combine". `problems.kinds` has their shapes, and
their functions take more:

- "dora": magnitude (out,) as the last argument of ``forward``, ``backward`` and ``merge``, and its gradient in the
  dict; weight as the last argument of ``init``, which returns the magnitude as well. ``detached_norm`` is True, as in
  PEFT, or False where the gradient passes through the norm.
- "dropout": mask (N, in), of zeros and 1 / (1 - p), as the last argument of ``forward`` and ``backward``. It is
  multiplied with x in the adapter's path alone.
- "embedding": x are ids, bias is None, and there is no dx.
- "conv1d", "conv2d": those of the keywords stride, padding, dilation (a tuple each) and groups that a function has
  among its parameters; without them they are 1, 0, 1 and 1. ``init`` takes the kernel's shape last.
- "nf4": packed and absmax in the place of weight, in blocks of 64; those of the keywords nested_absmax and mean that a
  function names. Checked in float32.
- "mixed": x, dy, weight and bias are numbers of bfloat16, in arrays of float32; the factors are float32. What is
  computed in bfloat16 comes back in float32. ``output = "float32"`` where the output is not rounded to bfloat16.
- "fused": lora_A, lora_B and alpha are lists with an entry for each slot of the outputs, None where a slot has no
  adapter; the slots' widths, a list, are the last argument of all functions. The gradients of lora_A and lora_B are
  such lists too. ``slots`` is 2 or 3 where there are always so many, ``one_rank`` is True where all slots have one rank
  and alpha, ``one_width`` where all are of one width. There is no ``init``: a slot starts as a linear layer does.
- "experts": weight is (E, out, in), and there is no bias among the arguments; expert_ids (N,), the expert of each row,
  is the last one of ``forward`` and ``backward``. lora_A (E r, in) has the experts as its slow index, lora_B (out, r E)
  as its fast one, as PEFT packs them; alpha / r is of the rank of one. ``merge`` returns (E, out, in). There is no
  ``init``: an expert starts as a linear layer does.
- "combine": no layer, but adapters of one layer that are put together. Its functions are ``cat(lora_A, lora_B, alpha,
  use_rslora, weights)``, ``linear`` of the same and ``svd`` with a rank besides, any of them. Each takes lists with an
  entry for each adapter, and returns the change of weight (out, in) that the new adapter makes. See `problems.several`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ...checks import check_choice
from ...report import CannotRun
from ..problems.formulas import SCALINGS, Formulas
from ..problems.kind import Kind
from ..problems.kinds import DECLARED, KINDS
from ..problems.tolerance import UNIT
from .calling import spelled
from .kindreport import id_of

ORIENTATIONS = ("out, in", "in, out")


def declared_dtype(kind: Kind, implementation: Any, name: str, dtype: str | None) -> str | None:
    """Return the precision that a kind is checked in, None where nothing is said; all declarations must be known."""
    wanted = spelled(dtype or getattr(implementation, "dtype", None), tuple(UNIT))
    choices: dict[str, tuple[Any, ...]] = {"orientation": ORIENTATIONS, "scaling": tuple(SCALINGS)}
    choices |= {"fan_in_fan_out": (True, False), **kind.declares}
    declared = [(what, getattr(implementation, what, None), known) for what, known in choices.items()]
    for what, value, known in [("dtype", wanted, tuple(UNIT)), *declared]:
        try:
            if value is not None:
                check_choice(f"{what} of {name}", spelled(value, known), known)
        except ValueError as error:
            raise CannotRun(str(error)) from None
    return wanted if (wanted or "float64") in kind.dtypes else kind.dtypes[0]


def further_kinds(implementation: Any, title: str) -> Mapping[str, Any]:
    """Return the objects for kinds of layers other than the linear one; `title` is for messages."""
    kinds = getattr(implementation, "kinds", {})
    if not isinstance(kinds, Mapping):
        raise CannotRun(f"kinds of {title} must be a dict of objects, got {type(kinds).__name__}")
    if unknown := [kind for kind in kinds if kind not in DECLARED]:
        raise CannotRun(f"{title} has the kind {unknown[0]!r}; known are {', '.join(DECLARED)}")
    return kinds


def formulas_of(kind: Kind, implementation: Any) -> Formulas:
    """Return what a kind's problems should give, by the scaling that an implementation declares."""
    if hasattr(implementation, "scaling"):
        return replace(kind.formulas, scaling=SCALINGS[spelled(implementation.scaling, tuple(SCALINGS))])
    return kind.formulas


def ids(implementation: Any) -> list[str]:
    """Return the ids of all that `check` will judge of an implementation, in the order of the report."""
    return [id for kind in ("linear", *further_kinds(implementation, "it")) for id in _ids_of(KINDS[kind])]


def _ids_of(kind: Kind) -> Iterator[str]:
    for number in range(len(kind.problems)):
        yield from (id_of(f"{kind.name}-{number}", claim) for claim in kind.claims_per_problem)
    yield from (id_of(kind.name, claim) for claim in kind.claims if claim not in kind.claims_per_problem)
