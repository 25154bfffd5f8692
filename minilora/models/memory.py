"""The least that training a language model keeps in memory, line by line, from its sizes alone.

A Llama decoder has in each of its layers seven matrices, and three more arrays around them:

    q (d, d)   k (kv, d)   v (kv, d)   o (d, d)   gate (h, d)   up (h, d)   down (d, h)
    two norms (d,) in each layer and one at the end; the embedding (V, d), and the head (V, d) unless it is tied

where kv = d key_value_heads / heads.

What a step keeps until its backward has used it, in numbers for each token and layer:

    x of both norms          2 d                   the norms need it
    q, k, v, attention's y   2 d + 2 kv            attention needs it; its T x T matrix is computed again, never kept
    y of the first norm      d                     only dW, or dA, of q, k or v needs it
    y of the second norm     d                     only dW, or dA, of gate or up needs it
    gate, up                 2 h                   the activation and the product need them
    their product            h                     only dW, or dA, of down needs it

So an adapter saves no activation of its own matrix; it adds r. Only matrices without one save theirs, since a frozen
linear layer keeps nothing. The layers of this library keep more, such as attention's T x T matrix:
`minilora.layer.cache_bytes` counts what they keep.

Sources: Rajbhandari et al., "ZeRO", arXiv 1910.02054, section 3.1, for 16 bytes a number in full fine-tuning; Dettmers
et al., "QLoRA", arXiv 2305.14314, section 3, for 4 bits and the constants of their blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from ..checks import check_choice, check_flag, check_integer, check_sizes

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

CONSTANTS = {16: 0.0, 8: 32 / 4096, 4: 8 / 64 + 32 / (64 * 256)}
"""Bits a weight for the constants of its block: at 8 bits one float32 for 4096 weights, at 4 bits as in QLoRA."""


@dataclass(frozen=True)
class Decoder:
    """The sizes of a Llama decoder, under the names of this page. Sizes below 1 are a ValueError."""

    layers: int
    width: int  # d
    hidden: int  # h
    heads: int
    key_value_heads: int
    vocabulary: int  # V
    tied: bool = False  # whether the head is the embedding

    def __post_init__(self) -> None:
        check_sizes(**{field.name: getattr(self, field.name) for field in fields(self) if field.name != "tied"})
        check_flag("tied", self.tied)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The matrices of one layer, (out, in)."""
        d, h, kv = self.width, self.hidden, self.key_value_width
        return dict(zip(MATRICES, [(d, d), (kv, d), (kv, d), (d, d), (h, d), (h, d), (d, h)], strict=True))

    @property
    def key_value_width(self) -> int:
        """The width of k and of v."""
        return self.width * self.key_value_heads // self.heads

    @property
    def in_matrices(self) -> int:
        """How many numbers the matrices of all layers have."""
        return self.layers * sum(n_out * n_in for n_out, n_in in self.shapes.values())

    @property
    def elsewhere(self) -> int:
        """How many numbers the embedding, the head and the norms have."""
        return (1 if self.tied else 2) * self.vocabulary * self.width + (2 * self.layers + 1) * self.width


LLAMA_2_7B = Decoder(layers=32, width=4096, hidden=11008, heads=32, key_value_heads=32, vocabulary=32000)


def training_memory(
    model: Decoder, *, tokens: int, rank: int | None = None, targets: Sequence[str] = MATRICES, bits: int = 16,
    recompute: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Return the bytes that training keeps, by what they are for. Their sum is the least; a library needs more.

    Parameters
    ----------
    model : Decoder
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
        If a number is out of range, a target is unknown, or all weights are to train in fewer than 16 bits.
    """
    (tokens,), recompute = check_sizes(tokens=tokens), check_flag("recompute", recompute)
    check_choice("bits", bits, CONSTANTS)  # type: ignore[arg-type]
    for target in targets:
        check_choice("targets", target, MATRICES)
    parameters = model.in_matrices + model.elsewhere
    if rank is None:
        if bits != 16:
            raise ValueError(f"bits={bits} with rank=None: all weights train, and a trained weight needs bits=16")
        trained, gradient, targets = parameters, 2, MATRICES
    else:
        rank, gradient = check_integer("rank", rank, at_least=1), 4  # adapters train in float32
        trained = model.layers * sum(rank * sum(model.shapes[target]) for target in targets)
    layer = _kept_in_a_layer(model, targets) + (len(targets) * rank if rank else 0)
    kept = model.layers * (model.width if recompute else layer) + (layer if recompute else 0)
    return {
        "weights": round(model.in_matrices * (bits + CONSTANTS[bits]) / 8 + 2 * model.elsewhere),
        "trained": 4 * trained,
        "gradients": gradient * trained,
        "Adam": 8 * trained,
        "activations": 2 * tokens * kept,
        "logits": 4 * tokens * model.vocabulary,
    }


def _kept_in_a_layer(model: Decoder, targets: Sequence[str]) -> int:
    """Return how many numbers one layer keeps for each token."""
    d, h, kv = model.width, model.hidden, model.key_value_width
    reads_first_norm, reads_second_norm = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}
    first, second = (d if names & set(targets) else 0 for names in (reads_first_norm, reads_second_norm))
    return 4 * d + 2 * kv + first + second + 2 * h + (h if "down_proj" in targets else 0)
