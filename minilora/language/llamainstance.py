"""A small language model with adapters: the row that `minilora check` and the tests add to the book's `INSTANCES`."""

from __future__ import annotations

import numpy as np

from ..adaptation import adapt
from ..backend import backend_or_numpy
from ..checks import Array
from ..layer import Layer
from ..layers.rotary import frequencies
from ..verify.instances import BASE, EPS, HIDDEN, INSTANCES, Drawing, Row, moved
from .config import LlamaConfig
from .llama import Llama


def _llama(d: Drawing) -> tuple[Layer, Array]:
    """Return a decoder with adapters in its lowest and its last block."""
    K, g, D = d.integer(1, 2), d.integer(1, 3), 2 * d.integer(1, 2)
    config = LlamaConfig(
        vocab_size=max(min(d.out_features, 7), 3), hidden_size=min(d.in_features, 7), intermediate_size=HIDDEN,
        num_hidden_layers=2, num_attention_heads=K * g, num_key_value_heads=K, head_dim=D, rms_norm_eps=EPS,
        frequencies=frequencies(D, BASE), tie_word_embeddings=True,
    )  # fmt: skip
    llama = Llama.build(config, {name: d.randn(*shape) / shape[-1] ** 0.5 for name, shape in config.shapes().items()})
    targets = ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]
    adapted = adapt(llama, targets, rank=min(d.rank, 2), alpha=d.rank, rng=d.rng)
    text = backend_or_numpy(d.backend).asarray(np.arange(3)[None])  # of equal values any query would read the same
    return moved(d, adapted), text


ALL_INSTANCES: dict[str, Row] = INSTANCES | {"Llama, LoRA": _llama}
"""The layers of the book, and the decoder made of them."""
