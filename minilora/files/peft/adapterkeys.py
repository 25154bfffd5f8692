"""How PEFT names and shapes an adapter's arrays, by the kind of layer that the adapter stands beside.

Here every adapter is two matrices, lora_A (r, in) and lora_B (out, r). In a file, each name follows the prefix
``base_model.model.<path>.``:

==========  ==================================  ==================================  =================================
kind        A                                   B                                   a variant's, `PeftNames.array`
==========  ==================================  ==================================  =================================
linear      ``lora_A.weight`` (r, in)           ``lora_B.weight`` (out, r)          (out,)
embedding   ``lora_embedding_A`` (r, V)         ``lora_embedding_B`` (dim, r)       (dim,)
conv1d      ``lora_A.weight`` (r, C, K)         ``lora_B.weight`` (out, r, 1)       (1, out, 1)
conv2d      ``lora_A.weight`` (r, C, KH, KW)    ``lora_B.weight`` (out, r, 1, 1)    (1, out, 1, 1)
==========  ==================================  ==================================  =================================

The number of axes tells the kind. A matrix of a convolution has its columns channel first, so that reshaping is all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...checks import FileRefused, short
from ...variants.variant import DORA, LORA, Variant
from ..tensors import FLOATS, TensorFile, TensorSpec

PREFIX = "base_model.model."
BASE = "base_layer.weight"
"""The base's own weight. PEFT saves it too where an input or output embedding is adapted (`save_embedding_layers`)."""
FACTORS = ("lora_A.weight", "lora_B.weight")
EMBEDDING_FACTORS = ("lora_embedding_A", "lora_embedding_B")


@dataclass(frozen=True)
class PeftNames:
    """How PEFT names a variant."""

    flag: str  # the key of adapter_config.json that asks for it
    array: str  # its further array


PEFT_NAMES = {DORA: PeftNames("use_dora", "lora_magnitude_vector")}
"""Of the variants that have a further array. One without a row here is refused as a file."""
OF_VARIANTS = {names.array: variant for variant, names in PEFT_NAMES.items()}
_PARTS = "|".join(map(re.escape, (*FACTORS, *EMBEDDING_FACTORS, *OF_VARIANTS, BASE)))
KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.(?P<part>{_PARTS})", re.DOTALL)
CONVOLUTIONS = ("conv1d", "conv2d")


