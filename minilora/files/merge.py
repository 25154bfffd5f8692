"""Fold an adapter into a checkpoint's weights: W + s B A, with NumPy alone.

The way is: open the base and the adapter, match their names and shapes, and stream the base into the new file.

The merged checkpoint has the very header of the base, since no name, type or shape changes. It is written in the
order of the file: bytes that no adapter touches are copied, and an adapted weight passes through memory a few rows at
a time, or a part of a row that is larger than a block. A checkpoint larger than memory can be merged, and what is
copied is the same bit for bit.

Half types are widened to float32, added to, and rounded back once. The products are taken in the order that PEFT
takes them in, so that its ``merge_and_unload`` gives the same numbers.

Of a model's folder comes a folder that loads: see `minilora.files.base`.

An embedding's weight (V, dim) is the transpose of the matrix, as GPT-2's Conv1D has it, and a convolution's
(out, C, *kernel) is the matrix (out, C K) under another shape. A variant such as DoRA gives each row of the matrix
another length, W' = g (W + s B A), by the rows' lengths: where the matrix is stored transposed, its rows are the
weight's columns, and the weight is read twice, first for the lengths. A row of zeros has no direction to lengthen, and
stays zero, as it is beside its base; PEFT divides by its length, and merges NaN.

The experts of a mixture are many matrices in one tensor, or each in one or two of its own, and their adapter is one
pair of arrays: W_e + s B_e A_e, of the rows and the experts that a tensor has. See `minilora.files.base.expertweights`.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from ..checks import FileRefused, check_flag, check_path, short
from ..variants.dora import divisible
from .atomic import is_new_or_empty, refuse_inputs, replaceable, synced, written_folder, written_whole
from .base.companions import files_beside, write_beside
from .base.expertweights import ExpertTensor, expert_tensors
from .base.orientation import layouts_of
from .base.tiedhead import EMBEDDING, HEAD, ties_head, with_own_head
from .inputs import read_start
from .peft.adapterconfig import CONFIG_NAME
from .peft.adapterfolder import WEIGHTS_NAME, AdapterFolder
from .peft.adapterkeys import BASE, PREFIX, Form
from .peft.expertkeys import ExpertForm
from .tensors import (
    BLOCK_BYTES,
    FLOATS,
    INDEX_NAME,
    MODEL_CONFIG,
    NF4_STATE,
    SINGLE_NAME,
    TensorFile,
    Weights,
    open_weights,
    same_bytes,
)

WAY = "merge into the model that it was quantised from"
NF4_WAY = (
    "; a Llama in NF4 is merged by minilora.merge, once loaded: "
    "save_llama(merge(attach(Llama.load(BASE), load_adapter(ADAPTER))), OUT), whose weights are float32"
)
WIDE = {"F16": "float32", "BF16": "float32", "F32": "float32", "F64": "float64"}
"""The type that each type is added up in."""


@dataclass(frozen=True)
class MergedTensor:
    """A weight of the base that the adapter changes."""

    name: str  # in the base, such as "enc.q_proj.weight"
    module: str  # in the adapter, such as "enc.q_proj"
    file: str  # the name of the base's file, or shard, that holds it
    dtype: str  # its type in the format's names, which is kept
    shape: tuple[int, ...]
    layout: str  # "out-in", or "in-out" where it is stored transposed, as embeddings and GPT-2's Conv1D are
    rank: int  # the adapter's, there
    scaling: float  # the adapter's, there
    form: Form  # the kind of layer, and the variant
    of_experts: ExpertTensor | None = None  # what it has of an array of a mixture's experts


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    layouts: Mapping[str, str] | None = None,
    dry_run: bool = False,
    progress: bool = False,
) -> list[MergedTensor]:
    """Write a checkpoint that has an adapter folded into its weights.

    Parameters
    ----------
    base : path
        A model's folder with config.json and its weights; or the weights alone: a safetensors file, or the index of
        shards (``model.safetensors.index.json``), or a folder of either.
    adapter : path
        A folder in PEFT's layout.
    out : path
        Of a model's folder the folder to write, with the configuration and the tokenizer, which loads as the base
        does; where the name ends in ``.safetensors``, only the file of the weights, if they are one. Of weights alone
        the file to write, of shards the folder. A folder must be empty or not exist yet. `out` appears when it is
        whole, and not before.
    layouts : mapping of str to {"out-in", "in-out"}, optional
        How weights lie in the base, by a module's path or its end, such as ``{"c_proj": "in-out"}``; the longest name
        decides. For the modules that it does not name, the adapter's `fan_in_fan_out` does.
    dry_run : bool
        Whether only to check and to say what would change.
    progress : bool
        Whether to show a progress bar on stderr, where that is a terminal.

    Returns
    -------
    list of MergedTensor
        What changes, in the order of the base's files. All else is copied bit for bit.

    Raises
    ------
    FileRefused
        If a file is damaged, the adapter does not fit the base, one of the two is not supported, or changes while it
        is read. Nothing has been written then.
    ValueError, TypeError
        If `out` cannot be written without destroying something, or an argument is out of range.

    Warns
    -----
    UserWarning
        If a config.json beside the base says that the head is the embedding, and the adapter changes one of the two.
        A merged folder then has a head of its own; weights alone cannot say so.
    """
    base, adapter, out = check_path("base", base), check_path("adapter", adapter), check_path("out", out)
    dry_run, progress = check_flag("dry_run", dry_run), check_flag("progress", progress)
    _refuse_gguf(base)
    opened, folder = open_weights(base), AdapterFolder.open(adapter)
    whole = _is_whole(base, opened, out)
    tied = [module for module in folder.layers if module.rpartition(".")[2] in (EMBEDDING, HEAD) and ties_head(opened)]
    untied = whole and bool(tied)
    companions = files_beside(base, untied=untied) if whole else {}
    opened = with_own_head(opened) if untied else opened
    changes = _matched(folder, opened, layouts)
    _check_out(out, opened, adapter, whole)
    if tied:
        _warn_of_a_tied_head(opened, tied, whole)
    if not dry_run:
        _write(out, opened, folder, changes, progress, companions)
    return changes


def _refuse_gguf(base: Path) -> None:
    """Refuse llama.cpp's format, whatever its name ends in, and say what works."""
    files = [base]
    if os.path.isdir(base):
        weights = [base / name for name in (SINGLE_NAME, INDEX_NAME) if os.path.exists(base / name)]
        files = weights or sorted(base.glob("*.gguf"))
    for file in files:
        if os.path.isfile(file) and read_start(file, 4) == b"GGUF":
            raise FileRefused(
                file,
                "a .gguf file, and merge writes safetensors. `minilora export ADAPTER --model MODEL.gguf -o FILE.gguf` "
                "makes the adapter a file that llama.cpp adds with --lora; or merge into the Hugging Face folder that "
                "the model was made from, and convert the merged folder",
            )


