"""Writer of Llama decoders as folders in Hugging Face's layout, which transformers and `minilora.Llama.load` read.

Each kind of model is written under its own model_type, and a mixture has a tensor for each weight of each expert, as
transformers writes it.

Layers in NF4 are written in bitsandbytes' layout, so that transformers loads them without conversion. Layers that keep
the blocks of a .gguf file cannot be represented, and are dequantised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...adaptation import adapters, attach, is_adapted, merge
from ...backend import backend_of
from ...checks import Array, check_instance, check_path, dtype_name
from ...extras import needed
from ...files.adapters import read_adapters
from ...files.disk import check_new_folder, model_format, synced, written_folder
from ...files.experts import EXPERT_PARTS, MIXTRAL, MIXTRAL_MLP
from ...files.modelfolder import FURTHER_TEMPLATES, companions, copy_companions
from ...files.peft import MERGED_KEY, AdapterFolder
from ...files.tensors import MODEL_CONFIG, SINGLE_NAME, write_tensors
from ...layer import walk
from ...layers.quantized import QuantizedLinear
from ...layers.rotary import frequencies
from ...layers.stacked import StackedLinear
from ...linear import Linear
from ...lora import LoRA
from ..config import HEADS, MODEL_KINDS, SIZE_KEYS, LlamaConfig, from_json
from ..llama import Llama
from .chattemplate import SPECIAL_NAMES, load_template
from .chattemplate import TEMPLATE_FILE as TEMPLATE_FILE
from .gguf import gguf_tokenizer
from .nf4files import nf4_tensors, quantization_config
from .tokens import TOKENIZER_FILE, TOKENIZER_SETTINGS, read_gguf_tokenizer


def save_llama(model: Llama, folder: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write config.json and model.safetensors into a folder, which appears only when it is complete.

    `model` must have no adapters: save them separately with `minilora.save_adapter`, or merge them with
    `minilora.merge`. The folder must be new or empty. Tokenizer, chat template and further files are copied from the
    folder that the model was loaded from, or converted from a .gguf file's metadata to transformers' format. If they
    can no longer be read or converted, that is a FileRefused; without ``model.source`` only the weights are written.
    `metadata` is added to that of the tensors.

    A folder that is not empty or cannot be created is a ValueError. So is a model that has adapters, NaN or infinity,
    or rotary frequencies that config.json cannot express. Anything but a model is a TypeError.
    """
    check_instance("model", model, Llama)
    folder = check_path("folder", folder)
    adapted = [path for path, layer in walk(model) if is_adapted(layer)]
    if adapted:
        raise ValueError(
            f"model has an adapter of {adapted[0]!r}, which cannot be in the folder: save it with save_adapter "
            "and the model without it here, or merge(model) first"
        )
    check_new_folder("folder", folder)
    tensors, quantised = _tensors(model)
    config = _config(folder, model.config, dtype_name(next(iter(tensors.values()))), quantization_config(quantised))
    beside = {} if model.source is None else companion_files(model.source)
    with written_folder(folder) as part:
        copy_companions(beside, part)
        with synced(part / MODEL_CONFIG) as file:
            file.write(as_json(config))
        with synced(part / SINGLE_NAME) as file:
            write_tensors(file, tensors, {"format": "pt"} | dict(metadata or {}))


def merge_gguf(base: str | Path, adapter: str | Path, folder: str | Path) -> Mapping[str, LoRA]:
    """Write a .gguf model with an adapter merged into it as a folder in float32; return the adapters by path."""
    check_new_folder("folder", check_path("folder", folder))
    opened = AdapterFolder.open(check_path("adapter", adapter))
    opened.warn_of_base()
    changes = read_adapters(opened, dtype="float32")
    save_llama(merge(attach(Llama.load(base), changes)), folder, metadata={MERGED_KEY: opened.file.digest()})
    return changes


def companion_files(source: Path) -> dict[str, Path | bytes]:
    """Return the other files of a model's folder by name, each as a path to copy or as contents to write."""
    kind = model_format(source)
    if kind == "folder":
        return {name: file for name, file in companions(source, untied=False).items() if name != MODEL_CONFIG}
    return _files_of_gguf(source) if kind == ".gguf" else {}


def _files_of_gguf(path: Path) -> dict[str, Path | bytes]:
    """Convert the tokenizer and the chat templates in a .gguf file's metadata to transformers' files."""
    fields = gguf_tokenizer(path)
    if "tokenizer.ggml.model" not in fields:
        return {}
    read = read_gguf_tokenizer(path)
    words = fields["tokenizer.ggml.tokens"]
    if read.begin:
        processors = needed("tokenizers", TOKENIZER_FILE).processors
        begin = [words[i] for i in read.begin]
        read.rebuilt.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A"],
            pair=[*begin, "$A", *begin, "$B"],
            special_tokens=[*zip(begin, read.begin, strict=True)],
        )
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    files: dict[str, Path | bytes] = {TOKENIZER_FILE: read.rebuilt.to_str(pretty=True).encode()}
    for name, word in SPECIAL_NAMES.items():
        number = fields.get(f"tokenizer.ggml.{name}_token_id")
        if type(number) is int and number < len(words):
            settings[f"{word}_token"] = words[number]
    if "tokenizer.chat_template" in fields:
        templates = load_template(path).templates
        files[TEMPLATE_FILE] = templates.pop("default").encode()
        files |= {f"{FURTHER_TEMPLATES}/{name}.jinja": text.encode() for name, text in templates.items()}
    generation = {"eos_token_id": read.end, **({"bos_token_id": read.begin[0]} if read.begin else {})}
    return files | {TOKENIZER_SETTINGS: as_json(settings), "generation_config.json": as_json(generation)}