@dataclass(frozen=True)
class Form:
    """How one module's adapter lies in a file."""

    kind: str = "linear"  # or "embedding", "conv1d", "conv2d"
    kernel: tuple[int, ...] = ()  # its size along each axis, of a convolution
    variant: Variant = LORA

    def keys(self, module: str) -> tuple[str, ...]:
        """Return the names of a module's arrays: A, B and, where the variant has one, its further array."""
        parts = EMBEDDING_FACTORS if self.kind == "embedding" else FACTORS
        return tuple(f"{PREFIX}{module}.{part}" for part in (*parts, *self.arrays))

    @property
    def arrays(self) -> list[str]:
        """The name of the variant's further array, where it has one."""
        return [PEFT_NAMES[self.variant].array] if self.variant in PEFT_NAMES else []

    def shapes(self, rank: int, out: int, width: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes in the file of arrays for a matrix (out, width)."""
        ones = (1,) * len(self.kernel)
        A, B = (rank, width // math.prod(self.kernel), *self.kernel), (out, rank, *ones)
        return A, B, *([(1, out, *ones) if self.kernel else (out,)] if self.arrays else [])

    def weight_shape(self, out: int, width: int, layout: str) -> tuple[int, ...]:
        """Return the shape of the weight that a checkpoint has for a matrix (out, width)."""
        return (width, out) if layout == "in-out" else (out, width // math.prod(self.kernel), *self.kernel)

    def matrices(self, arrays: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        """Return A (r, in), B (out, r) and a variant's further array (out,), from arrays as the file has them."""
        A, B, *more = arrays
        return [A.reshape(len(A), -1), B.reshape(len(B), -1), *(array.reshape(-1) for array in more)]

    def __str__(self) -> str:
        size = "x".join(map(str, self.kernel))
        return " ".join(filter(None, (self.kind, size, self.variant.name if self.variant is not LORA else "")))


def forms_of(file: TensorFile) -> dict[str, Form]:
    """Return the form of each adapted module, in the order of layers; refuse keys that do not make whole adapters."""
    parts: dict[str, set[str]] = {}
    for key in file.tensors:
        match = KEY.fullmatch(key)
        if match is None:
            raise FileRefused(file.path, f"the key {short(key)} is {_what_is(key)}")
        parts.setdefault(match["module"], set()).add(match["part"])
    for module, parts_of_module in parts.items():
        _check_parts(file.path, module, parts_of_module)
    if not parts:
        raise FileRefused(file.path, "there are no tensors in it")
    return {module: _form(file, module, parts[module]) for module in sorted(parts, key=natural)}


def natural(path: str) -> list[str | int]:
    """Return what puts paths in order, the numbers in them by their size: layer 2 comes before layer 10."""
    parts = re.split(r"(\d{1,9})", path)  # names at even places, numbers at odd ones
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def with_base(file: TensorFile) -> frozenset[str]:
    """Return the modules whose weight in the base is in the file too."""
    ending = f".{BASE}"
    return frozenset(key.removeprefix(PREFIX).removesuffix(ending) for key in file.tensors if key.endswith(ending))


def is_module_path(module: str) -> bool:
    """Return whether a text can be a module's path: names with dots between them."""
    return all(module.split(".")) and module.isprintable()


def check_arrays(file: TensorFile, module: str, form: Form, rank: int) -> None:
    """Refuse arrays that are not of one type, of the shapes of their kind, and of the rank that is configured."""
    keys = form.keys(module)
    specs = [file.tensors[key] for key in keys]
    for key, spec in zip(keys, specs, strict=True):
        if 0 in spec.shape:
            raise FileRefused(file.path, f"{short(key)} has shape {list(spec.shape)}, which is empty")
        if spec.dtype not in FLOATS:
            raise FileRefused(file.path, f"{short(key)} has dtype {spec.dtype}, expected one of {', '.join(FLOATS)}")
        if spec.dtype != specs[0].dtype:
            first, other = f"{short(keys[0])} has dtype {specs[0].dtype}", f"{short(key)} has dtype {spec.dtype}"
            raise FileRefused(file.path, f"{first} and {other}")
    A, B = (spec.shape for spec in specs[:2])
    ones = "".join(", 1" for _ in form.kernel)
    if A[0] != rank:
        rest = ", ".join(["in", *map(str, form.kernel)])
        raise FileRefused(file.path, f"{short(keys[0])} has shape {list(A)}, expected [{rank}, {rest}] by the rank")
    if B[1:] != (rank, *(1 for _ in form.kernel)):
        groups = form.kernel and B[1] < rank
        hint = ". A convolution with groups has such a shape; groups are not supported" if groups else ""
        raise FileRefused(
            file.path, f"{short(keys[1])} has shape {list(B)}, expected [out, {rank}{ones}] by the rank{hint}"
        )
    if form.arrays and specs[2].shape != form.shapes(rank, B[0], 1)[2]:
        expected = list(form.shapes(rank, B[0], 1)[2])
        raise FileRefused(
            file.path, f"{short(keys[2])} has shape {list(specs[2].shape)}, expected {expected}: one for each output"
        )


def check_variant(path: Path, configured: Variant, forms: Mapping[str, Form]) -> None:
    """Refuse a variant's arrays where the configuration says nothing of it, and modules that lack theirs."""
    for module, form in forms.items():
        if form.variant is not configured:
            missing = configured is not LORA
            variant = configured if missing else form.variant
            names = PEFT_NAMES[variant]
            raise FileRefused(
                path,
                f"{names.flag} is {missing} and the module {short(module)} {'has no' if missing else 'has a'} "
                f"{names.array}, which is {variant.name}'s {variant.array}",
            )


def _check_parts(path: Path, module: str, parts: set[str]) -> None:
    """Refuse a module that has not exactly one A and one B, of one kind."""
    of_both = parts & {*FACTORS}, parts & {*EMBEDDING_FACTORS}
    if all(of_both):
        raise FileRefused(path, f"the module {short(module)} has factors of an embedding and of another layer")
    names = EMBEDDING_FACTORS if of_both[1] else FACTORS
    missing = next((name for name in names if name not in parts), None)
    if missing is not None:
        raise FileRefused(path, f"the module {short(module)} has no {missing}")
    if not is_module_path(module):
        raise FileRefused(path, f"{short(module)} is not a module's path: names with dots between them")


def _form(file: TensorFile, module: str, parts: set[str]) -> Form:
    """Return the form of a module whose keys are right; refuse factors of other numbers of axes."""
    variant = next((variant for key, variant in OF_VARIANTS.items() if key in parts), LORA)
    if EMBEDDING_FACTORS[0] in parts:
        form, axes = Form("embedding", (), variant), 2
    else:
        key, shape = f"{PREFIX}{module}.{FACTORS[0]}", file.tensors[f"{PREFIX}{module}.{FACTORS[0]}"].shape
        axes, known = len(shape), 2 + len(CONVOLUTIONS)
        if axes < 2:
            raise FileRefused(file.path, f"{short(key)} has shape {list(shape)}, expected a matrix")
        if axes > known:
            raise FileRefused(
                file.path, f"{short(key)} has shape {list(shape)}: a convolution of {axes - 2} axes, not supported"
            )
        form = Form("linear", (), variant) if axes == 2 else Form(CONVOLUTIONS[axes - 3], tuple(shape[2:]), variant)
    for key in form.keys(module)[:2]:
        spec: TensorSpec = file.tensors[key]
        if len(spec.shape) != axes:
            what = "a matrix" if axes == 2 else f"{axes} axes as a convolution's lora_A has"
            raise FileRefused(file.path, f"{short(key)} has shape {list(spec.shape)}, expected {what}")
    return form


def _what_is(key: str) -> str:
    """Say in words what a key that cannot be read belongs to."""
    for part, meaning in (
        (".bias", "a bias (lora_bias, or bias of the base), which is not supported"),
        ("modules_to_save", "of a module trained in full, which is not supported"),
    ):
        if part in key:
            return meaning
    if not key.startswith(PREFIX) and ".lora_" in key:
        return f"without the prefix {PREFIX!r}"
    return f"unexpected, expected {PREFIX}<module>.lora_A.weight and the like for lora_B"
