"""Three quantised types of .gguf files: how their blocks become numbers, and a layer that keeps them as they are.

A row of a weight is cut into blocks of 32 numbers. A block of bytes holds a scale d, in some types a smallest value m,
both float16, and 32 codes q:

    type    bytes    in this order                        a weight
    Q4_0    18       d, 16 bytes of codes                 d (q - 8)      q from 0 to 15
    Q4_1    20       d, m, 16 bytes of codes              d q + m        q from 0 to 15
    Q8_0    34       d, 32 bytes of codes                 d q            q from -128 to 127

Of the 16 bytes, the low halves are the first 16 codes and the high halves the last 16. Unlike NF4's, the steps between
codes are all of one size. Sums and products are taken in float32.

Source: the types are llama.cpp's; the decoder is held against the package `gguf`, bit for bit.
"""

from __future__ import annotations

from typing import Any

from ....backend import backend_of
from ....checks import Array, check_choice, check_float_dtype, check_kind, dtype_name
from ....layers.quantized import CodedLinear

WIDTH = 32
"""Numbers in a block."""
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
"""Bytes of a block, by type."""


def decode(kind: str, data: Array) -> Array:  # (..., bytes) uint8 -> (..., n) float32
    """Return the numbers that blocks stand for.

    Parameters
    ----------
    kind : {"Q4_0", "Q4_1", "Q8_0"}
        Their type.
    data : array of uint8
        Whole blocks along the last axis.

    Returns
    -------
    array of float32
        With 32 numbers for each block on the last axis.

    Raises
    ------
    ValueError, TypeError
        If the type is another, or the array does not hold whole blocks of bytes.
    """
    _check_blocks(kind, data)
    xp, blocks = backend_of(data).xp, data.reshape(-1, BYTES[kind])

    def halves(start: int) -> Array:  # -> (blocks, 1) float32
        return xp.ascontiguousarray(blocks[:, start : start + 2]).view("float16").astype("float32")

    d = halves(0)
    if kind == "Q8_0":
        w = d * xp.ascontiguousarray(blocks[:, 2:]).view("int8").astype("float32")
    else:
        codes = blocks[:, -16:]
        q = xp.concatenate([codes % 16, codes // 16], axis=1).astype("float32")
        w = d * (q - 8) if kind == "Q4_0" else d * q + halves(2)
    return w.reshape(*data.shape[:-1], data.shape[-1] // BYTES[kind] * WIDTH)


class BlockLinear(CodedLinear):
    """A frozen linear layer that keeps the blocks of a .gguf file. It keeps the array that it is given.

    An array that does not hold whole blocks is a ValueError or a TypeError.
    """

    def __init__(self, kind: str, blocks: Array, bias: Array | None = None, *, dtype: Any = "float32") -> None:
        """Keep the blocks (out, bytes) of a weight (out, in); the layer computes in `dtype`."""
        check_float_dtype("dtype", dtype)
        _check_blocks(kind, blocks)
        if len(blocks.shape) != 2:
            raise ValueError(f"blocks has shape {tuple(blocks.shape)}, expected (out, bytes)")
        width = blocks.shape[1] // BYTES[kind] * WIDTH
        super().__init__(backend_of(blocks).zeros((0,), dtype), (blocks.shape[0], width), bias)
        self.kind, self.blocks = kind, blocks

    @property
    def weight(self) -> Array:  # -> (out, in)
        """The weight, made anew each time it is asked for."""
        return decode(self.kind, self.blocks).astype(self.like.dtype, copy=False)


def _check_blocks(kind: Any, data: Any) -> None:
    """Refuse what does not hold whole blocks of bytes on its last axis."""
    check_choice("kind", kind, BYTES)
    check_kind("data", data)
    if dtype_name(data) != "uint8":
        raise TypeError(f"data has dtype {data.dtype}, expected uint8")
    if not data.shape or data.shape[-1] % BYTES[kind]:
        raise ValueError(f"data has shape {tuple(data.shape)}, expected blocks of {BYTES[kind]} bytes on its last axis")