def _is_whole(base: Path, opened: Weights, out: Path) -> bool:
    """Return whether a model's folder is to be written, and not its weights alone."""
    alone = opened.index is None and out.suffix == ".safetensors"
    return os.path.isdir(base) and os.path.exists(base / MODEL_CONFIG) and not alone


def _warn_of_a_tied_head(base: Weights, modules: list[str], whole: bool) -> None:
    """Say that the two are no longer tied; or, of weights alone, that a program which ties them changes both."""
    if whole:
        what = "So the merged model has a head of its own, and its config.json says that the two are not tied"
    else:
        what = (
            "A program that ties the head to the embedding changes both with the merged checkpoint, and does not "
            "compute what the adapter computes beside its base: merge the model's folder into a folder"
        )
    first, *other = map(short, modules)
    changes = f"{first} and {other[0]} apart" if other else f"{first} alone"
    warnings.warn(
        f"{base.path.parent / MODEL_CONFIG} says tie_word_embeddings, and the adapter changes {changes}. {what}",
        stacklevel=3,
    )


def _matched(folder: AdapterFolder, base: Weights, layouts: Mapping[str, str] | None) -> list[MergedTensor]:
    """Return the weights that the adapter changes, in the order of the base's files; refuse those it does not fit."""
    names = _weight_names(folder, base)
    for module, name in names.items():
        _check_weight(name, folder.forms[module], base.holder[name])
    linear = {module: name for module, name in names.items() if folder.forms[module].kind == "linear"}
    others = {module: "in-out" if form.kind == "embedding" else "out-in" for module, form in folder.forms.items()}
    lie = others | layouts_of(linear, folder, base, layouts)
    changes = _of_experts(folder, base)
    changes += [_check_fit(folder, module, name, lie[module], base.holder[name]) for module, name in names.items()]
    for module in folder.with_base:
        _check_same_base(folder, module, names[module], base.holder[names[module]])
    return sorted(changes, key=lambda change: (change.file, base.spec(change.name).start))


