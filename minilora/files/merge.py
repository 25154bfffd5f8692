"""Merging an adapter into a model's weights, from file to file, with NumPy only.

    merged = W + s B A                         (out, in)
    merged = g V, with V = W + s B A           of DoRA, where g_o = m_o / |V_o| for each row o: (dora.1), (dora.2)

The steps: open the base and the adapter, match names and shapes, and copy each file of the base, tensor by tensor, in
file order. No name, dtype or shape changes. The header's metadata also record the adapter's digest, so that minilora
does not apply the same adapter again. Tensors without an adapter are copied bit for bit. An adapted weight is processed
some rows at a time, so even a model larger than memory can be merged.

Half-precision weights are widened to float32, changed, and rounded back once. The products are computed in PEFT's
order, so its ``merge_and_unload`` gives the same numbers.

An embedding's weight (V, dim) is the transpose of the matrix, as with GPT-2's Conv1D, and a convolution's weight
(out, C, *kernel) is the matrix (out, C K), reshaped. The experts of a mixture either share one tensor or have one or
two tensors each: W_e + s B_e A_e, see `minilora.files.experts`.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from ..checks import check_flag, check_path
from ..texts import FileRefused, short
from ..variants.dora import divisible
from .disk import check_file, check_new_folder, synced, written_folder, written_whole
from .dtypes import FLOATS, cast
from .modelfolder import EMBEDDING, HEAD, companions, copy_companions, ties_head, with_own_head
from .peft import CONFIG_NAME, MERGED_KEY, WEIGHTS_NAME, AdapterFolder, check_not_merged
from .placement import MergedTensor, merged_tensors
from .tensors import BLOCK_BYTES, MODEL_CONFIG, TensorFile, Weights, open_weights


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    layouts: Mapping[str, str] | None = None,
    dry_run: bool = False,
    progress: bool = False,
) -> list[MergedTensor]:
    """Write a model's weights with an adapter merged into them.

    Parameters
    ----------
    base : path
        A model's folder with config.json and its weights; or only the weights: a safetensors file, an index of shards
        (``model.safetensors.index.json``), or a folder that contains one of the two.
    adapter : path
        A folder in PEFT's layout.
    out : path
        The output. If `base` is a model's folder: a folder with configuration and tokenizer that loads like the base;
        or, for a base without shards, a path ending in ``.safetensors`` for only the weights. Otherwise a file, or a
        folder for shards. A folder must be new or empty. `out` appears only when it is complete.
    layouts : mapping of str to {"out-in", "in-out"}, optional
        The layout of weights in the base, by a module's path or its suffix, such as ``{"c_proj": "in-out"}``; the
        longest match decides. For all other modules the adapter's `fan_in_fan_out` does.
    dry_run : bool
        Whether to check and report what would change without writing anything.
    progress : bool
        Whether to show a progress bar on stderr if it is a terminal.

    Returns
    -------
    list of MergedTensor
        The changed tensors, in the order of the base's files. All others are copied bit for bit.

    Raises
    ------
    FileRefused
        If a file is damaged, the adapter does not fit the base, or one of the two is not supported. Nothing has been
        written in that case.
    ValueError, TypeError
        If `out` cannot be written without destroying something, or an argument is out of range.

    Warns
    -----
    UserWarning
        If the base's config.json ties the head to the embedding, and the adapter changes either. A merged folder then
        has a separate head; a file with only weights cannot record that.
    """
    base, adapter, out = check_path("base", base), check_path("adapter", adapter), check_path("out", out)
    dry_run, progress = check_flag("dry_run", dry_run), check_flag("progress", progress)
    weights, folder = open_weights(base), AdapterFolder.open(adapter)
    weights_only = weights.index is None and out.suffix == ".safetensors"
    whole = os.path.isdir(base) and os.path.exists(base / MODEL_CONFIG) and not weights_only  # out is a model's folder
    tied = [path for path in folder.modules if path.rpartition(".")[2] in (EMBEDDING, HEAD) and ties_head(weights)]
    untied = whole and bool(tied)
    others = companions(base, untied=untied) if whole else {}
    weights = with_own_head(weights) if untied else weights
    check_not_merged(weights, folder)
    changes = merged_tensors(folder, weights, layouts)
    _check_out(out, weights, adapter, whole)
    if tied:
        _warn_of_a_tied_head(weights, tied, whole)
    damaged = [] if dry_run else _write(out, weights, folder, changes, others, progress)
    if damaged:
        what = f"NaN or infinity in {len(damaged)} tensors, the first is {short(damaged[0])}"
        warnings.warn(f"{weights.path}: the base has {what}, and so has {str(out)!r}", stacklevel=2)
    return changes


def _warn_of_a_tied_head(weights: Weights, modules: list[str], whole: bool) -> None:
    """Warn that the head is no longer tied or, if only weights are written, that programs which tie it change both."""
    if whole:
        what = "So the merged model has a separate head, and its config.json no longer ties the two"
    else:
        what = (
            "A program that ties the two will change both, and its results will differ from those of the base with the "
            "adapter: merge the model's folder into a folder instead"
        )
    first, *other = map(short, modules)
    changes = f"{first} and {other[0]} separately" if other else f"only {first}"
    warnings.warn(
        f"{weights.path.parent / MODEL_CONFIG} ties head and embedding, but the adapter changes {changes}. {what}",
        stacklevel=3,
    )


# --- writing ----------------------------------------------------------------------------------------------------------


def _check_out(out: Path, weights: Weights, adapter: Path, whole: bool) -> None:
    """Require an output that destroys nothing: neither one of the inputs nor a folder with contents."""
    if weights.index is None and not whole:
        files = [(adapter / file, "a file of the adapter") for file in (CONFIG_NAME, WEIGHTS_NAME)]
        check_file("out", out, [(weights.path, "the base itself"), *files])
    else:
        check_new_folder("out", out, "the base is a model's folder" if whole else "the base has shards")


def _write(
    out: Path,
    weights: Weights,
    folder: AdapterFolder,
    changes: list[MergedTensor],
    others: Mapping[str, Path | bytes],
    progress: bool,
) -> list[str]:
    """Write the single file, or a folder of files, index and companions, which appears when it is complete.

    Return the names of the tensors with NaN or infinity.
    """
    digest, damaged = folder.file.digest(), list[str]()
    total = sum(spec.end - spec.start for file in weights.files for spec in file.tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=None if progress else True) as bar:
        if weights.index is None and not others:
            with written_whole(out) as target:
                return _write_file(weights.files[0], target, folder, digest, changes, bar)
        with written_folder(out) as part:
            for file in weights.files:
                with synced(part / file.path.name) as target:
                    damaged += _write_file(file, target, folder, digest, changes, bar)
            if weights.index is not None:
                with synced(part / weights.index.name) as target:
                    target.write(weights.index_text)
            copy_companions(others, part)
    return damaged


def _write_file(
    file: TensorFile, out: BinaryIO, folder: AdapterFolder, digest: str, changes: list[MergedTensor], bar: tqdm
) -> list[str]:
    """Copy one file, merging the tensors that change, and record the adapter's digest in the header.

    Return the names of the tensors with NaN or infinity.
    """
    damaged: list[str] = []
    changed = {change.name: change for change in changes}
    factors = lru_cache(maxsize=2)(folder.read)  # the two arrays of experts alternate
    out.write(file.header_with(MERGED_KEY, digest))
    for name in file.tensors:
        blocks = _merged(file, changed[name], factors(changed[name].module)) if name in changed else file.blocks(name)
        kind = FLOATS.get(file.tensors[name].dtype)
        for raw in blocks:
            if kind is not None and name not in damaged and not np.isfinite(raw.view(kind)).all():
                damaged.append(name)
            out.write(raw.data)
            bar.update(raw.size)
    return damaged


def _merged(file: TensorFile, change: MergedTensor, arrays: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the new bytes of a tensor, which contains one matrix, or one for each expert."""
    if change.of_experts is None:
        yield from _merged_matrix(file, change, arrays, 0)
        return
    (A, B), r, E = arrays, change.rank, change.form.experts
    size = math.prod(change.of_experts.shape) // len(change.of_experts.experts)
    for i, e in enumerate(change.of_experts.experts):
        of_expert = [A[e * r : (e + 1) * r], B[change.of_experts.rows, e::E]]  # (moe.16), (moe.17)
        yield from _merged_matrix(file, change, of_expert, i * size)


