"""NF4 weights in safetensors files, as bitsandbytes and transformers write them.

A weight X of shape (out, in) is stored in up to six tensors:

    X                                   uint8 ((n + 1) // 2, 1)     codes, two per byte
    X.quant_map                         float32 (16,)               the code book
    X.absmax                            float32 (blocks,)           the scales; their codes, uint8, if quantised too
    X.nested_absmax                     float32 (blocks / 256,)     the scales of the scales
    X.nested_quant_map                  float32 (256,)              the book of their codes
    X.quant_state.bitsandbytes__nf4     uint8                       JSON: the shape, the block sizes, the scales' mean

``quantization_config`` in ``config.json`` states that a model is quantised, and which of its linear layers are not.
Weights are dequantised in float32, whatever type the JSON names: that is the type they had before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from ...backend import backend_of
from ...files.modelfolder import HEAD
from ...files.tensors import NF4_STATE, Weights
from ...layers.nf4 import NF4, SCALES_IN_A_BLOCK, check_block_size, scale_book
from ...layers.quantized import QuantizedLinear
from ...texts import named, reading, short

NF4_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", NF4_STATE)


class State(msgspec.Struct):
    """The supported contents of a weight's JSON."""

    quant_type: Literal["nf4"]
    blocksize: int
    shape: tuple[int, int]
    nested_blocksize: Literal[256] = 256  # `SCALES_IN_A_BLOCK`
    nested_dtype: Literal["float32"] = "float32"
    nested_offset: float | None = None  # the mean of the scales, if these are quantised too
    dtype: str = "float32"  # the type that bitsandbytes dequantises to


class NF4Weights:
    """The quantised weights of a folder: their names, shapes and readers."""

    def __init__(self, path: Path, base: Weights, settings: Any) -> None:
        self.base = base
        names = [name for name in base.holder if f"{name}.{NF4_STATE}" in base.holder]
        with reading(path):
            _check_quantised_layers(base, settings, names)  # transformers follows the settings
        self.tensors = {*names, *(f"{name}.{part}" for name in names for part in NF4_PARTS)}
        self.states = {name: self._state(name) for name in names}
        self.shapes: dict[str, tuple[int, ...]] = {name: state.shape for name, state in self.states.items()}

    def read(self, name: str) -> QuantizedLinear:
        """Read one weight as a layer without a bias."""
        state, nested = self.states[name], dict[str, Any]()
        with reading(self.base.holder[name].path):
            if state.nested_offset is not None:
                nested = {"nested_absmax": self._tensor(f"{name}.nested_absmax"), "mean": state.nested_offset}
            codes, absmax = self._tensor(name), self._tensor(f"{name}.absmax")
            with named(name):
                return QuantizedLinear(codes, absmax, state.shape, block_size=state.blocksize, **nested)

    def _state(self, name: str) -> State:
        """Read a weight's JSON, and require the standard code books."""
        with reading(self.base.holder[name].path):
            with named(f"{name}.{NF4_STATE}"):
                state = msgspec.json.decode(self._tensor(f"{name}.{NF4_STATE}").tobytes(), type=State)
                check_block_size(state.blocksize)
            self._check_book(f"{name}.quant_map", NF4)
            if state.nested_offset is not None:
                self._check_book(f"{name}.nested_quant_map", scale_book())
        return state

    def _check_book(self, name: str, book: np.ndarray) -> None:
        """Require the standard code book, up to the last bit, in which libraries differ."""
        numbers = self._tensor(name)
        if numbers.shape != book.shape or not np.abs(numbers - book).max() < 1e-6:
            raise ValueError(f"{short(name)} has different numbers from bitsandbytes'")

    def _tensor(self, name: str) -> np.ndarray:
        """Return numbers, or raw bytes, as a flat array."""
        return self.base.holder[name].numbers(name)


def _check_quantised_layers(base: Weights, settings: Any, quantised: list[str]) -> None:
    """Require that settings and file agree on which linear layers are quantised."""
    if settings is None:
        if quantised:
            raise ValueError(f"{short(quantised[0])} is quantised, and there is no quantization_config")
        return
    skipped = settings.get("llm_int8_skip_modules")
    for name in base.holder:
        linear = name.removesuffix(".weight")
        if not name.endswith(("_proj.weight", f"{HEAD}.weight")):
            continue
        kept = any(
            linear == module or linear.startswith(f"{module}.") or linear.endswith(module)
            for module in ([HEAD] if skipped is None else skipped)
        )
        if kept == (name in quantised):
            says, is_so = ("not quantised", "is") if kept else ("quantised", "is not")
            raise ValueError(f"quantization_config says that {short(linear)} is {says}, but its weight {is_so}")


def nf4_tensors(name: str, layer: QuantizedLinear) -> dict[str, np.ndarray]:
    """Return the tensors of a layer's weight, in bitsandbytes' order."""

    def host(array: Any) -> np.ndarray:
        return backend_of(array).to_numpy(array)

    state: dict[str, Any] = {
        "quant_type": "nf4", "blocksize": layer.block_size, "dtype": "float32", "shape": list(layer.shape),
    }  # fmt: skip
    tensors = {name: host(layer.packed)[:, None], f"{name}.absmax": host(layer.absmax), f"{name}.quant_map": NF4}
    if layer.nested_absmax is not None:
        tensors |= {f"{name}.nested_absmax": host(layer.nested_absmax), f"{name}.nested_quant_map": scale_book()}
        state |= {
            "nested_blocksize": SCALES_IN_A_BLOCK, "nested_dtype": "float32", "nested_offset": layer.mean,
        }  # fmt: skip
    return tensors | {f"{name}.{NF4_STATE}": np.frombuffer(json.dumps(state).encode(), np.uint8)}


def quantization_config(layers: Mapping[str, bool]) -> dict[str, Any] | None:
    """Return config.json's entry, given whether each layer is quantised by path; None if none is."""
    if not any(layers.values()):
        return None
    unquantised = [path for path, quantised in layers.items() if not quantised]
    usual = unquantised == [HEAD] or (not unquantised and HEAD not in layers)  # a tied head needs no entry
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": None if usual else unquantised if HEAD in layers else [*unquantised, HEAD],
    }
