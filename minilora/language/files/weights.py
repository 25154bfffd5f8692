"""Reader of a Llama decoder's weights in any supported format.

    a folder     config.json and model.safetensors, or its shards with model.safetensors.index.json: Hugging Face's
                 layout. F32, F16, BF16, and bitsandbytes' NF4, which stays quantised, see `nf4files`
    name.gguf    llama.cpp's format, quantised or not: `gguf`
    name.npz     glassllm's own format, see the end of this file

The reader of each format returns the decoder's configuration, the shapes of the file's arrays under transformers'
names, and a function that reads one array. The common checks are here: before any array is read, the names and shapes
must be the decoder's, and each array must be finite. No tokenizer is needed, and nothing in a file is executed.

In most folders each expert of a mixture has its own tensors; in some, as in this decoder, one array contains all
experts. transformers writes the former and reads both. See `minilora.files.experts` for the names.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import field

from ...backend import Backend, backend_or_numpy
from ...checks import Array, check_choice, check_flag, check_path
from ...files.disk import RegularFile, model_format, read_json
from ...files.experts import MIXTRAL_MLP, ExpertTensor, expert_tensors
from ...files.modelfolder import EMBEDDING, HEAD_WEIGHT
from ...files.peft import CONFIG_NAME
from ...files.tensors import MODEL_CONFIG, Weights, in_dtype, open_weights, same_bytes
from ...layer import rebuild
from ...layers.quantized import FrozenQuantizedLinear
from ...layers.rotary import halves_from_interleaved
from ...texts import FileRefused, named, reading, short
from ..config import LlamaConfig, from_json, from_sizes, renamed
from .gguf import open_gguf
from .nf4files import NF4Weights

Reader = Callable[[str], Any]
"""A function from an array's name in transformers to the array, or to a frozen layer if it stays quantised."""
MODEL_DTYPES = ("float32", "float64")
EMBEDDING_WEIGHT = f"model.{EMBEDDING}.weight"


def load(
    path: str | Path, *, dtype: Any = "float32", backend: Backend | None = None, keep_blocks: bool = False
) -> tuple[LlamaConfig, dict[str, Array | FrozenQuantizedLinear]]:
    """Read a model's configuration, and its arrays by their names in transformers; a quantised one becomes a layer."""
    backend, keep_blocks = backend_or_numpy(backend), check_flag("keep_blocks", keep_blocks)
    check_choice("dtype", getattr(dtype, "__name__", str(dtype)), MODEL_DTYPES)
    config, read = open_llama(path, keep_blocks=keep_blocks)
    path = Path(path)
    arrays: dict[str, Array | FrozenQuantizedLinear] = {}
    for name in config.shapes():
        array = read(name)
        quantised = isinstance(array, FrozenQuantizedLinear)
        with np.errstate(all="ignore"):  # a scale may be infinite, which is refused below
            numbers = array.weight if quantised else array
        if numbers.dtype.kind != "f":
            raise FileRefused(path, f"{short(name)} has dtype {numbers.dtype}, expected a floating-point type")
        if not np.isfinite(numbers).all():
            raise FileRefused(path, f"{short(name)} holds NaN or infinity")
        if quantised:
            array.like = array.like.astype(np.dtype(dtype).name)  # the dtype in which the layer computes
            arrays[name] = rebuild(array, array=backend.asarray)
        else:
            arrays[name] = backend.asarray(in_dtype(numbers, dtype, path, f"{short(name)} reaches"))
    return config, arrays


def open_llama(path: str | Path, *, keep_blocks: bool = False) -> tuple[LlamaConfig, Reader]:
    """Return a model's configuration and a function that reads one array, without reading any weight."""
    path = check_path("path", path)
    kind = model_format(path)
    if kind == ".gguf":
        config, shapes, read = open_gguf(path, keep_blocks=keep_blocks)
    elif kind == ".npz":
        with reading(path):
            config, shapes, read = _open_npz(path)
    else:
        config, shapes, read = _open_folder(path)
    if config.num_hidden_layers > len(shapes):  # before their names are generated
        raise FileRefused(path, f"{config.num_hidden_layers} layers, but only {len(shapes)} arrays")
    expected = config.shapes()
    if missing := [name for name in expected if name not in shapes]:
        raise FileRefused(path, f"missing arrays: {len(missing)}, the first is {short(missing[0])}")
    if extra := [name for name in shapes if name not in expected]:
        raise FileRefused(path, f"{short(extra[0])} is unexpected: a Llama decoder with this config does not have it")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise FileRefused(path, f"{short(name)} has shape {list(shapes[name])}, expected {list(shape)}")
    return config, read


def _open_folder(path: Path) -> tuple[LlamaConfig, dict[str, tuple[int, ...]], Reader]:
    """Return the configuration in a folder, the shapes of its arrays, and a function that reads one."""
    file, settings = RegularFile(path / MODEL_CONFIG), read_json(path / MODEL_CONFIG)
    config = from_json(path / MODEL_CONFIG, settings)
    if (path / CONFIG_NAME).exists():  # transformers would load it with the model
        raise FileRefused(path / CONFIG_NAME, "an adapter in a model's folder: move it to its own folder")
    base = open_weights(path)
    file.check_unchanged(in_place=True)  # so both come from the same save: programs write the configuration first
    quantised = NF4Weights(path / MODEL_CONFIG, base, settings.get("quantization_config"))
    experts = _experts(config, base)
    shapes = {name: shape for name, (shape, _) in experts.items()}
    handled = quantised.tensors | {tensor.name for _, tensors in experts.values() for tensor in tensors}
    names = dict[str, str]()
    for name in base.holder:
        if name in handled or name.endswith(".rotary_emb.inv_freq"):  # in each layer of old files
            continue
        if name == HEAD_WEIGHT and config.tie_word_embeddings:  # some files contain the tied head as well
            _check_tied(path, base)
            continue
        ours = name.replace(f".{MIXTRAL_MLP}.gate.", ".mlp.gate.")  # the router
        names[ours], shapes[ours] = name, base.spec(name).shape

    def read(name: str) -> np.ndarray | FrozenQuantizedLinear:
        if name in quantised.shapes:
            return quantised.read(name)
        if name in experts:
            shape, tensors = experts[name]
            arrays = [base.read(tensor.name) for tensor in tensors]
            return (np.concatenate(arrays) if len(arrays) > 1 else arrays[0]).reshape(shape)
        return base.read(names[name])

    return config, quantised.shapes | shapes, read


