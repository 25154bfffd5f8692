"""The functions and declarations of an implementation of LoRA.

An implementation is a module or an object with functions on NumPy arrays; only ``forward`` is required::

    forward(x, weight, bias, lora_A, lora_B, alpha) -> y
    backward(dy, x, weight, bias, lora_A, lora_B, alpha) -> {"x": ..., "lora_A": ..., "lora_B": ...}
    merge(weight, lora_A, lora_B, alpha) -> weight
    init(in_features, out_features, rank, rng) -> (lora_A, lora_B)
    step(params, grads, state) -> (params, state)          Adam with lr 1e-3; state is None in the first step
    merging(weight, bias, lora_A, lora_B, alpha) -> layer  a stateful layer with forward(x), merge() and unmerge();
                                                           forward gives the same output after each of them
    kinds = {"conv2d": another such object}                other kinds of layers

    dtype = "float64"            the precision to check in: "float64", "float32", "float16" or "bfloat16". The default
                                 is float64; if the output is wrong in float64, it is the dtype of the answers
    scaling = "alpha / r"        or "alpha / sqrt(r)", "alpha", "1"
    orientation = "out, in"      the layout of its weights: "out, in" as in PyTorch, or "in, out": weight (in, out),
                                 lora_A (in, r), lora_B (r, out)
    fan_in_fan_out = False       True if the weight and the merged weight are (in, out), whatever the factors are, as
                                 in PEFT for GPT-2's Conv1D

x is (N, in), weight (out, in), bias (out,) or None, lora_A (r, in), lora_B (out, r). Each function is passed everything
that it needs: a backward may not rely on which forward was called last. The kinds are "rslora", "dora", "embedding",
"conv1d", "conv2d", "dropout", "nf4", "mixed", "fused", "experts" and "combine". `problems.kinds` has their shapes.
Their arguments differ from the linear layer's:

- "dora": magnitude (out,) is the last argument of ``forward``, ``backward`` and ``merge``, and its gradient is in the
  dict. weight is the last argument of ``init``, which returns the magnitude as well. ``detached_norm`` is True, as in
  PEFT, or False if the gradient passes through the norm.
- "dropout": mask (N, in), of zeros and 1 / (1 - p), is the last argument of ``forward`` and ``backward``. It multiplies
  x only in the adapter's path.
- "embedding": x has ids, bias is None, and there is no dx.
- "conv1d", "conv2d": a function is passed those of the keywords stride, padding, dilation (a tuple each) and groups
  that it has as parameters; without them they are 1, 0, 1 and 1. The kernel's shape is the last argument of ``init``.
- "nf4": packed and absmax replace weight, in blocks of 64. A function is passed those of the keywords nested_absmax and
  mean that it has as parameters. Checked in float32.
- "mixed": x, dy, weight and bias have bfloat16 values in float32 arrays; the factors are float32. Results computed in
  bfloat16 are returned in float32. Declare ``output = "float32"`` if the output is not rounded to bfloat16.
- "fused": lora_A, lora_B and alpha are lists with an entry for each slot of the outputs, None if a slot has no adapter.
  The list of the slots' widths is the last argument of all functions. The gradients of lora_A and lora_B are such lists
  too. ``slots`` is 2 or 3 if the number of slots is fixed, ``one_rank`` is True if all slots share a rank and alpha,
  ``one_width`` if they share a width. There is no ``init``: a slot starts as a linear layer does.
- "experts": weight is (E, out, in), and no bias is passed. expert_ids (N,), the expert of each row, is the last
  argument of ``forward`` and ``backward``. lora_A (E r, in) has the experts as its slow index, lora_B (out, r E) as its
  fast one, as PEFT packs them; the r of alpha / r is one expert's rank. ``merge`` returns (E, out, in). There is no
  ``init``: an expert starts as a linear layer does.
- "combine": not a layer, but the combination of several adapters of one layer. It has any of the functions
  ``cat(lora_A, lora_B, alpha, use_rslora, weights)``, ``linear`` with the same arguments, and ``svd`` with a rank as
  well. Each is passed lists with an entry for each adapter, and returns the change of weight (out, in) that the
  combined adapter makes. See `problems.several`.
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
from .calling import as_choice
from .kindreport import id_of

ORIENTATIONS = ("out, in", "in, out")


def declared_dtype(kind: Kind, implementation: Any, name: str, dtype: str | None) -> str | None:
    """Return the precision to check a kind in, or None if none is declared. Unknown declarations raise CannotRun."""
    wanted = as_choice(dtype or getattr(implementation, "dtype", None), tuple(UNIT))
    choices: dict[str, tuple[Any, ...]] = {"orientation": ORIENTATIONS, "scaling": tuple(SCALINGS)}
    choices |= {"fan_in_fan_out": (True, False), **kind.declares}
    declared = [(what, getattr(implementation, what, None), known) for what, known in choices.items()]
    for what, value, known in [("dtype", wanted, tuple(UNIT)), *declared]:
        try:
            if value is not None:
                check_choice(f"{what} of {name}", as_choice(value, known), known)
        except ValueError as error:
            raise CannotRun(str(error)) from None
    return wanted if (wanted or "float64") in kind.dtypes else kind.dtypes[0]


def further_kinds(implementation: Any, title: str) -> Mapping[str, Any]:
    """Return the objects for the kinds of layers other than the linear one; `title` names them in messages."""
    kinds = getattr(implementation, "kinds", {})
    if not isinstance(kinds, Mapping):
        raise CannotRun(f"kinds of {title} must be a dict of objects, got {type(kinds).__name__}")
    if unknown := [kind for kind in kinds if kind not in DECLARED]:
        raise CannotRun(f"{title} has the kind {unknown[0]!r}, expected one of {', '.join(DECLARED)}")
    return kinds


def formulas_of(kind: Kind, implementation: Any) -> Formulas:
    """Return the formulas for a kind's problems, with the scaling that an implementation declares."""
    if hasattr(implementation, "scaling"):
        return replace(kind.formulas, scaling=SCALINGS[as_choice(implementation.scaling, tuple(SCALINGS))])
    return kind.formulas


def ids(implementation: Any) -> list[str]:
    """Return the ids of all cases that `check` will judge of an implementation, in the report's order."""
    return [id for kind in ("linear", *further_kinds(implementation, "it")) for id in _ids_of(KINDS[kind])]


def _ids_of(kind: Kind) -> Iterator[str]:
    for number in range(len(kind.problems)):
        yield from (id_of(f"{kind.name}-{number}", claim) for claim in kind.claims_per_problem)
    yield from (id_of(kind.name, claim) for claim in kind.claims if claim not in kind.claims_per_problem)
