"""How much memory training takes: the least, from a language model's sizes alone; and what is kept, on a model.

A Llama decoder has in each of its layers seven matrices, and more arrays around them:

    q (HD, d)   k (KD, d)   v (KD, d)   o (d, HD)   gate (m, d)   up (m, d)   down (d, m)
    two norms (d,) in each layer and one at the end; the embedding (V, d), and the head (V, d) unless it is tied;
    a bias beside each matrix of a layer, where the configuration says so

The letters are those of `LlamaConfig`: H heads and K heads of keys, each D wide.

What a step keeps until its backward has used it, in numbers for each token and layer:

    x of both norms          2 d                   the norms need it
    q, k, v, attention's y   2 HD + 2 KD           attention needs it; its T x T matrix is computed again, never kept
    y of the first norm      d                     only dW, or dA, of q, k or v needs it
    y of the second norm     d                     only dW, or dA, of gate or up needs it
    gate, up                 2 m                   the activation and the product need them
    their product            m                     only dW, or dA, of down needs it

So an adapter saves no activation of its own matrix; it adds r. Only matrices without one save theirs, since a frozen
linear layer keeps nothing. The layers of this library keep more, such as attention's T x T matrix: `cache_bytes` counts
what they keep, and `parameter_bytes` the arrays of a model.

Sources: Rajbhandari et al., "ZeRO", arXiv 1910.02054, section 3.1, for 16 bytes a number in full fine-tuning; Dettmers
et al., "QLoRA", arXiv 2305.14314, section 3, for 4 bits and the constants of their blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..checks import Array, check_choice, check_flag, check_instance, check_integer, check_sizes, is_array
from ..layer import Cache, Layer, arrays_of
from ..layers.rotary import frequencies
from .llamaconfig import LlamaConfig

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

CONSTANTS = {16: 0.0, 8: 32 / 4096, 4: 8 / 64 + 32 / (64 * 256)}
"""Bits a weight for the constants of its block: at 8 bits one float32 for 4096 weights, at 4 bits as in QLoRA."""


LLAMA_2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, head_dim=128, rms_norm_eps=1e-5, frequencies=frequencies(128, 10000.0),
)  # fmt: skip


def training_memory(
    config: LlamaConfig, *, tokens: int, rank: int | None = None, targets: Sequence[str] = MATRICES, bits: int = 16,
    recompute: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Return the bytes that training keeps, by what they are for. Their sum is the least; a library needs more.

    Parameters
    ----------
    config : LlamaConfig
        The sizes.
    tokens : int
        In a batch: sequences times their length.
    rank : int, optional
        Of the adapters. Without it all weights train.
    targets : sequence of str
        The matrices that have an adapter, of `MATRICES`.
    bits : {16, 8, 4}
        Of a frozen weight in the layers' matrices. Embedding, head and norms stay in 16, as in QLoRA.
    recompute : bool
        Whether only each layer's input is kept and backward runs the layer's forward again (gradient checkpointing).

    Returns
    -------
    dict of str to int
        ``weights``, ``trained`` (in float32, beside the weights), ``gradients``, ``Adam``, ``activations`` and
        ``logits``, in bytes. Activations have 16 bits, logits 32.

    Raises
    ------
    ValueError, TypeError
        If a number is out of range, a target is unknown, all weights are to train in fewer than 16 bits, or the model
        has mixtures of experts.
    """
    check_instance("config", config, LlamaConfig)
    if config.mixture is not None:
        raise ValueError(f"config is of a {config.model_type}: what a mixture of experts keeps is not counted")
    (tokens,), recompute = check_sizes(tokens=tokens), check_flag("recompute", recompute)
    check_choice("bits", bits, CONSTANTS)  # type: ignore[arg-type]
    for target in targets:
        check_choice("targets", target, MATRICES)
    matrices, elsewhere = count_numbers(config)
    layers, d = config.num_hidden_layers, config.hidden_size
    if rank is None:
        if bits != 16:
            raise ValueError(f"bits={bits} with rank=None: all weights train, and a trained weight needs bits=16")
        trained, gradient, targets = matrices + elsewhere, 2, MATRICES
    else:
        rank, gradient = check_integer("rank", rank, at_least=1), 4  # adapters train in float32
        shapes = matrix_shapes(config)
        trained = layers * sum(rank * sum(shapes[target]) for target in targets)
    layer = _kept_in_a_layer(config, targets) + (len(targets) * rank if rank else 0)
    activations = layers * (d if recompute else layer) + (layer if recompute else 0)
    return {
        "weights": round(matrices * (bits + CONSTANTS[bits]) / 8 + 2 * elsewhere),
        "trained": 4 * trained,
        "gradients": gradient * trained,
        "Adam": 8 * trained,
        "activations": 2 * tokens * activations,
        "logits": 4 * tokens * config.vocab_size,
    }


