"""The random decoders that golden adapters are made for.

There are two plain ones, one with a tied head, each in float32 and with its linear layers in NF4; a third has biases in
attention. All sizes are multiples of 64, since some programs support no others. No weight is square, heads times
head_dim is not the hidden size, and queries share keys in groups, so a program that confuses two sizes fails or gives
wrong numbers. All float32 weights are bfloat16 values, so a program that computes in bfloat16 or float16 loses nothing
when it reads them. LIVING and SQUARE, below, serve the sessions and the cases that need square weights.

Four have a mixture of four experts, two of which are active for each token. An expert's gate_up_proj is (2 m, d), its
down_proj (d, m). A program that exchanges in and out fails there, unless one of the two is square:

    experts-double    Mixtral       d = 2 m     a tensor for each weight of each expert
    experts-fused     the same numbers, a tensor for all experts
    experts-square    Mixtral       d = m
    experts-shared    Qwen2-MoE     m = 3 d / 4, not renormalised, and a shared expert

Their files store bfloat16, as most models' files do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ...extras import needed
from ...files.dtypes import FLOATS, cast
from ...files.tensors import MODEL_CONFIG, SINGLE_NAME, write_tensors
from ...language.config import LlamaConfig, MixtureConfig
from ...language.files.gguf import GGUF_SIZES, gguf_tensor
from ...language.files.save import save_llama, split_experts
from ...language.llama import Llama
from ...layer import walk
from ...layers.quantized import QuantizedLinear
from ...layers.rotary import halves_from_interleaved
from ...quantization import quantize
from .exact import exact_frequencies

THETA, POSITIONS = 10_000.0, 128
EMBEDDING_PATH, HEAD_PATH = "model.embed_tokens", "lm_head"
EMBEDDING_TENSOR, HEAD_TENSOR = f"{EMBEDDING_PATH}.weight", f"{HEAD_PATH}.weight"
SPIKES = (9.0, 3.6)
"""The two largest singular values of each v_proj, far above the others, so that PiSSA's start is well defined."""

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
LETTERS = {"\n": "Ċ", " ": "Ġ"}
"""The letters that byte-level tokenizers use for the two invisible characters."""
MERGES = (
    *("Ġ t", "h e", "i n", "r e", "a n", "e r", "o n", "Ġ a", "Ġt he", "Ġ s", "o r", "e s", "e n", "i s", "Ġ o"),
    *("a t", "n d", "i t", "an d", "o u", "in g", "e d", "Ġ w", "a l", "Ġ c", "l e", "Ġo f", "a r", "Ġ in", "i c"),
)
VOCABULARY = ("<s>", "</s>", *(LETTERS.get(c, c) for c in CHARACTERS), *(merge.replace(" ", "") for merge in MERGES))

EXPERT_COUNT, EXPERTS_PER_TOKEN = 4, 2
LAYER = "model.layers.0"
MLP_PATH = f"{LAYER}.mlp"
GATE_UP, DOWN_OF_EXPERTS, ROUTER = (
    f"{MLP_PATH}.experts.gate_up_proj",
    f"{MLP_PATH}.experts.down_proj",
    f"{MLP_PATH}.gate.weight",
)
SHARED_EXPERT = f"{MLP_PATH}.shared_expert"


