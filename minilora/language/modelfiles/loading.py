"""The weights of a Llama decoder, from the files in which they come.

    a folder     config.json and model.safetensors, or its shards with model.safetensors.index.json: Hugging Face's
                 layout. F32, F16, BF16, and bitsandbytes' NF4, which stays as it is; `huggingface`
    name.gguf    llama.cpp's format, quantised or not, through the `gguf` package; `ggufreader`
    name.npz     glassllm's own format; `npzreader`

Each of the three says which decoder it is, which arrays the file holds, under transformers' names, and how one is read.
Mistral and Qwen2 are such decoders too, see `llamaconfig`. What is common stands here: the arrays must
be those of the decoder before the first of them is read, and each must hold numbers. No tokenizer is needed, and
nothing in a file is executed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...backend import Backend, backend_or_numpy
from ...checks import Array, FileRefused, check_flag, check_path, short
from ...guards.inputfiles import open_regular
from ...guards.tensorfile import in_dtype
from ...layer import rebuild
from ...layers.quantized import CodedLinear
from ..llamaconfig import LlamaConfig
from .gguf.ggufreader import open_gguf
from .huggingface.folderreader import Coded, open_folder
from .npzreader import open_npz

OPENERS = {".gguf": open_gguf, ".npz": open_npz}
DTYPES = ("float32", "float64")


def read_llama(
    path: str | Path, *, dtype: Any = "float32", backend: Backend | None = None, keep_blocks: bool = False
) -> tuple[LlamaConfig, dict[str, Array | CodedLinear]]:
    """Return what decoder a file holds, and its arrays under transformers' names.

    Parameters
    ----------
    path : path
        A folder of Hugging Face's layout, a .gguf file, or a .npz file of glassllm's.
    dtype : {"float32", "float64"}
        What the weights become. Half types are widened exactly.
    backend : Backend, optional
        Where the arrays live; NumPy by default.
    keep_blocks : bool
        Whether linear layers of a .gguf file stay quantised, where their type is Q4_0, Q4_1 or Q8_0.

    Returns
    -------
    config : LlamaConfig
        Its sizes.
    arrays : dict of str to array
        As `LlamaConfig.shapes` lists them, for `minilora.Llama.build`. A weight that stays quantised is a layer.

    Raises
    ------
    ValueError
        If the file is damaged, the model is not a Llama decoder, or has a setting that is not supported; the message
        names it. No weight has been read then, unless the damage is in the weights.
    """
    backend, keep_blocks = backend_or_numpy(backend), check_flag("keep_blocks", keep_blocks)
    if str(dtype) not in DTYPES and getattr(dtype, "__name__", "") not in DTYPES:
        raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}")
    config, read = open_llama(path, keep_blocks=keep_blocks)
    path, shapes = Path(path), config.shapes()
    arrays: dict[str, Array | CodedLinear] = {}
    for name in shapes:
        host = read(name)
        if callable(host):  # it stays quantised
            layer = host(dtype)
            with np.errstate(all="ignore"):
                if not np.isfinite(layer.weight).all():
                    raise FileRefused(path, f"{short(name)} holds NaN or infinity")
            arrays[name] = rebuild(layer, array=backend.asarray)
            continue
        if host.dtype.kind != "f":
            raise FileRefused(path, f"{short(name)} has dtype {host.dtype}, expected a floating-point type")
        if not np.isfinite(host).all():
            raise FileRefused(path, f"{short(name)} holds NaN or infinity")
        arrays[name] = backend.asarray(in_dtype(host, dtype, path, f"{short(name)} reaches"))
    return config, arrays


def open_llama(
    path: str | Path, *, keep_blocks: bool = False
) -> tuple[LlamaConfig, Callable[[str], np.ndarray | Coded]]:
    """Return what decoder a file holds, and how one of its arrays is read; no weight has been read then.

    What is refused is a ValueError, as in `read_llama`.
    """
    path = check_path("path", path)
    if os.path.isdir(path):
        opener: Any = open_folder
    else:
        open_regular(path).close()
        if path.suffix not in OPENERS:
            raise FileRefused(path, "expected a folder with config.json, a .gguf file or a .npz file")
        opener = OPENERS[path.suffix]
    config, shapes, read = opener(path, keep_blocks=True) if keep_blocks and opener is open_gguf else opener(path)
    if config.num_hidden_layers > len(shapes):  # before that many names are made
        raise FileRefused(path, f"{config.num_hidden_layers} layers, and {len(shapes)} arrays in all")
    _check_shapes(path, shapes, config.shapes())
    return config, read


def _check_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse arrays that are not exactly those of the decoder."""
    if missing := [name for name in expected if name not in shapes]:
        raise FileRefused(path, f"there is no {short(missing[0])}; {len(missing)} arrays are missing in all")
    if extra := [name for name in shapes if name not in expected]:
        raise FileRefused(path, f"there is {short(extra[0])}, which a Llama decoder of these settings has not")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise FileRefused(path, f"{short(name)} has shape {list(shapes[name])}, expected {list(shape)}")
