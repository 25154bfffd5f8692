"""NF4: weights in four bits, as in the base of QLoRA.

Four bits tell 16 numbers apart. Which 16? A trained weight matrix looks like draws from a normal distribution, so the
numbers are chosen such that each stands for about as many weights as any other: quantiles of the normal distribution.

THE CODE BOOK. Let Phi^-1(p) be the number below which a share p of the normal distribution lies. The largest quantile
cannot be at p = 1, which is infinite. With n levels each stands for a share of 1/n, and its middle is half of that from
the end: 1 - 1/(2n). One side has 8 levels besides 0 and the other 7, so n is 16 for the one and 15 for the other, and
the end is put between the two:

    p_1 = 1 - (1/32 + 1/30) / 2 = 0.9677083                                                        (nf.1)

From there to the middle, 1/2, the shares fall in even steps, 8 of them above 0 and 7 below:

    positive   Phi^-1(p_1 + i/8 (1/2 - p_1))       i = 0 ... 7         8 numbers
    negative   -Phi^-1(p_1 + i/7 (1/2 - p_1))      i = 0 ... 6         7 numbers                   (nf.2)

With 0, that makes 16. Divided by the largest, they are c_0 = -1 to c_15 = 1, and c_7 = 0: a weight of 0 stays 0.

BLOCKS. The weights, read row by row, are cut into blocks of 64. Each block b has a scale of its own, so that one large
weight spoils 63 others and no more:

    a_b = max |w_j|                        over the block               (nf.3)
    q_j = the k with c_k nearest w_j / a_b                              (nf.4)
    w'_j = a_b c_q                         with q = q_j                 (nf.5)

Two codes share a byte, the earlier one in the high half: 16 q_0 + q_1      (nf.6)

A block's largest weight is always c_0 or c_15, whatever the distribution. So after the scaling the weights are no
longer normal, and NF4 is not the best book of 16 numbers: Yoshida, "NF4 Isn't Information Theoretically Optimal (and
that's Good)", arXiv 2306.06965.

DOUBLE QUANTISATION. The scales take 32 bits for 64 weights, half a bit each. They are alike, so they are quantised too,
in blocks B of 256 and to 8 bits. All are positive: their mean m is taken off first, once for the whole matrix.

    n_B = max |a_b - m|                    over 256 scales              (nf.7)
    t_b = the k with d_k nearest (a_b - m) / n_B                        (nf.8)
    a'_b = n_B d_t + m                     with t = t_b                 (nf.9)

The 256 numbers d_k are those of the library bitsandbytes: 0, 1, and for seven powers of ten 1, 2, 4 ... 64 numbers of
either sign, so that small numbers are told apart as well as large ones. The paper says FP8 there; the library does not
use it.

    bits a weight      4 + 32/64 = 4.5      or, with double quantisation,      4 + 8/64 + 32/(64 * 256) = 4.127

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3 and equation 5;
the format is that of bitsandbytes, byte for byte.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np

from ..backend import backend_of, check_finite
from ..checks import (
    Array,
    check_array,
    check_float_dtype,
    check_integer,
    check_kind,
    check_library,
    check_not_empty,
    check_shape,
    dtype_name,
)

NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
"""The published code book, (16,) float32, which files require. `code_book` derives it up to 2e-7."""

SCALES_IN_A_BLOCK = 256


def code_book(levels: int = 16) -> list[float]:
    """Derive a code book from -1 to 1 from the normal distribution, with any even number of levels.

    Fewer than 4 levels, or an odd number, are a ValueError.
    """
    levels = check_integer("levels", levels, at_least=4)
    if levels % 2:
        raise ValueError(f"levels must be even, got {levels}")
    n, quantile = levels, NormalDist().inv_cdf
    p_1 = 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2  # eq. (nf.1)

    def side(m: int) -> list[float]:
        return [quantile(p_1 + i / m * (1 / 2 - p_1)) for i in range(m)]  # eq. (nf.2)

    above, below = side(n // 2), side(n // 2 - 1)
    return [c / above[0] for c in (*(-c for c in below), 0.0, *reversed(above))]


def quantize_nf4(weight: Array, *, block_size: int = 64) -> tuple[Array, Array]:
    """Return a weight's codes, two per byte, and the scale of each block.

    Parameters
    ----------
    weight : array of any shape, float
        Read row by row, and rounded to float32 first.
    block_size : int
        Weights that share a scale: a power of two, 32 or more. The last block may be shorter.

    Returns
    -------
    packed : array, shape ((n + 1) // 2,), uint8
        Of n weights. Where n is odd, the last byte ends in the code of 0.
    absmax : array, shape (ceil(n / block_size),), float32
        The scales. A block whose scale is 0, or below float32's smallest normal number, has the codes of 0 alone.

    Raises
    ------
    ValueError, TypeError
        If the weight is empty, no float array, or holds what float32 cannot, or `block_size` is another number.
    """
    check_array("weight", weight)
    check_float_dtype("weight's dtype", weight.dtype)
    count, block_size = check_not_empty("weight", weight), check_block_size(block_size)
    with np.errstate(over="ignore"):
        flat = weight.astype("float32").reshape(-1)
    check_finite(weight=flat)
    blocks = _in_blocks(flat, min(block_size, count + count % 2))
    absmax = abs(blocks).max(axis=1)  # eq. (nf.3)
    codes = _nearest(_BETWEEN, _scaled(blocks, absmax, shorter=count % block_size > 0))  # eq. (nf.4)
    packed = 16 * codes[0::2] + codes[1::2]  # eq. (nf.6)
    return packed[: (count + 1) // 2], absmax


def dequantize_nf4(
    packed: Array, absmax: Array, shape: tuple[int, ...], *, block_size: int = 64, dtype: Any = "float32"
) -> Array:
    """Return the weight with these codes and scales.

    Parameters
    ----------
    packed, absmax : array
        As `quantize_nf4` returns them.
    shape : tuple of int
        Of the weight.
    block_size : int
        As it was quantised with.
    dtype : {"float32", "float64", "float16"}
        What the products, which are taken in float32, become.

    Returns
    -------
    array of that shape and dtype
        A new one.

    Raises
    ------
    ValueError, TypeError
        If the arrays are not those of such a weight.
    """
    n, block_size = math.prod(shape), check_block_size(block_size)
    check_float_dtype("dtype", dtype)
    check_stored("packed", packed, "uint8", (n + 1) // 2, like=packed)
    check_stored("absmax", absmax, "float32", -(-n // block_size), like=packed)
    xp, size = backend_of(packed).xp, min(block_size, n + n % 2)
    missing = absmax.shape[0] * size // 2 - packed.shape[0]
    if missing:  # the last block is shorter
        packed = xp.concatenate([packed, xp.zeros(missing, dtype="uint8")])
    c = xp.take(_pairs(xp), packed).view("float32").reshape(-1, size)
    w = c * absmax[:, None]  # eq. (nf.5)
    return w.reshape(-1)[:n].reshape(shape).astype(dtype, copy=False)


def quantize_scales(absmax: Array) -> tuple[Array, Array, float]:
    """Return the scales' codes (blocks,) uint8, the float32 scale of each 256 of them, and their mean."""
    m = absmax.mean()
    blocks = _in_blocks(absmax - m, SCALES_IN_A_BLOCK)
    n = abs(blocks).max(axis=1)  # eq. (nf.7)
    codes = _nearest(_BETWEEN_SCALES, _scaled(blocks, n, shorter=False))  # eq. (nf.8)
    return codes[: absmax.shape[0]], n, float(m)


def dequantize_scales(codes: Array, nested_absmax: Array, mean: float) -> Array:
    """Return the scales (blocks,) float32 from the result of `quantize_scales`."""
    xp = backend_of(codes).xp
    d = xp.take(_scale_codes(xp), codes)
    n = xp.repeat(nested_absmax, SCALES_IN_A_BLOCK)[: codes.shape[0]]
    return n * d + np.float32(mean).item()  # eq. (nf.9)


def scale_book() -> np.ndarray:  # -> (256,) float32
    """Return the 256 numbers d_k in order: the midpoints of 2^i equal steps from 0.1 to 1, times 10^(i - 6).

    Each step is rounded as torch's ``linspace`` does it, half of them counted from either end, so that the numbers are
    those of bitsandbytes to the last bit.
    """
    levels, low = [0.0, 1.0], np.float32(0.1)
    for i in range(7):
        k, step = np.arange(2**i + 1), float(1 - low) / 2**i
        edges = np.where(2 * k < 2**i, low + step * k, 1 - step * (2**i - k)).astype("float32")
        middles = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / 2)
        levels += [*middles, *-middles]
    return np.array(sorted(levels), np.float32)