@dataclass(frozen=True)
class Base:
    """A random decoder and its files."""

    name: str  # the name of its folder
    layers: int
    tied: bool
    seed: int
    nf4: bool = False  # whether its linear layers, all but the head, are in 4 bits
    biased: bool = False  # whether the projections of attention have biases
    positions: int = POSITIONS  # max_position_embeddings in its files
    square: bool = False  # whether q_proj and o_proj are square
    kind: str = "llama"  # the model_type of its `LlamaConfig`
    mixture: MixtureConfig | None = None
    fused: bool = False  # with a mixture, whether the file has one tensor for all experts

    @property
    def gguf(self) -> bool:
        """Whether there is a .gguf file too. There is none with NF4, biases, square weights or experts."""
        return not (self.nf4 or self.biased or self.square or self.mixture)

    @cached_property
    def config(self) -> LlamaConfig:
        """The decoder's configuration."""
        hidden, between, head_dim = (128, 64, 32) if self.square else (64, 128, 64)
        heads, groups = (4, 2) if self.mixture is None else (1, 1)
        return LlamaConfig(
            vocab_size=len(VOCABULARY), hidden_size=hidden,
            intermediate_size=between if self.mixture is None else self.mixture.moe_intermediate_size,
            num_hidden_layers=self.layers, num_attention_heads=heads, num_key_value_heads=groups, head_dim=head_dim,
            rms_norm_eps=1e-5, frequencies=exact_frequencies(head_dim, THETA), tie_word_embeddings=self.tied,
            attention_bias=self.biased, rope={"rope_type": "default", "rope_theta": THETA}, model_type=self.kind,
            mixture=self.mixture,
        )  # fmt: skip

    @cached_property
    def stored(self) -> dict[str, np.ndarray]:
        """Its arrays in float32, before quantization, with those of all experts stacked in one."""
        rng, draw = np.random.default_rng(self.seed), _drawn if self.mixture is None else _drawn_of_mixture
        return {name: to_bfloat16(draw(rng, name, shape)) for name, shape in self.config.shapes().items()}

    @cached_property
    def model(self) -> Llama:
        """The decoder that is written to the files."""
        model = Llama.build(self.config, self.stored)
        return quantize(model) if self.nf4 else model

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Its arrays in float64, with 4-bit weights dequantized, and always with the head."""
        arrays = {name: array.astype(np.float64) for name, array in self.stored.items()}
        return self._with_codes({HEAD_TENSOR: arrays[EMBEDDING_TENSOR], **arrays}, lambda layer: layer)

    def in_file(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return arrays under the names of the base's file, and split into its tensors."""
        return dict(arrays) if self.mixture is None or self.fused else split_experts(self.config, arrays)

    @cached_property
    def misread(self) -> dict[str, dict[str, np.ndarray]]:
        """The arrays that a program gets from the 4-bit weights if it reads them wrongly, by the kind of mistake."""
        ways: dict[str, Callable[[QuantizedLinear], QuantizedLinear]] = {
            "swapped": lambda layer: _replaced(layer, packed=layer.packed >> 4 | layer.packed << 4),
            "no mean": lambda layer: _replaced(layer, mean=0.0),
        }
        return {how: self._with_codes(self.arrays, change) for how, change in ways.items()} if self.nf4 else {}

    @cached_property
    def misdecoded(self) -> dict[str, dict[str, np.ndarray]]:
        """The arrays with which a right decoder gives a wrong decoder's logits, by the kind of mistake."""
        return {how: misdecoded(self.config, self.arrays, how) for how in ("neighbours", "hidden size")}

    def _with_codes(
        self, arrays: dict[str, np.ndarray], change: Callable[[QuantizedLinear], QuantizedLinear]
    ) -> dict[str, np.ndarray]:
        layers = {path: layer for path, layer in walk(self.model) if isinstance(layer, QuantizedLinear)}
        return arrays | {f"{path}.weight": change(layer).weight.astype("f8") for path, layer in layers.items()}


def misdecoded(config: LlamaConfig, arrays: Mapping[str, np.ndarray], how: str) -> dict[str, np.ndarray]:
    """Return the arrays with which a right decoder gives a wrong decoder's logits; unchanged for any other `how`.

    The wrong decoder rotates neighbouring entries of a head ("neighbours"), or divides the scores by the square root
    of hidden_size / heads ("hidden size").
    """
    D, root = config.head_dim, (config.head_dim * config.num_attention_heads / config.hidden_size) ** 0.5
    normed = any(name.endswith("q_norm.weight") for name in arrays)  # then its weight sets the size of the queries
    changed = dict(arrays)
    for name, array in arrays.items():
        if how == "neighbours" and re.search(r"\.[qk]_(proj|norm)\.(weight|bias)$", name):
            changed[name] = halves_from_interleaved(array, D)
        if how == "hidden size" and re.search(r"\.q_norm\.weight$" if normed else r"\.q_proj\.(weight|bias)$", name):
            changed[name] = root * array
    return changed


def _replaced(layer: QuantizedLinear, **parts: Any) -> QuantizedLinear:
    changed = copy(layer)
    vars(changed).update(parts)
    return changed


UNTIED = Base("untied", layers=2, tied=False, seed=1)
TIED = Base("tied", layers=1, tied=True, seed=2)
UNTIED_NF4 = replace(UNTIED, name="untied-nf4", nf4=True)
TIED_NF4 = replace(TIED, name="tied-nf4", nf4=True)
BIASED = Base("biased", layers=1, tied=True, seed=3, biased=True)
LIVING = Base("living", layers=1, tied=True, seed=4, positions=512)
"""The base of the sessions, with room for a long prompt."""
SQUARE = Base("square", layers=1, tied=True, seed=5, square=True)
"""The only base with square weights, and the only one whose hidden size is heads times head_dim."""


def _mixture(name: str, kind: str, width: int, seed: int, *, fused: bool = False, shared: int | None = None) -> Base:
    """Return a one-layer decoder whose experts have this width; with a shared expert, nothing is renormalised."""
    mixture = MixtureConfig(EXPERT_COUNT, EXPERTS_PER_TOKEN, width, shared is None, shared)
    return Base(name, layers=1, tied=True, seed=seed, kind=kind, mixture=mixture, fused=fused)