def _weight_names(folder: AdapterFolder, base: Weights) -> dict[str, str]:
    """Return the base's name for each adapted module's weight.

    The names are the module's paths. Checkpoints of a model without its head leave out the path's first part, as
    GPT-2's do ("h.0.attn" for "transformer.h.0.attn"): where all names fit so, and not otherwise, that is followed.
    """
    modules = [module for module, form in folder.forms.items() if not isinstance(form, ExpertForm)]
    for dropped in _dropped(modules):
        names = {module: module.removeprefix(dropped) + ".weight" for module in modules if module.startswith(dropped)}
        if len(names) == len(modules) and all(name in base.holder for name in names.values()):
            return names
    missing = next(module for module in modules if module + ".weight" not in base.holder)
    if ties_head(base) and missing.rpartition(".")[2] in (EMBEDDING, HEAD):
        raise FileRefused(
            base.path,
            f"there is no {short(missing + '.weight')}, which the adapter changes: the head is the embedding there. "
            "Merge the model's folder into a folder, which gets a head of its own",
        )
    quantised = any(f"{missing}.{part}" in base.holder for part in ("qweight", "weight_packed", "weight.absmax"))
    last = "." + missing.rpartition(".")[2] + ".weight"
    like = next((name for name in base.holder if name.endswith(last)), next(iter(base.holder), "nothing"))
    raise FileRefused(
        base.path,
        f"there is no {short(missing + '.weight')}, which the adapter changes: "
        + (f"the base is quantised there, which is not supported: {WAY}" if quantised else f"there is {short(like)}"),
    )


def _dropped(modules: list[str]) -> list[str]:
    """Return what may be missing before the names of some modules: nothing, or their paths' first part."""
    return ["", *{module.partition(".")[0] + "." for module in modules[:1]}]


def _of_experts(folder: AdapterFolder, base: Weights) -> list[MergedTensor]:
    """Return the tensors of a mixture's arrays that the adapter changes; refuse those that it does not fit."""
    forms = {module: form for module, form in folder.forms.items() if isinstance(form, ExpertForm)}
    headless = [first for first in _dropped(list(forms)) if first and not any(n.startswith(first) for n in base.holder)]
    changes = []
    for module, form in forms.items():
        path = module.removeprefix(headless[0]) if headless else module
        layer, shape = folder.layers[module], folder.shapes(module)
        for tensor in expert_tensors(path, form.experts, *shape, base.holder, base.path):
            file = base.holder[tensor.name]
            _check_weight(tensor.name, form, file)
            dtype = file.tensors[tensor.name].dtype
            changes.append(
                MergedTensor(
                    tensor.name, module, file.path.name, dtype, tensor.shape, "out-in", layer.rank, layer.scaling, form,
                    tensor,
                )
            )  # fmt: skip
    return changes


def _check_weight(name: str, form: Form, file: TensorFile) -> None:
    """Refuse what is not of a floating-point type, and of a linear layer what is not a matrix."""
    spec = file.tensors[name]
    if spec.dtype not in FLOATS:
        expected = ", ".join(FLOATS)
        way = WAY + (NF4_WAY if f"{name}.{NF4_STATE}" in file.tensors else "")
        raise FileRefused(
            file.path,
            f"{short(name)} has dtype {spec.dtype}, expected one of {expected}: quantised, unsupported: {way}",
        )
    if form.kind == "linear" and len(spec.shape) != 2:
        raise FileRefused(file.path, f"{short(name)} has shape {list(spec.shape)}, the adapter is for a matrix")


def _check_fit(folder: AdapterFolder, module: str, name: str, layout: str, file: TensorFile) -> MergedTensor:
    """Refuse a weight that the adapter cannot be added to."""
    spec, layer, form = file.tensors[name], folder.layers[module], folder.forms[module]
    expected = form.weight_shape(*folder.shapes(module), layout)
    if spec.shape != expected:
        hint = f"stored {layout}" if form.kind == "linear" else f"of {'an' if form.kind == 'embedding' else 'a'} {form}"
        if form.kind == "linear" and spec.shape == expected[::-1]:
            hint += ", and the other way round it would fit: see layouts"
        raise FileRefused(
            file.path, f"{short(name)} has shape {list(spec.shape)}, the adapter is for {list(expected)} ({hint})"
        )
    return MergedTensor(name, module, file.path.name, spec.dtype, spec.shape, layout, layer.rank, layer.scaling, form)


