"""NF4 weights in a safetensors file, as bitsandbytes and transformers write them.

A weight X of shape (out, in) is up to six tensors:

    X                                   uint8 ((n + 1) // 2, 1)     codes, two in a byte
    X.quant_map                         float32 (16,)               the code book
    X.absmax                            float32 (blocks,)           the scales; quantised too, their codes, uint8
    X.nested_absmax                     float32 (blocks / 256,)     the scales of the scales
    X.nested_quant_map                  float32 (256,)              the book of their codes
    X.quant_state.bitsandbytes__nf4     uint8                       JSON: the shape, the block sizes, the scales' mean

``config.json`` says with ``quantization_config`` that a model is quantised, and which of its linear layers are not.
Weights are dequantised in float32, whatever type the JSON names: that is the type they had before.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ....backend import backend_of
from ....checks import FileRefused, check_number, check_sizes, short
from ....files.base.shards import NF4_STATE, Base
from ....files.base.tiedhead import HEAD
from ....guards.inputfiles import parse_json
from ....layers.nf4 import NF4, SCALES_IN_A_BLOCK, check_block_size, scale_book
from ....layers.quantized import QuantizedLinear
from ..supportedsettings import QUANTIZATION, check_settings

MAX_STATE = 1 << 16
"""Bytes of JSON beside a weight that we agree to parse; there are some 200."""
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", NF4_STATE)


class NF4Weights:
    """The quantised weights of a checkpoint: which they are, of which shape, and how one is read.

    Raises
    ------
    FileRefused
        If one is not as bitsandbytes writes it, or `settings`, the model's ``quantization_config``, says otherwise.
    """

    def __init__(self, path: Path, base: Base, settings: Any, linears: Iterable[str]) -> None:
        self.base = base
        names = [name for name in base.holder if f"{name}.{NF4_STATE}" in base.holder]
        self.parts = {f"{name}.{part}" for name in names for part in PARTS} & base.holder.keys()
        _check_said(path, settings, names, linears)
        self.states = {name: self._state(name) for name in names}
        self.shapes: dict[str, tuple[int, ...]] = {name: state["shape"] for name, state in self.states.items()}

    def read(self, name: str, dtype: Any) -> QuantizedLinear:
        """Return one weight as a layer without a bias, which computes in `dtype`."""
        state, absmax = self.states[name], f"{name}.absmax"
        nested: dict[str, Any] = {}
        if "nested_offset" in state:
            nested = {"nested_absmax": self._floats(f"{name}.nested_absmax"), "mean": state["nested_offset"]}
        scales = self._bytes(absmax) if nested else self._floats(absmax)
        return QuantizedLinear(
            self._bytes(name), scales, state["shape"], block_size=state["blocksize"], dtype=dtype, **nested
        )

    def _state(self, name: str) -> dict[str, Any]:
        """Return what the JSON beside a weight says; refuse tensors that are not those that it speaks of."""
        path, key = self.base.holder[name].path, f"{name}.{NF4_STATE}"
        self._check(key, "U8", None)
        size = math.prod(self.base.spec(key).shape)
        if size > MAX_STATE:
            raise FileRefused(path, f"{short(key)} has {size} bytes, expected at most {MAX_STATE}")
        record = parse_json(path, self._bytes(key).tobytes(), f"text {short(key)}")
        try:
            if record["quant_type"] != "nf4":
                raise ValueError(f"quant_type is {short(record['quant_type'])}, supported: 'nf4'")
            if not isinstance(record["shape"], list) or len(record["shape"]) != 2:
                raise ValueError(f"shape is {short(record['shape'])}, expected two sizes")
            shape = tuple(check_sizes(out_features=record["shape"][0], in_features=record["shape"][1]))
            state: dict[str, Any] = {"shape": shape, "blocksize": check_block_size(record["blocksize"])}
            if "nested_offset" in record:
                for setting, only in (("nested_blocksize", SCALES_IN_A_BLOCK), ("nested_dtype", "float32")):
                    if record[setting] != only:
                        raise ValueError(f"{setting} is {short(record[setting])}, supported: {only!r}")
                state["nested_offset"] = check_number("nested_offset", record["nested_offset"], above=-math.inf)
        except (KeyError, ValueError, TypeError) as error:
            reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise FileRefused(path, f"{short(key)}: {reason}") from error
        n, nested = math.prod(shape), "nested_offset" in state
        blocks = -(-n // state["blocksize"])
        self._check(name, "U8", ((n + 1) // 2, 1))
        self._check(f"{name}.absmax", "U8" if nested else "F32", (blocks,))
        self._check_book(f"{name}.quant_map", NF4)
        if nested:
            self._check(f"{name}.nested_absmax", "F32", (-(-blocks // SCALES_IN_A_BLOCK),))
            self._check_book(f"{name}.nested_quant_map", scale_book())
        return state

    def _check(self, name: str, dtype: str, shape: tuple[int, ...] | None) -> None:
        """Refuse a tensor that is missing, or of another type or shape."""
        if name not in self.base.holder:
            raise FileRefused(self.base.path, f"there is no {short(name)}, which an NF4 weight needs")
        spec, path = self.base.spec(name), self.base.holder[name].path
        if spec.dtype != dtype or (shape is not None and spec.shape != shape):
            expected = dtype if shape is None else f"{dtype} {list(shape)}"
            raise FileRefused(path, f"{short(name)} is {spec.dtype} {list(spec.shape)}, expected {expected}")

    def _check_book(self, name: str, book: np.ndarray) -> None:
        """Refuse a code book that is not the one we decode with; libraries differ in its last bit."""
        self._check(name, "F32", book.shape)
        if not np.abs(self._floats(name) - book).max() < 1e-6:
            raise FileRefused(
                self.base.holder[name].path, f"{short(name)} holds other numbers than bitsandbytes writes"
            )

    def _bytes(self, name: str) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.uint8), *self.base.holder[name].blocks(name)])

    def _floats(self, name: str) -> np.ndarray:
        return self._bytes(name).view("<f4").astype("float32", copy=False)


def check_quantization(path: Path, settings: Any) -> None:
    """Refuse a ``quantization_config`` of another method, or with other settings than are supported."""
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        raise FileRefused(path, f"quantization_config is {short(settings)}, expected an object")
    check_settings(path, QUANTIZATION, {f"quantization_config.{key}": value for key, value in settings.items()})
    skipped = settings.get("llm_int8_skip_modules", [])
    if skipped is not None and not (
        isinstance(skipped, list) and all(isinstance(s, str) and re.fullmatch(r"[\w.]+", s) for s in skipped)
    ):
        raise FileRefused(
            path, f"quantization_config.llm_int8_skip_modules is {short(skipped)}, supported: a list of modules' names"
        )


def _check_said(path: Path, settings: Any, names: list[str], linears: Iterable[str]) -> None:
    """Refuse settings that say otherwise than the file which linear layers are quantised."""
    if settings is None:
        if names:
            raise FileRefused(path, f"there is no quantization_config, and {short(names[0])} is quantised")
        return
    skipped = settings.get("llm_int8_skip_modules")
    skipped = [HEAD] if skipped is None else skipped
    for linear in linears:
        unquantised = any(linear == s or linear.startswith(f"{s}.") or linear.endswith(s) for s in skipped)
        if unquantised == (f"{linear}.weight" in names):
            says, is_so = ("not quantised", "is") if unquantised else ("quantised", "is not")
            raise FileRefused(
                path, f"by its quantization_config {short(linear)} is {says}, and in the file its weight {is_so}"
            )


def nf4_tensors(name: str, layer: QuantizedLinear) -> dict[str, np.ndarray]:
    """Return the tensors of a layer's weight, in the order in which bitsandbytes names them."""

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
    """Return what config.json says of linear layers, by path whether each is quantised; None where none is."""
    if not any(layers.values()):
        return None
    unquantised = [path for path, quantised in layers.items() if not quantised]
    usual = unquantised == [HEAD] or (not unquantised and HEAD not in layers)  # a tied head is kept without a word
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