EXPERTS_DOUBLE = _mixture("experts-double", "mixtral", width=32, seed=11)
EXPERTS_FUSED = _mixture("experts-fused", "mixtral", width=32, seed=11, fused=True)
EXPERTS_SQUARE = _mixture("experts-square", "mixtral", width=64, seed=12)
EXPERTS_SHARED = _mixture("experts-shared", "qwen2_moe", width=48, seed=13, shared=32)
BASES = (
    *(UNTIED, TIED, UNTIED_NF4, TIED_NF4, BIASED, LIVING, SQUARE),
    *(EXPERTS_DOUBLE, EXPERTS_FUSED, EXPERTS_SQUARE, EXPERTS_SHARED),
)


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Round numbers to bfloat16, and return them as float32."""
    return cast(array, FLOATS["BF16"]).astype(np.float32)


def _drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw an array such that each layer's output is as large as its input, and logits have a deviation of about 3."""
    x: np.ndarray = rng.standard_normal(shape)
    if name.endswith("bias"):
        return x
    if len(shape) == 1:
        return np.asarray(1 + 0.2 * x)
    if name in (EMBEDDING_TENSOR, HEAD_TENSOR):
        return np.asarray(x * 3 / shape[1] ** 0.5)
    if not name.endswith("v_proj.weight"):
        return np.asarray(x / shape[1] ** 0.5)
    out, width = shape
    for size in SPIKES:
        u, v = rng.choice([-1.0, 1.0], out) / out**0.5, rng.choice([-1.0, 1.0], width) / width**0.5
        x += size * 2 * width**0.5 * np.outer(u, v)
    return np.asarray(x / (2 * width**0.5))


def _drawn_of_mixture(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw an array such that each layer's output is as large as its input, and router scores have a deviation of 1."""
    x: np.ndarray = rng.standard_normal(shape)
    if len(shape) == 1:
        return np.asarray(1 + 0.2 * x)
    size = 3 if name == EMBEDDING_TENSOR else 2 if "down_proj" in name else 1
    return np.asarray(size * x / shape[-1] ** 0.5)


# --- files ------------------------------------------------------------------------------------------


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], stored: str = "") -> None:
    """Write a safetensors file as transformers and PEFT do, or with all tensors in a type such as "BF16"."""
    if not stored:
        path.write_bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, {"format": "pt"}))
        return
    with open(path, "wb") as file:
        write_tensors(file, {name: cast(array, FLOATS[stored]) for name, array in arrays.items()}, {"format": "pt"})


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as transformers and PEFT do."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_base(folder: Path, base: Base) -> None:
    """Write a base's config.json, model.safetensors and tokenizer as transformers does."""
    save_llama(base.model, folder)
    config = json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8"))
    config["max_position_embeddings"] = base.positions  # mistral.rs requires it
    if base.mixture is not None:
        config["torch_dtype"] = "bfloat16"
        (folder / SINGLE_NAME).write_bytes(_in_bfloat16(base.in_file(base.stored)))
    write_json(folder / MODEL_CONFIG, config)
    write_json(folder / "generation_config.json", {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1})
    write_json(folder / "tokenizer.json", tokenizer())
    write_json(
        folder / "tokenizer_config.json",
        {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"},
    )


def _in_bfloat16(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the bytes of a safetensors file in bfloat16, a type that NumPy lacks."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in arrays.items():
        numbers = cast(array, FLOATS["BF16"]).tobytes()
        offsets = [len(data), len(data) + len(numbers)]
        entries[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": offsets}
        data += numbers
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def tokenizer() -> dict[str, Any]:
    """Return the contents of tokenizer.json, a byte-level BPE for ASCII."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(VOCABULARY)}, "merges": [merge.split(" ") for merge in MERGES],
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": level,
        "post_processor": None, "decoder": level, "model": model,
        "added_tokens": [{"id": i, "content": token, **special} for i, token in enumerate(VOCABULARY[:2])],
    }  # fmt: skip


def write_gguf(path: Path, base: Base) -> None:
    """Write a base and its tokenizer in llama.cpp's format, in float32."""
    gguf = needed("gguf", "a .gguf file")
    c = base.config
    writer = gguf.GGUFWriter(path, "llama")
    for name, key in GGUF_SIZES.items():
        value = THETA if name == "rope_theta" else getattr(c, name)
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{key}", value)
    writer.add_uint32("llama.attention.value_length", c.head_dim)
    writer.add_uint32("llama.rope.dimension_count", c.head_dim)
    writer.add_uint32("llama.context_length", base.positions)
    writer.add_uint32("general.file_type", 0)  # all tensors in float32
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(VOCABULARY))
    writer.add_token_types([3, 3] + [1] * (len(VOCABULARY) - 2))  # two control tokens, then normal ones
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    for name, array in base.stored.items():
        writer.add_tensor(*gguf_tensor(name, array, c.head_dim))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