def _merged_matrix(
    file: TensorFile, change: MergedTensor, arrays: list[np.ndarray], start: int
) -> Iterator[np.ndarray]:
    """Yield the new bytes of the matrix that starts at entry `start` of the tensor, some rows at a time."""
    wide = np.result_type(FLOATS[change.dtype], np.float32)
    A, B, *magnitude = (array.astype(wide, copy=False) for array in arrays)
    transposed = change.layout == "in-out"  # each row has weights of all outputs
    left, right = (A.T, B.T) if transposed else (B, A)
    if magnitude and transposed:
        squares = (_squares(V).sum(axis=0) for _, _, V in _sums(file, change, left, right, start))
        n = np.sqrt(sum(squares))
    for rows, W, V in _sums(file, change, left, right, start):
        with np.errstate(over="ignore", invalid="ignore"):
            if magnitude and transposed:
                V = V * _row_factors(file, change, magnitude[0], n)
            elif magnitude:
                n = np.sqrt(_squares(V).sum(axis=1))  # (dora.1)
                V = V * _row_factors(file, change, magnitude[0][rows], n)[:, None]
            merged = cast(V, W.dtype)
        if (np.isfinite(W) & ~np.isfinite(merged)).any():
            what = f"the merged weight is beyond the range of {change.dtype} from row {rows.start} on"
            raise FileRefused(file.path, f"{short(change.name)}: {what}")
        yield merged.reshape(-1).view(np.uint8)


def _sums(
    file: TensorFile, change: MergedTensor, left: np.ndarray, right: np.ndarray, start: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield blocks of rows of a weight as it is stored: their slice, W, and V = W + s B A in the wide dtype."""
    columns = right.shape[1]
    height = max(1, BLOCK_BYTES // (columns * FLOATS[change.dtype].itemsize))
    for top in range(0, len(left), height):
        rows = slice(top, min(top + height, len(left)))
        W = file.numbers(change.name, start + top * columns, start + rows.stop * columns).reshape(-1, columns)
        with np.errstate(over="ignore", invalid="ignore"):
            V = W.astype(left.dtype) + (left[rows] @ right) * change.scaling
        yield rows, W, V


def _squares(V: np.ndarray) -> np.ndarray:
    """Return the squares in float64, since many of them will be summed."""
    with np.errstate(over="ignore"):
        return np.asarray(np.square(V, dtype=np.float64))


def _row_factors(file: TensorFile, change: MergedTensor, m: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Return DoRA's factors m / n for outputs whose weights have the norms n; a row of zeros stays zero."""
    if (wrong := n[~np.isfinite(n)]).size:
        what = f"the weights of an output have the norm {wrong[0]}, by which DoRA divides"
        raise FileRefused(file.path, f"{short(change.name)}: {what}")
    return np.asarray((m / divisible(n)).astype(m.dtype))  # (dora.2)