def active_numbers(config: LlamaConfig) -> int:
    """Return how many of a decoder's numbers one position goes through: of a mixture's experts those that it keeps."""
    total = sum(map(math.prod, config.shapes().values()))
    mixture = config.mixture
    if mixture is None:
        return total
    layers = sum(map(mixture.stands_in, range(config.num_hidden_layers)))
    idle = mixture.num_experts - mixture.num_experts_per_tok
    return total - layers * idle * 3 * mixture.moe_intermediate_size * config.hidden_size


def matrix_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes (out, in) of the matrices of one layer, by the names of `MATRICES`."""
    first = {path: shape for path, shape in config.shapes().items() if path.startswith("model.layers.0.")}
    return {name: shape for name in MATRICES for path, shape in first.items() if path.endswith(f".{name}.weight")}


def count_numbers(config: LlamaConfig) -> tuple[int, int]:
    """Return how many numbers the matrices of all layers have, and how many the embedding, head, norms and biases."""
    matrices = config.num_hidden_layers * sum(map(math.prod, matrix_shapes(config).values()))
    return matrices, sum(map(math.prod, config.shapes().values())) - matrices


def _kept_in_a_layer(config: LlamaConfig, targets: Sequence[str]) -> int:
    """Return how many numbers one layer keeps for each token."""
    d, m, D = config.hidden_size, config.intermediate_size, config.head_dim
    attention = 2 * D * (config.num_attention_heads + config.num_key_value_heads)
    reads_first_norm, reads_second_norm = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}
    first, second = (d if names & set(targets) else 0 for names in (reads_first_norm, reads_second_norm))
    return 2 * d + attention + first + second + 2 * m + (m if "down_proj" in targets else 0)


# --- measured on a model ------------------------------------------------------------------------------------------


def parameter_bytes(model: Layer) -> int:
    """Return how much memory a model's arrays take. What is tied counts once."""
    return sum({id(array): array.nbytes for array in arrays_of(model)}.values())


def cache_bytes(cache: Cache) -> int:
    """Return how much memory the arrays in a cache keep, each counted once; the model's own arrays are not counted."""
    own = {id(_owner(array)) for array in arrays_of(cache[0])}
    sizes: dict[int, int] = {}

    def go(value: Any) -> None:
        if isinstance(value, (tuple, list)):
            for part in value:
                go(part)
        elif is_array(value):
            array = _owner(getattr(value, "ids", value))  # one-hot rows keep their ids alone
            sizes[id(array)] = array.nbytes

    go(cache)
    return sum(size for key, size in sizes.items() if key not in own)


def _owner(array: Array) -> Array:
    """Return the array whose memory a view looks at."""
    return array if getattr(array, "base", None) is None or not is_array(array.base) else _owner(array.base)


def megabytes(count: int) -> str:
    """Return a number of bytes in words."""
    return f"{in_megabytes(count)} MB"


def in_megabytes(count: int) -> str:
    """Return bytes in MB."""
    return f"{count / 1e6:,.1f}"
