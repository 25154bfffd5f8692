"""The weights of a Llama decoder, from the files in which they come.

    a folder     config.json and model.safetensors, or its shards with model.safetensors.index.json: Hugging Face's
                 layout. F32, F16, BF16, and bitsandbytes' NF4, which stays as it is, see `nf4files`
    name.gguf    llama.cpp's format, quantised or not: `gguf`
    name.npz     glassllm's own format: `npz`

Each of the three says which decoder it is, which arrays the file holds, under transformers' names, and how one is read.
What is common stands here: the arrays must be those of the decoder before the first of them is read, and each must hold
numbers. No tokenizer is needed, and nothing in a file is executed.

A mixture's experts have a tensor each in most folders, and one for all of them here and in some folders:

    for all                                for each expert e
    mlp.experts.gate_up_proj (E, 2 m, d)   mlp.experts.e.gate_proj.weight (m, d), and below it .up_proj.weight (m, d)
    mlp.experts.down_proj (E, d, m)        mlp.experts.e.down_proj.weight (d, m)

A Mixtral's are ``block_sparse_moe.experts.e.w1``, ``w3`` and ``w2``, in this order, and its router is
``block_sparse_moe.gate``. transformers writes a tensor each, and reads both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import Backend, backend_or_numpy
from ..checks import Array, FileRefused, check_flag, check_path, short
from ..files.disk import model_format, read_json
from ..files.experts import MIXTRAL, MIXTRAL_MLP, PARTS
from ..files.modelfolder import EMBEDDING, HEAD_WEIGHT
from ..files.peft import CONFIG_NAME
from ..files.tensors import MODEL_CONFIG, Weights, in_dtype, open_weights, same_bytes
from ..layer import rebuild
from ..layers.nf4 import CodedLinear
from .config import LlamaConfig, from_json
from .gguf import open_gguf
from .nf4files import NF4Weights
from .npz import open_npz

Reader = Callable[[str], Any]
"""Returns an array of a file by its name in transformers: numbers, or a `CodedLinear` where it stays quantised."""
DTYPES = ("float32", "float64")
EMBEDDING_WEIGHT = f"model.{EMBEDDING}.weight"


def load(
    path: str | Path, *, dtype: Any = "float32", backend: Backend | None = None, keep_blocks: bool = False
) -> tuple[LlamaConfig, dict[str, Array | CodedLinear]]:
    """Return what decoder a file holds, and its arrays under transformers' names; a quantised one is a layer."""
    backend, keep_blocks = backend_or_numpy(backend), check_flag("keep_blocks", keep_blocks)
    if str(dtype) not in DTYPES and getattr(dtype, "__name__", "") not in DTYPES:
        raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}")
    config, read = open_llama(path, keep_blocks=keep_blocks)
    path = Path(path)
    arrays: dict[str, Array | CodedLinear] = {}
    for name in config.shapes():
        array = read(name)
        coded = isinstance(array, CodedLinear)
        with np.errstate(all="ignore"):  # scales may be infinite
            numbers = array.weight if coded else array
        if numbers.dtype.kind != "f":
            raise FileRefused(path, f"{short(name)} has dtype {numbers.dtype}, expected a floating-point type")
        if not np.isfinite(numbers).all():
            raise FileRefused(path, f"{short(name)} holds NaN or infinity")
        if coded:
            array.like = array.like.astype(np.dtype(dtype).name)  # what it computes in
            arrays[name] = rebuild(array, array=backend.asarray)
        else:
            arrays[name] = backend.asarray(in_dtype(numbers, dtype, path, f"{short(name)} reaches"))
    return config, arrays


def open_llama(path: str | Path, *, keep_blocks: bool = False) -> tuple[LlamaConfig, Reader]:
    """Return what decoder a file holds, and how one of its arrays is read; no weight has been read then."""
    path = check_path("path", path)
    kind = model_format(path)
    if kind == ".gguf":
        config, shapes, read = open_gguf(path, keep_blocks=keep_blocks)
    else:
        config, shapes, read = _open_folder(path) if kind == "folder" else open_npz(path)
    if config.num_hidden_layers > len(shapes):  # before that many names are made
        raise FileRefused(path, f"{config.num_hidden_layers} layers, and {len(shapes)} arrays in all")
    expected = config.shapes()
    if missing := [name for name in expected if name not in shapes]:
        raise FileRefused(path, f"there is no {short(missing[0])}; {len(missing)} arrays are missing in all")
    if extra := [name for name in shapes if name not in expected]:
        raise FileRefused(path, f"there is {short(extra[0])}, which a Llama decoder of these settings has not")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise FileRefused(path, f"{short(name)} has shape {list(shapes[name])}, expected {list(shape)}")
    return config, read