def _experts(config: LlamaConfig, base: Weights) -> dict[str, tuple[tuple[int, ...], list[ExpertTensor]]]:
    """Return, for each array of a mixture's experts, its shape and the tensors that it consists of."""
    if config.mixture is None or max(config.num_hidden_layers, config.mixture.num_experts) > len(base.holder):
        return {}  # refused later; too many names to generate
    shapes = {name: shape for name, shape in config.shapes().items() if ".mlp.experts." in name}
    return {name: (shape, expert_tensors(name, shape[0], shape[1], shape[2], base)) for name, shape in shapes.items()}


def _check_tied(path: Path, base: Weights) -> None:
    """Require that a tied head in the file equals the embedding: transformers 4 ignores it, version 5 uses it."""
    if EMBEDDING_WEIGHT in base.holder and not same_bytes(
        base.holder[HEAD_WEIGHT], HEAD_WEIGHT, base.holder[EMBEDDING_WEIGHT], EMBEDDING_WEIGHT
    ):
        raise FileRefused(
            base.holder[HEAD_WEIGHT].path,
            f"{HEAD_WEIGHT} differs from {EMBEDDING_WEIGHT}, but tie_word_embeddings is True in {path / MODEL_CONFIG}: "
            "expected False, or no such head",
        )


# --- glassllm's .npz ---
#
# A .npz file contains half-precision matrices, and their sizes as JSON. The matrices are (in, out), so they are
# transposed here. The rotary embedding pairs neighbouring entries, see `minilora.layers.rotary`.

_GLASSLLM_BLOCK = {
    **{"norm1.gamma": "input_layernorm.weight", "norm2.gamma": "post_attention_layernorm.weight"},
    **{"attn.W_Q": "self_attn.q_proj.weight", "attn.W_K": "self_attn.k_proj.weight"},
    **{"attn.W_V": "self_attn.v_proj.weight", "attn.W_O": "self_attn.o_proj.weight"},
    **{"ffn.W1": "mlp.gate_proj.weight", "ffn.W3": "mlp.up_proj.weight", "ffn.W2": "mlp.down_proj.weight"},
}
GLASSLLM = {
    **{"E": "model.embed_tokens.weight", "norm_f.gamma": "model.norm.weight"},
    **{f"blocks.*.{theirs}": f"model.layers.*.{ours}" for theirs, ours in _GLASSLLM_BLOCK.items()},
}
"""glassllm's names of arrays, with transformers'; * stands for a block's index."""
SIZES_MEMBER, GATE = "__config__", "model.layers.0.mlp.gate_proj.weight"
MOST_COMPRESSED = 20
"""The largest compression ratio: weights barely compress, so a higher one means a decompression bomb."""


class GlassllmSizes(msgspec.Struct):
    """The sizes in the JSON, under transformers' names; those with a default may be missing."""

    vocab_size: int
    hidden_size: int = field(name="d_model")
    num_hidden_layers: int = field(name="n_layers")
    num_attention_heads: int = field(name="n_heads")
    num_key_value_heads: int | None = field(name="n_kv_heads", default=None)
    rms_norm_eps: float = field(name="eps", default=1e-6)
    rope_theta: float = field(name="rope_base", default=10_000.0)
    max_position_embeddings: int | None = field(name="max_len", default=None)


def _open_npz(path: Path) -> tuple[LlamaConfig, dict[str, tuple[int, ...]], Reader]:
    """Return the configuration in the file, the shapes of its arrays, and a function that reads one."""
    with zipfile.ZipFile(path) as members:
        unpacked, size = sum(member.file_size for member in members.infolist()), path.stat().st_size
    if unpacked > MOST_COMPRESSED * size:
        raise ValueError(f"its {size} bytes unpack to {unpacked}, expected at most {MOST_COMPRESSED} times as many")
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    with named(SIZES_MEMBER):
        sizes = msgspec.structs.asdict(msgspec.json.decode(str(arrays.pop(SIZES_MEMBER)), type=GlassllmSizes))
    ours = {renamed(name, GLASSLLM) or name: array for name, array in arrays.items()}
    if len(ours) < len(arrays):
        raise ValueError("two of its arrays have the same name in a Llama decoder")
    weights = {name: array.T if "_proj" in name else array for name, array in ours.items()}
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    sizes |= {"intermediate_size": len(weights[GATE]), "head_dim": None}
    config = from_sizes(sizes, rope, tie_word_embeddings=True)

    def read(name: str) -> np.ndarray:
        rotated = name.endswith(("q_proj.weight", "k_proj.weight"))
        array = halves_from_interleaved(weights[name], config.head_dim) if rotated else weights[name]
        return np.ascontiguousarray(array)

    return config, {name: array.shape for name, array in weights.items()}, read