def _check_same_base(folder: AdapterFolder, module: str, name: str, file: TensorFile) -> None:
    """Refuse an adapter that brings a weight of the base with it, other than the base has."""
    key = f"{PREFIX}{module}.{BASE}"
    if not same_bytes(folder.file, key, file, name):
        raise FileRefused(
            folder.file.path, f"{short(key)} is not the base's {short(name)}: the adapter is of another base"
        )


def _check_out(out: Path, base: Weights, adapter: Path, whole: bool) -> None:
    """Refuse to replace what is read, or is no regular file, and to write into a folder that holds something."""
    parent = out.absolute().parent
    if not os.path.isdir(parent):
        raise ValueError(f"out {str(out)!r}: there is no folder {str(out.parent)!r}")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"out {str(out)!r}: the folder {str(out.parent)!r} cannot be written")
    if base.index is None and not whole:
        if os.path.isdir(out):
            raise ValueError(f"out is the folder {str(out)!r}, expected the name of a file to write")
        files = [(adapter / file, "a file of the adapter") for file in (CONFIG_NAME, WEIGHTS_NAME)]
        refuse_inputs("out", out, [(base.path, "the base itself"), *files])
        replaceable(out)
        return
    if not is_new_or_empty(out):
        why = "the base is a model's folder" if whole else "the base has shards"
        raise ValueError(f"out {str(out)!r} exists, expected a folder that is empty or new: {why}")
    if os.path.lexists(out) and (os.path.ismount(out) or out.samefile(".")):
        raise ValueError(
            f"out {str(out)!r} is the working folder or a mount point, which nothing can replace: name a new folder"
        )


def _write(
    out: Path,
    base: Weights,
    folder: AdapterFolder,
    changes: list[MergedTensor],
    progress: bool,
    companions: Mapping[str, Path | bytes],
) -> None:
    """Write the one file; or the files, their index and those beside into a folder, which appears when it is whole."""
    total = sum(spec.end - spec.start for file in base.files for spec in file.tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=None if progress else True) as bar:
        if base.index is None and not companions:
            (file,) = base.files
            with written_whole(out) as target:
                _write_merged(file, target, folder, changes, bar)
            return
        with written_folder(out) as part:
            for file in base.files:
                with synced(part / file.path.name) as target:
                    _write_merged(file, target, folder, changes, bar)
            if base.index is not None:
                with synced(part / base.index.name) as target:
                    target.write(base.index_text)
            write_beside(companions, part)


def _write_merged(
    file: TensorFile, target: BinaryIO, folder: AdapterFolder, changes: list[MergedTensor], bar: tqdm
) -> None:
    """Copy one file, those of its tensors that change merged on their way."""
    changed = {change.name: change for change in changes}
    target.write(file.header)
    read = lru_cache(maxsize=2)(folder.read)  # experts' two arrays alternate
    for name, spec in file.tensors.items():
        if name in changed:
            change, start = changed[name], spec.start
            for arrays in _factors(read(change.module), change):
                _merge(file, target, arrays, change, bar, start)
                start += (spec.end - spec.start) // len(change.of_experts.experts if change.of_experts else (0,))
        else:
            for raw in file.blocks(name):
                target.write(raw.data)
                bar.update(raw.size)


def _factors(arrays: list[np.ndarray], change: MergedTensor) -> Iterator[list[np.ndarray]]:
    """Yield the adapter's arrays; of experts, those of each that the tensor has, in its order."""
    if change.of_experts is None:
        yield arrays
        return
    assert isinstance(change.form, ExpertForm)
    A, B = arrays
    r, E = change.rank, change.form.experts
    for e in change.of_experts.experts:
        yield [A[e * r : (e + 1) * r], B[change.of_experts.rows, e::E]]  # (moe.16), (moe.17)


