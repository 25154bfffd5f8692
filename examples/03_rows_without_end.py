"""The best adapter for more rows than fit into memory, in one pass.

    python examples/03_rows_without_end.py
    python examples/03_rows_without_end.py --rows 20000000

Training sees its rows again and again. The closed form needs them once: it uses only X^T X, X^T R and the sum of R^2
over all rows, where R is the residual of the frozen base. These are sums over rows, so blocks of rows can be added up
on any machine and in any order. Here Dask does it (pip install 'dask[array]'); the same lines run on a cluster once you
create a `dask.distributed.Client`. Rows may also come from files: use `dask.array.from_zarr`, or
`dask.array.from_array` with a `numpy.memmap`.
"""

import argparse
import resource
import sys
from typing import NamedTuple

import dask
import dask.array as da
import numpy as np

from minilora import Linear, LoRA
from minilora.verify.closed_form import best_adapter_from_gram


class Best(NamedTuple):
    adapter: LoRA
    loss_before: float
    loss: float


def best_in_one_pass(base: Linear, X: da.Array, Y: da.Array, *, rank: int) -> Best:
    """Return the adapter that gives `base` the lowest mean squared error, and the loss without and with it."""
    R = da.map_blocks(lambda x, y: y - base(x), X, Y, dtype=Y.dtype, chunks=Y.chunks)
    XtX, XtR, sum_R2 = dask.compute(X.T @ X, X.T @ R, (R * R).sum())  # one pass: each block is created, used and freed

    adapter = best_adapter_from_gram(XtX, XtR, rank=rank)
    # With D the adapter's weight change, expanding |R - X D^T|^2 gives the loss without a second pass.
    D = adapter.delta()
    sum_error2 = sum_R2 - 2 * np.sum(XtR.T * D) + np.sum(D @ XtX * D)
    return Best(adapter, float(sum_R2 / Y.size), float(sum_error2 / Y.size))


def simulate(rows: int, rows_in_a_block: int, in_features: int, out_features: int, rank: int):
    """Return a base layer, the weight change that the new task requires, and lazy arrays of the task's rows."""
    rng = np.random.default_rng(0)
    base = Linear.init(in_features, out_features, bias=True, rng=rng, dtype="float64")
    change = rng.standard_normal((out_features, rank)) @ rng.standard_normal((rank, in_features)) / in_features**0.5
    block_rng = da.random.default_rng(1)
    X = block_rng.standard_normal((rows, in_features), chunks=(rows_in_a_block, in_features))
    noise = block_rng.standard_normal((rows, out_features), chunks=(rows_in_a_block, out_features))
    Y = da.map_blocks(lambda x, e: base(x) + x @ change.T + e, X, noise, dtype=X.dtype, chunks=noise.chunks)
    return base, change, X, Y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--rows-in-a-block", type=int, default=10_000)
    parser.add_argument("--rank", type=int, default=4)
    arguments = parser.parse_args()

    base, change, X, Y = simulate(arguments.rows, arguments.rows_in_a_block, 128, 96, arguments.rank)
    before = peak_megabytes()
    best = best_in_one_pass(base, X, Y, rank=arguments.rank)
    error = np.linalg.norm(best.adapter.delta() - change) / np.linalg.norm(change)

    print(f"rows            {len(X):,} in {X.numblocks[0]} blocks, {(X.nbytes + Y.nbytes) / 1e6:,.0f} MB")
    print(f"memory          {peak_megabytes() - before:,.0f} MB more than before the pass")
    print(f"loss, base      {best.loss_before:.6f}")
    print(f"loss, adapter   {best.loss:.6f}   (the noise in the targets has variance 1)")
    print(f"weight change   learned to within {error:.2%}")


def peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


if __name__ == "__main__":
    main()