_BETWEEN = (NF4[:-1] + NF4[1:]) / 2
_SCALE_BOOK = scale_book()
_BETWEEN_SCALES = (_SCALE_BOOK[:-1] + _SCALE_BOOK[1:]) / 2
"""The midpoints between neighbours: numbers below the first have the first code, and so on; a tie takes the lower."""


@cache
def _pairs(xp: Any) -> Array:  # -> (256,) complex64
    """Return each byte's two weights as one complex number, so that one look-up finds both."""
    byte = np.arange(256)
    return xp.asarray(np.stack([NF4[byte >> 4], NF4[byte & 15]], axis=1).view("complex64").ravel())


@cache
def _scale_codes(xp: Any) -> Array:
    return xp.asarray(_SCALE_BOOK)


def _nearest(between: np.ndarray, numbers: Array) -> Array:  # -> (n,) uint8
    """Return the index of the nearest of the sorted numbers with midpoints `between`."""
    xp = backend_of(numbers).xp
    return xp.searchsorted(xp.asarray(between), numbers.reshape(-1)).astype("uint8")


def _in_blocks(flat: Array, size: int) -> Array:  # (n,) -> (ceil(n / size), size)
    """Return the numbers in rows of one size, the last one padded with zeros."""
    xp, missing = backend_of(flat).xp, -flat.shape[0] % size
    padded = xp.concatenate([flat, xp.zeros(missing, dtype=flat.dtype)]) if missing else flat
    return padded.reshape(-1, size)


def _scaled(blocks: Array, largest: Array, *, shorter: bool) -> Array:
    """Return each row divided by its largest magnitude; like bitsandbytes, full blocks multiply by its inverse."""
    xp = backend_of(blocks).xp
    safe = xp.where(largest < np.finfo(np.float32).tiny, 1, largest).astype("float32")[:, None]
    scaled = blocks * (1 / safe)
    if shorter:
        scaled[-1] = blocks[-1] / safe[-1]
    return scaled


def check_block_size(value: Any) -> int:
    """Return a block size as an int: a power of two, at least 32, so that a block is whole bytes."""
    size = check_integer("block_size", value, at_least=32)
    if size & (size - 1):
        raise ValueError(f"block_size must be a power of two, got {size}")
    return size


def check_stored(name: str, value: Any, dtype: str, count: int, like: Array) -> None:
    """Require an array (count,) with this dtype and the library of `like`; NumPy would broadcast a shorter one."""
    check_kind(name, value)
    check_library(name, value, like, "packed")
    if dtype_name(value) != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}, expected {dtype}")
    check_shape(name, value, (count,))