def _merge(
    file: TensorFile,
    target: BinaryIO,
    arrays: list[np.ndarray],
    change: MergedTensor,
    bar: tqdm,
    start: int,
) -> None:
    """Read a weight from there on in the source, some rows at a time, change it by the adapter and write it."""
    A, B, *more = (array.astype(WIDE[change.dtype], copy=False) for array in arrays)
    variant = change.form.variant
    transposed = change.layout == "in-out"
    left, right = (A.T, B.T) if transposed else (B, A)  # of the weight as it is stored
    lengths = None  # of the matrix's rows, where no block holds a whole one
    if variant.needs_lengths and (transposed or _block_shape(right, change)[1] < right.shape[1]):
        lengths = _lengths(file, left, right, change, start)
    for rows, columns, weight, delta in _changes(file, left, right, change, start):
        wide, n = weight.astype(WIDE[change.dtype]), None
        with np.errstate(over="ignore", invalid="ignore"):
            if variant.merged is None:
                merged = wide + delta
            else:
                outputs = columns if transposed else rows
                if variant.needs_lengths:
                    n = np.sqrt(_squares(wide + delta).sum(axis=1)) if lengths is None else lengths[outputs]
                    n = _lengths_to_divide_by(file, change, n)
                W, BA = (wide.T, delta.T) if transposed else (wide, delta)
                merged = variant.merged(W, BA, more[0][outputs], n)
                merged = merged.T if transposed else merged
            rounded = np.ascontiguousarray(merged, FLOATS[change.dtype])
        lost = np.isfinite(weight) & ~np.isfinite(rounded)
        if lost.any():
            first = f"from row {rows.start} on"
            raise FileRefused(
                file.path, f"{short(change.name)}: the merged weight is beyond the range of {change.dtype} {first}"
            )
        target.write(rounded.reshape(-1).view(np.uint8).data)
        bar.update(rounded.nbytes)


def _lengths(file: TensorFile, left: np.ndarray, right: np.ndarray, change: MergedTensor, start: int) -> np.ndarray:
    """Return the lengths of the rows of W + s B A, of which no block holds a whole one."""
    transposed = change.layout == "in-out"
    squares = np.zeros(right.shape[1] if transposed else len(left))
    for rows, columns, weight, delta in _changes(file, left, right, change, start):
        with np.errstate(over="ignore", invalid="ignore"):
            direction = weight.astype(WIDE[change.dtype]) + delta
        squares[columns if transposed else rows] += _squares(direction).sum(axis=0 if transposed else 1)
    return np.asarray(np.sqrt(squares))


def _block_shape(right: np.ndarray, change: MergedTensor) -> tuple[int, int]:
    """Return the rows and columns of a block: some whole rows, or a part of one that is larger than a block."""
    numbers = BLOCK_BYTES // FLOATS[change.dtype].itemsize
    width = min(int(right.shape[1]), max(1, numbers))
    return max(1, numbers // width), width


def _changes(
    file: TensorFile, left: np.ndarray, right: np.ndarray, change: MergedTensor, start: int
) -> Iterator[tuple[slice, slice, np.ndarray, np.ndarray]]:
    """Yield a block of a weight at a time: its rows, its columns, its numbers, and those of s B A in the wide type."""
    dtype = FLOATS[change.dtype]
    height, width = _block_shape(right, change)
    for top in range(0, len(left), height):
        rows = slice(top, min(len(left), top + height))
        for first in range(0, right.shape[1], width):
            columns = slice(first, min(right.shape[1], first + width))
            shape = rows.stop - rows.start, columns.stop - columns.start
            raw = file.read_bytes(start, math.prod(shape) * dtype.itemsize)
            start += raw.size
            weight = raw.view(dtype).reshape(shape)
            with np.errstate(over="ignore", invalid="ignore"):
                delta = (left[rows] @ right[:, columns]) * change.scaling
            yield rows, columns, weight, delta


def _squares(direction: np.ndarray) -> np.ndarray:
    """Return the squares in float64: there are many of one sign to add up."""
    with np.errstate(over="ignore"):
        return np.asarray(np.square(direction, dtype=np.float64))


def _lengths_to_divide_by(file: TensorFile, change: MergedTensor, n: np.ndarray) -> np.ndarray:
    """Return the lengths with 1 for 0: a row of zeros stays zero. Refuse a length that is no number."""
    wrong = n[~np.isfinite(n)]
    if wrong.size:
        raise FileRefused(
            file.path,
            f"{short(change.name)}: the weights of an output have the length {wrong[0]}, {change.form.variant.name} "
            "divides by it",
        )
    return np.asarray(divisible(n))
