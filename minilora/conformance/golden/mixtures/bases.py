"""The random mixtures that golden adapters stand beside, and their files.

An expert's gate_up_proj is (2 m, d), and its down_proj (d, m). A program that exchanges in and out fails there, unless
one of the two is square. So there is a base with d = 2 m, one with d = m, and one with neither:

    experts-double    Mixtral       d = 2 m     a tensor for each weight of each expert
    experts-fused     the same numbers, a tensor for all experts
    experts-square    Mixtral       d = m
    experts-shared    Qwen2-MoE     m = 3 d / 4, not renormalised, and a shared expert

The files have their numbers in bfloat16, as those of most models have.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ....files.tensors import FLOATS, MODEL_CONFIG, SINGLE_NAME
from ....language.config import LlamaConfig, MixtureConfig
from ....language.llama import Llama
from ....language.save import split_experts
from ..bases import EMBEDDING, POSITIONS, THETA, TOKENS, drawn, with_head, write_base, write_json
from ..exact import frequencies

EXPERTS, KEPT = 4, 2
LAYER = "model.layers.0"
MLP = f"{LAYER}.mlp"
GATE_UP, DOWN, ROUTER = f"{MLP}.experts.gate_up_proj", f"{MLP}.experts.down_proj", f"{MLP}.gate.weight"
SHARED = f"{MLP}.shared_expert"


@dataclass(frozen=True)
class MixtureBase:
    """A random decoder of one layer, with a mixture of four experts, of which a token keeps two."""

    name: str  # of its folder
    kind: str  # as `LlamaConfig` has it
    width: int  # m, of each expert
    seed: int
    renormalised: bool = True
    shared: int | None = None  # the width of the shared expert, if there is one
    fused: bool = False  # whether its file has a tensor for all experts
    positions: int = POSITIONS  # that its files promise

    @cached_property
    def config(self) -> LlamaConfig:
        """Its sizes."""
        mixture = MixtureConfig(EXPERTS, KEPT, self.width, self.renormalised, self.shared)
        return LlamaConfig(
            vocab_size=len(TOKENS), hidden_size=64, intermediate_size=self.width, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, head_dim=64, rms_norm_eps=1e-5,
            frequencies=frequencies(64, THETA), rope={"rope_type": "default", "rope_theta": THETA},
            model_type=self.kind, mixture=mixture, tie_word_embeddings=True,
        )  # fmt: skip

    @cached_property
    def stored(self) -> dict[str, np.ndarray]:
        """Its arrays, in float32, those of the experts in one for all."""
        return drawn(self.seed, self.config, _drawn)

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Its arrays, in float64, and always the head."""
        return with_head(self.stored)

    @property
    def model(self) -> Llama:
        """The decoder, as it is written."""
        return Llama.build(self.config, self.stored)

    def in_file(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return arrays under the names and in the pieces of the base's file."""
        return arrays if self.fused else split_experts(self.config, arrays)

    @property
    def entry(self) -> dict[str, Any]:
        """What the index says of it."""
        return {"tied": True, "layers": 1, "experts": EXPERTS, "fused": self.fused}


DOUBLE = MixtureBase("experts-double", "mixtral", width=32, seed=11)
FUSED = replace(DOUBLE, name="experts-fused", fused=True)
SQUARE = MixtureBase("experts-square", "mixtral", width=64, seed=12)
SHARING = MixtureBase("experts-shared", "qwen2_moe", width=48, seed=13, renormalised=False, shared=32)
MIXTURE_BASES = (DOUBLE, FUSED, SQUARE, SHARING)


def write_mixture(folder: Path, base: MixtureBase) -> None:
    """Write a base as transformers does, or with a tensor for all experts, which it reads too."""
    write_base(folder, base)
    config = json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8"))
    write_json(folder / MODEL_CONFIG, {**config, "torch_dtype": "bfloat16"})
    (folder / SINGLE_NAME).write_bytes(_in_bfloat16(base.in_file(base.stored)))


def _in_bfloat16(arrays: dict[str, np.ndarray]) -> bytes:
    """Return a safetensors file of bfloat16, which NumPy does not have."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in arrays.items():
        numbers = array.astype(FLOATS["BF16"]).tobytes()
        offsets = [len(data), len(data) + len(numbers)]
        entries[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": offsets}
        data += numbers
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def _drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array such that each layer's output is of the size of its input, and scores of experts spread by 1."""
    x: np.ndarray = rng.standard_normal(shape)
    if len(shape) == 1:
        return np.asarray(1 + 0.2 * x)
    size = 3 if name == EMBEDDING else 2 if "down_proj" in name else 1
    return np.asarray(size * x / shape[-1] ** 0.5)
