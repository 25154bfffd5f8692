"""The model that a user names, or the small one that stands in where none is named; and its weights in few bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adaptation import attach
from ..backend import Backend
from ..checks import needed, printable
from ..files.adapters import check_base_weights
from ..layer import walk
from ..variants.adapter import Adapter
from ..variants.loftq import quantize
from .llama import Llama


def model_path(model: Path | None) -> Path:
    """Return where a model lies: the one that is named, or glassllm's.

    Raises
    ------
    ValueError
        If none is named and glassllm is not installed.
    """
    if model is not None:
        return Path(model)
    package = needed("glassllm", "the model that is used without --model")
    return Path(package.__file__).parent / "weights" / "en.npz"


def load_model(model: Path | None, dtype: str, backend: Backend, bits: str | None = None) -> Llama:
    """Return a model, its frozen linear layers in few bits where `bits` says so.

    Parameters
    ----------
    model : Path, optional
        As `model_path` takes it.
    dtype : {"float32", "float64"}
        What the weights become.
    backend : Backend
        Where the arrays live.
    bits : {"nf4", "file"}, optional
        Whether linear layers are quantised to NF4, or keep the blocks that a .gguf file has.

    Raises
    ------
    ValueError
        If the file is damaged or not supported, or is to keep blocks and is no .gguf file.
    """
    path = model_path(model)
    if bits == "file" and path.suffix != ".gguf":
        raise ValueError(f"--quantize file keeps the blocks of a .gguf file, and the model is {printable(str(path))}")
    llama = Llama.load(path, dtype=dtype, backend=backend, keep_blocks=bits == "file")
    return quantize(llama) if bits == "nf4" else llama


def with_adapters(
    model: Llama, adapters: Mapping[str, Adapter], folder: Path, backend: Backend, bits: str | None
) -> Llama:
    """Return the model with adapters that were read; refuse those that keep the weights of another base.

    Parameters
    ----------
    model : Llama
        As `load_model` returns it.
    adapters : mapping of str to Adapter
        As `minilora.load_adapter` returns them.
    folder : Path
        Where they were read.
    backend, bits
        As `load_model` took them. A quantised model has other weights than its base, which are not compared.
    """
    layers = {} if bits else dict(walk(model))

    def weight(path: str) -> Any:
        array = getattr(layers.get(path), "weight", None)
        return None if array is None else backend.to_numpy(array)

    check_base_weights(folder, weight)
    adapted: Llama = attach(model, adapters)
    return adapted
