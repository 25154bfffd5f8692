"""Read files of answers: their tensors as numbers, with the precision that they were computed in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ...files.dtypes import FLOATS
from ...files.tensors import TensorFile
from ...texts import FileRefused, short
from .reading import NamedArrays

COMPUTED_IN = "computed_in"
PRECISIONS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
INTEGERS = {"I64": "<i8", "I32": "<i4"}
MAX_ANSWER = 1 << 26
"""The largest tensor of answers that is read, in bytes."""


def read_answers(
    path: Path, tolerance: Mapping[str, float], more: Sequence[str] = ()
) -> tuple[list[str], str, NamedArrays]:
    """Return the names of all tensors in a file, the precision that they were computed in, and the answers.

    `more` has names of tensors that are answers too.
    """
    file, known = TensorFile(path), ("logits", "log_probabilities", *more)
    names = [name for name in file.tensors if name in known or name.startswith("merged.")]
    for name in names:
        if file.tensors[name].dtype not in FLOATS:
            raise FileRefused(path, f"{short(name)} has dtype {file.tensors[name].dtype}, expected a float dtype")
    if "ids" in file.tensors and file.tensors["ids"].dtype not in INTEGERS:
        raise FileRefused(path, f"ids has dtype {file.tensors['ids'].dtype}, expected one of {', '.join(INTEGERS)}")
    for name in (*names, "ids"):
        spec = file.tensors.get(name)
        if spec is not None and not 0 < spec.end - spec.start <= MAX_ANSWER:
            raise FileRefused(path, f"{short(name)} has shape {list(spec.shape)}, expected 1 to {MAX_ANSWER:,} bytes")
    types = [PRECISIONS[file.tensors[name].dtype] for name in names]
    precision = file.metadata.get(COMPUTED_IN, max(types, key=lambda one: tolerance[one], default="float32"))
    if precision not in tolerance:
        raise FileRefused(path, f"{COMPUTED_IN} is {short(precision)}, expected one of {', '.join(tolerance)}")
    return [*file.tensors], precision, read_tensors(path, (*names, "ids") if "ids" in file.tensors else names)


def read_tensors(path: Path, names: Iterable[str] | None = None) -> NamedArrays:
    """Read the named tensors of a file, by default all; floats of every type are returned as float64."""
    file, arrays = TensorFile(path), {}
    for name in file.tensors if names is None else names:
        spec = file.tensors[name]
        if spec.dtype in INTEGERS:
            arrays[name] = file.numbers(name).view(INTEGERS[spec.dtype]).reshape(spec.shape)
        else:
            arrays[name] = file.read(name).astype(np.float64)
    return arrays