def as_json(value: Any) -> bytes:
    """Encode a value as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _tensors(model: Llama) -> tuple[dict[str, np.ndarray], dict[str, bool]]:
    """Return all tensors by name, and whether each linear layer is quantised, by path."""
    layers = dict(walk(model))
    tensors: dict[str, np.ndarray] = {}
    quantised: dict[str, bool] = {}
    for name in model.config.shapes():
        path, _, part = name.rpartition(".")
        layer: Any = layers[path]
        if isinstance(layer, Linear) and part == "weight":
            quantised[path] = isinstance(layer, QuantizedLinear)
        if isinstance(layer, QuantizedLinear) and part == "weight":
            tensors |= nf4_tensors(name, layer)
        else:
            found = getattr(layer, part)
            tensors[name] = _finite(name, found.weight if isinstance(found, StackedLinear) else found)
    return split_experts(model.config, tensors), quantised


def split_experts(config: LlamaConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a decoder's tensors in the usual layout: one for each weight of each expert."""
    split = dict[str, np.ndarray]()
    for name, array in tensors.items():
        experts, _, stacked = name.rpartition(".")
        if not experts.endswith(".mlp.experts"):
            split[_file_name(config, name)] = array
            continue
        parts = EXPERT_PARTS[stacked]
        for e, matrix in enumerate(array):
            names = [_file_name(config, f"{experts}.{e}.{part}.weight") for part in parts]
            split |= dict(zip(names, np.split(matrix, len(parts)), strict=True))
    return split


def _file_name(config: LlamaConfig, name: str) -> str:
    """Return a tensor's name in a folder; Mixtral has its own names for its mixtures."""
    if config.model_type == "mixtral" and ".mlp." in name:
        name = name.replace(".mlp.", f".{MIXTRAL_MLP}.")
        for part, theirs in MIXTRAL.items():
            name = name.replace(f".{part}.", f".{theirs}.")
    return name


def _finite(name: str, array: Array) -> np.ndarray:
    host = backend_of(array).to_numpy(array)
    if not np.isfinite(host).all():
        raise ValueError(f"the model's {name} holds NaN or infinity")
    return host


def _config(folder: Path, config: LlamaConfig, dtype: str, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """Return the contents of config.json, and require that reading them gives the same configuration."""
    rope = dict(_rope(config))
    base = rope.pop("rope_theta")
    settings = {
        "architectures": [MODEL_KINDS[config.model_type].architecture],
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in (*SIZE_KEYS, *HEADS)},
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": base,  # the key of transformers 4, which 5 reads too
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "tie_word_embeddings": config.tie_word_embeddings,
        **_of_kind(config),
        "bos_token_id": None,  # if they were missing, 1 and 2 would be assumed
        "eos_token_id": None,
        "torch_dtype": dtype,
    }
    if config.max_position_embeddings is not None:
        settings["max_position_embeddings"] = config.max_position_embeddings
    if quantization is not None:
        settings["quantization_config"] = quantization
    again = from_json(folder / MODEL_CONFIG, settings)
    if not np.allclose(again.frequencies, config.frequencies, rtol=1e-12, atol=0):
        raise ValueError("config.json cannot express the model's rotary frequencies: it has only a base and a factor")
    return settings


def _of_kind(config: LlamaConfig) -> dict[str, Any]:
    """Return the entries of config.json that only one kind of model has."""
    kind, mixture = config.model_type, config.mixture
    if kind == "llama":
        return {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    # For the other kinds, a missing entry would mean a sliding window of 4096 tokens.
    settings: dict[str, Any] = {"use_sliding_window": False} if kind.startswith("qwen") else {"sliding_window": None}
    if kind in ("qwen3", "qwen3_moe"):
        settings["attention_bias"] = config.attention_bias
    if kind == "qwen2_moe":
        settings["qkv_bias"] = config.attention_bias
    if mixture is None:
        return settings
    settings["num_local_experts" if kind == "mixtral" else "num_experts"] = mixture.num_experts
    settings["num_experts_per_tok"] = mixture.num_experts_per_tok
    if kind == "mixtral":
        return settings
    names = ("moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step")
    settings |= {name: getattr(mixture, name) for name in names} | {"mlp_only_layers": list(mixture.mlp_only_layers)}
    if mixture.shared_expert_intermediate_size is not None:
        settings["shared_expert_intermediate_size"] = mixture.shared_expert_intermediate_size
    return settings


def _rope(config: LlamaConfig) -> dict[str, Any]:
    """Return the rotary settings; if there are none, find the base from the frequencies."""
    if config.rope is not None:
        return dict(config.rope)
    pairs = len(config.frequencies)
    base = config.frequencies[1] ** -pairs if pairs > 1 else 10_000.0
    whole = float(round(base))
    base = whole if frequencies(2 * pairs, whole) == config.frequencies else base
    return {"rope_type": "default", "rope_theta": base}


def found_by_weight(model: Llama) -> list[str]:
    """Return the weights that `save_adapter` must list in ``target_parameters``, so that PEFT finds their adapters.

    In a Qwen3-MoE, PEFT assumes that every target module with the name of an expert's layer belongs to an expert, but a
    block may have a dense MLP with the same names.
    """
    if model.config.model_type != "qwen3_moe":
        return []
    ends = tuple(f".mlp.{name}" for names in EXPERT_PARTS.values() for name in names)
    return [f"{path}.weight" for path in adapters(model) if path.endswith(ends)]