def _open_folder(path: Path) -> tuple[LlamaConfig, dict[str, tuple[int, ...]], Reader]:
    """Return the decoder's sizes, the shapes of the arrays in a folder, and how one is read."""
    settings = read_json(path / MODEL_CONFIG)
    config = from_json(path / MODEL_CONFIG, settings)
    if (path / CONFIG_NAME).exists():  # transformers would put it beside the model
        raise FileRefused(path / CONFIG_NAME, "an adapter in the folder of a model: move it to a folder of its own")
    base = open_weights(path)
    quantised = NF4Weights(path / MODEL_CONFIG, base, settings.get("quantization_config"))
    shapes: dict[str, tuple[int, ...]] = {}
    for name in base.holder:
        if name in quantised.tensors or name.endswith(".rotary_emb.inv_freq"):  # which old files keep for each layer
            continue
        if name == HEAD_WEIGHT and config.tie_word_embeddings:  # some files hold it a second time
            _check_tied(path, base)
            continue
        shapes[name] = base.spec(name).shape
    shapes, experts = _join_experts(path, config, shapes)

    def read(name: str) -> np.ndarray | CodedLinear:
        if name in quantised.shapes:
            return quantised.read(name)
        if name in experts:
            return np.stack([np.concatenate([base.read(part) for part in parts]) for parts in experts[name]])
        return base.read(name if name in base.holder else file_name(config, name))

    return config, quantised.shapes | shapes, read


def _check_tied(path: Path, base: Weights) -> None:
    """Require that a second head is the embedding: transformers 4 passes over it, version 5 computes with it."""
    if EMBEDDING_WEIGHT in base.holder and not same_bytes(
        base.holder[HEAD_WEIGHT], HEAD_WEIGHT, base.holder[EMBEDDING_WEIGHT], EMBEDDING_WEIGHT
    ):
        raise FileRefused(
            base.holder[HEAD_WEIGHT].path,
            f"{HEAD_WEIGHT} is not {EMBEDDING_WEIGHT}, and tie_word_embeddings is True in {path / MODEL_CONFIG}: "
            "expected False, or no such head",
        )


# --- experts ---


def expert_tensors(config: LlamaConfig) -> dict[str, list[list[str]]]:
    """Return by the name of each array for all experts the tensors of each expert, from the top of its rows down."""
    if config.mixture is None:
        return {}
    return {
        f"model.layers.{layer}.mlp.experts.{name}": [
            [file_name(config, f"model.layers.{layer}.mlp.experts.{e}.{part}.weight") for part in parts]
            for e in range(config.mixture.num_experts)
        ]
        for layer in filter(config.mixture.stands_in, range(config.num_hidden_layers))
        for name, parts in PARTS.items()
    }


def file_name(config: LlamaConfig, name: str) -> str:
    """Return the name that a tensor of a mixture has in a folder: a Mixtral's files have names of their own."""
    if config.model_type == "mixtral" and ".mlp." in name:
        name = name.replace(".mlp.", f".{MIXTRAL_MLP}.")
        for part, theirs in MIXTRAL.items():
            name = name.replace(f".{part}.", f".{theirs}.")
    return name


def _join_experts(
    path: Path, config: LlamaConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, list[list[str]]]]:
    """Return the shapes of a folder's arrays with all experts in one, and the tensors that these are made of."""
    found, made = dict(shapes), dict[str, list[list[str]]]()
    if config.mixture is None or max(config.num_hidden_layers, config.mixture.num_experts) > len(found):
        return found, made
    expected = config.mixture.shapes(config.hidden_size)
    for name, experts in expert_tensors(config).items():
        if name in found:
            continue
        _, rows, width = expected[name.partition(".mlp.")[2]]
        shape = rows // len(experts[0]), width
        for part in (part for parts in experts for part in parts):
            if part not in found:
                raise FileRefused(path, f"there is no {short(part)}, and no {short(name)} for all experts")
            if found.pop(part) != shape:
                raise FileRefused(path, f"{short(part)} has shape {list(shapes[part])}, expected {list(shape)}")
        found[name], made[name] = (len(experts), rows, width), experts
    for name in [name.rpartition("experts.")[0] + "gate.weight" for name in made]:
        if name not in found and file_name(config, name) in found:
            found[name] = found.pop(file_name(config, name))
    return found, made
