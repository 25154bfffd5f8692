"""Frozen linear layers with a quantised weight, such as the base of QLoRA.

The layer computes as `Linear` does, by (7) and (10). It keeps bytes and scales, and makes W from them in each forward
and once more in each backward; between the two no W is kept. W is made whole: on widths from 576 to 4096, some rows of
it at a time took longer.

There is no dW. A code is one of 16, so the loss is a staircase in it: its slope is 0 or does not exist. Nobody misses
dW: the base is frozen, and an adapter's gradients, (3) to (5) of `minilora.lora`, need x, dy and the factors alone. W
acts on them only through y above and through dx below, and both are exact for the W that is there. What four bits lose
was lost when the weight was quantised, and the adapter learns beside that.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3 and equation 5.
"""

from __future__ import annotations

import math
from copy import copy
from typing import Any

from ..backend import backend_of
from ..checks import Array, check_array, check_flag, check_float_dtype, check_instance, check_number, check_shape
from ..linear import Linear
from .nf4 import (
    SCALES_IN_A_BLOCK,
    check_block_size,
    check_stored,
    dequantize_nf4,
    dequantize_scales,
    quantize_nf4,
    quantize_scales,
)


class FrozenQuantizedLinear(Linear):
    """A frozen linear layer that stores codes instead of its weight. A subclass decodes them."""

    like: Array  # (0,), in the dtype and the library that the layer computes in
    bias: Array | None = None  # (out,), of that dtype
    shape: tuple[int, ...] = ()  # (out, in), the weight's

    def __init__(self, like: Array, shape: tuple[int, ...], bias: Array | None) -> None:
        self.like, self.shape = like, tuple(shape)
        if len(self.shape) != 2:
            raise ValueError(f"shape is {self.shape}, expected (out, in)")
        if bias is not None:
            check_array("bias", bias, like=like)
            check_shape("bias", bias, self.shape[:1])
        self.bias = bias

    @property
    def weight(self) -> Array:  # -> (out, in)
        """The weight, decoded at each access."""
        raise NotImplementedError

    @property
    def frozen(self) -> bool:
        """Always True, since codes have no gradient."""
        return True

    @frozen.setter
    def frozen(self, value: bool) -> None:
        if not value:
            raise ValueError(f"a {type(self).__name__} cannot train: put an adapter beside it, or dequantize() it")

    def trainable(self) -> dict[str, Array]:
        """Return an empty dict."""
        return {}

    def parameter_counts(self) -> dict[int, int]:
        """Return the parameter counts of weight and bias, not the number of stored codes."""
        return {id(self): math.prod(self.shape)} | ({} if self.bias is None else {id(self.bias): self.bias.size})

    def with_bias(self, bias: Array | None) -> FrozenQuantizedLinear:
        """Return the same layer with another bias; the codes are shared."""
        new = copy(self)
        FrozenQuantizedLinear.__init__(new, self.like, self.shape, bias)
        return new

    def encode(self, linear: Linear) -> FrozenQuantizedLinear:
        """Return another layer quantised in this layer's format."""
        raise ValueError(f"a {type(self).__name__} is read from files, and nothing is written in its format")

    def dequantize(self) -> Linear:
        """Return a new `Linear` with the decoded weight. Nothing is shared."""
        return Linear(self.weight, None if self.bias is None else self.bias.copy())


CodedLinear = FrozenQuantizedLinear
"""The name in the fifth edition."""


class QuantizedLinear(FrozenQuantizedLinear):
    """A frozen linear layer in NF4. It stores the given arrays without copying."""

    def __init__(
        self, packed: Array, absmax: Array, shape: tuple[int, ...], bias: Array | None = None, *, block_size: int = 64,
        nested_absmax: Array | None = None, mean: float = 0.0, dtype: Any = "float32",
    ) -> None:  # fmt: skip
        """Take codes (`packed`), two per byte, and scales.

        `absmax` are the scales in float32; with `nested_absmax` and `mean` their codes, as `quantize_scales` returns
        the three. `dtype` is what the layer computes in.
        """
        check_float_dtype("dtype", dtype)
        n, self.block_size = math.prod(shape), check_block_size(block_size)
        blocks = -(-n // self.block_size)
        check_stored("packed", packed, "uint8", (n + 1) // 2, like=packed)
        check_stored("absmax", absmax, "float32" if nested_absmax is None else "uint8", blocks, like=packed)
        if nested_absmax is not None:
            check_stored("nested_absmax", nested_absmax, "float32", -(-blocks // SCALES_IN_A_BLOCK), like=packed)
        super().__init__(backend_of(packed).zeros((0,), dtype), shape, bias)
        self.packed, self.absmax, self.nested_absmax = packed, absmax, nested_absmax
        self.mean = check_number("mean", mean, above=-math.inf)

    @property
    def weight(self) -> Array:  # -> (out, in)
        """The weight, decoded at each access."""
        absmax = self.absmax
        if self.nested_absmax is not None:
            absmax = dequantize_scales(absmax, self.nested_absmax, self.mean)
        return dequantize_nf4(self.packed, absmax, self.shape, block_size=self.block_size, dtype=self.like.dtype)

    def encode(self, linear: Linear) -> QuantizedLinear:
        """Return another layer in NF4, with this layer's block size and quantisation of scales."""
        return self.from_linear(linear, block_size=self.block_size, double_quant=self.nested_absmax is not None)

    @classmethod
    def from_linear(cls, linear: Linear, *, block_size: int = 64, double_quant: bool = True) -> QuantizedLinear:
        """Quantise a trained layer, which does not change. The bias is shared; dtype and library stay the same.

        `block_size` is as in `quantize_nf4`, with the same errors; `double_quant` says whether the scales are quantised
        too. A layer that is quantised already is a ValueError.
        """
        check_instance("linear", linear, Linear)
        if isinstance(linear, FrozenQuantizedLinear):
            raise ValueError("linear is quantised already: dequantize() it first")
        double_quant = check_flag("double_quant", double_quant)
        packed, absmax = quantize_nf4(linear.weight, block_size=block_size)
        nested: dict[str, Any] = {}
        if double_quant:
            absmax, nested["nested_absmax"], nested["mean"] = quantize_scales(absmax)
        dtype = linear.weight.dtype
        return cls(packed, absmax, linear.shape, linear.bias, block_size=block_size, dtype=dtype, **nested)
