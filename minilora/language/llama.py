"""Llama: the decoder of most open language models, built from layers that each have their own backward.

The input is token ids (B, T). The output is, for every position, the scores (logits) of the V possible next tokens:

    x_0 = E[ids]                        embed_tokens                       (B, T)    -> (B, T, d)
    u   = x + attention(norm_1(x))      input_layernorm, self_attn         (B, T, d) -> (B, T, d)
    x'  = u + mlp(norm_2(u))            post_attention_layernorm, mlp      (B, T, d) -> (B, T, d)
    z   = norm(x_L) W^T                 norm, lm_head                      (B, T, d) -> (B, T, V)

A block is two residual branches, y = x + f(norm(x))    (llama.1). The input of one affects y directly and through f:

    dx = dy + norm's backward of f's backward of dy    (llama.2)

So the gradient passes from block to block unchanged, and each branch adds its own contribution. No other formula is
derived here.

Module paths are those of transformers' `LlamaForCausalLM`, such as ``model.layers.0.self_attn.q_proj``, so an adapter
for one works with the other. A tied head is the embedding's own array under a second name.

Mistral without a sliding window, Qwen2 and Qwen3 are the same decoder with different biases and norms; Mixtral and
Qwen's mixtures also replace the MLP with a mixture of experts. See `LlamaConfig`.

Source: Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", arXiv 2302.13971.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backend import Backend, backend_of
from ..checks import Array, check_shape
from ..extras import requiring
from ..fast.blockwise import BlockwiseAttention
from ..fast.experts_by_rows import ExpertsByRows
from ..layer import Cache, Layer, Model, nest, rebuild, rows, trains
from ..layers.attention import Attention, Past
from ..layers.embedding import Embedding
from ..layers.gated import GatedMLP
from ..layers.mixture import MixtureOfExperts
from ..layers.norm import RMSNorm
from ..layers.quantized import FrozenQuantizedLinear
from ..layers.rotary import Rotary
from ..layers.router import Router
from ..layers.stacked import StackedLinear
from ..linear import Linear
from .config import LlamaConfig

Grads = dict[str, Array]


@dataclass(eq=False, repr=False)
class Block(Layer):
    """Attention followed by an MLP; each reads a normalised copy of its input, and adds its output to that input."""

    input_layernorm: RMSNorm
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    mlp: GatedMLP | MixtureOfExperts

    def forward(self, x: Array, at: Array | None = None) -> tuple[Array, Cache]:  # (B, T, d) -> (B, T, d)
        """Return y and a cache for both branches; with `at`, return only the M rows of y where it is true, (M, d).

        Attention reads all positions; the MLP processes each position separately.
        """
        u, attention_cache = branch(self.input_layernorm, self.self_attn, x)
        y, mlp_cache = branch(self.post_attention_layernorm, self.mlp, u if at is None else u[at])
        return y, (attention_cache, mlp_cache, at)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, Grads]:
        """Return dx (B, T, d) and the gradients of all trainable arrays."""
        attention_cache, mlp_cache, at = cache
        below = need_dx or trains(self.input_layernorm, self.self_attn)
        du, f, norm = branch_backward(self.post_attention_layernorm, self.mlp, dy, mlp_cache, need_dx=below)
        grads = nest("mlp", f) | nest("post_attention_layernorm", norm)
        if du is None:  # no lower layer trains, and the caller needs no dx
            return None, grads
        du = du if at is None else scatter_rows(du, at)
        dx, f, norm = branch_backward(self.input_layernorm, self.self_attn, du, attention_cache, need_dx=need_dx)
        return dx, nest("self_attn", f) | nest("input_layernorm", norm) | grads

    def extend(self, x: Array, past: Past | None) -> tuple[Array, Past]:  # (B, T, d) -> (B, T, d)
        """Return y for x at the positions after `past`, and a new `past` that includes x."""
        update, past = self.self_attn.extend(self.input_layernorm(x), past)
        u = x + update
        return u + self.mlp(self.post_attention_layernorm(u)), past


def branch(norm: Layer, f: Layer, x: Array) -> tuple[Array, Cache]:
    """Return x + f(norm(x)), and the caches of the norm and f."""
    h, norm_cache = norm.forward(x)
    update, f_cache = f.forward(h)
    y = x + update  # eq. (llama.1)
    return y, (norm_cache, f_cache)


def branch_backward(
    norm: Layer, f: Layer, dy: Array, cache: Cache, *, need_dx: bool
) -> tuple[Array | None, Grads, Grads]:
    """Return dx, the gradients of f, and the gradients of the norm."""
    norm_cache, f_cache = cache
    dh, f_grads = f.backward(dy, f_cache, need_dx=need_dx or trains(norm))
    if dh is None:
        return None, f_grads, {}
    dx_branch, norm_grads = norm.backward(dh, norm_cache, need_dx=need_dx)
    dx = dy + dx_branch if need_dx else None  # eq. (llama.2)
    return dx, f_grads, norm_grads


@dataclass(eq=False, repr=False)
class Decoder(Layer):
    """The decoder without its head: the embedding, the blocks and the final norm."""

    embed_tokens: Embedding
    layers: list[Block]
    norm: RMSNorm

    def forward(self, x: Array, at: Array | None = None) -> tuple[Array, Cache]:  # (B, T) ids -> (B, T, d)
        """Return y and the cache; with `at`, return only the M rows of y where it is true, (M, d).

        Only the last block receives `at`. The backward pass stops at the lowest layer that trains, so the layers below
        it keep no cache.
        """
        steps, caches = self.steps(), []
        lowest = next((i for i, (_, layer) in enumerate(steps) if trains(layer)), len(steps))
        for i, (_, layer) in enumerate(steps):
            x, cache = layer.forward(x, at) if at is not None and layer is self.layers[-1] else layer.forward(x)
            caches.append(cache if i >= lowest else None)
        return x, (lowest, caches)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[None, Grads]:
        """Return None, since ids have no gradient, and the gradients of all trainable arrays."""
        lowest, caches = cache
        grads: Grads = {}
        for i, (name, layer) in reversed(list(enumerate(self.steps()))[lowest:]):
            dy, layer_grads = layer.backward(dy, caches[i], need_dx=i > lowest)
            grads |= nest(name, layer_grads)
        return None, grads

    def __call__(self, x: Array) -> Array:
        """Return y without keeping any layer's cache."""
        for _, layer in self.steps():
            x = layer(x)
        return x

    def steps(self) -> list[tuple[str, Layer]]:
        """Return the layers by name, in the order in which they are applied."""
        blocks = [(f"layers.{i}", block) for i, block in enumerate(self.layers)]
        return [("embed_tokens", self.embed_tokens), *blocks, ("norm", self.norm)]

    def extend(self, ids: Array, past: list[Past] | None) -> tuple[Array, list[Past]]:  # (B, T) -> (B, T, d)
        """Return y for ids at the positions after `past`, and a new `past` that includes them: one entry per block."""
        x, after = self.embed_tokens(ids), list[Past]()
        entries: Sequence[Past | None] = past or [None] * len(self.layers)
        for block, before in zip(self.layers, entries, strict=True):
            x, entry = block.extend(x, before)
            after.append(entry)
        return self.norm(x), after


@dataclass(eq=False, repr=False)
class Llama(Layer):
    """A Llama decoder with its head, which turns hidden states into logits."""

    model: Decoder
    lm_head: Linear
    config: LlamaConfig
    source: Path | None = None  # the file or folder that it was loaded from, which also contains the tokenizer

    def forward(self, x: Array, at: Array | None = None) -> tuple[Array, Cache]:  # (B, T) ids -> (B, T, V)
        """Return the logits of the next token at every position, and the cache.

        With `at`, bool (B, T), return only the logits at the M positions where it is true, (M, V). This saves work when
        most targets do not count, as in a chat: from the last block's MLP on, no position reads another.
        """
        if at is not None and (at.dtype != bool or at.shape != x.shape):  # integers would be read as indices
            raise ValueError(f"at is {at.dtype} {tuple(at.shape)}, expected bool {tuple(x.shape)}")
        h, model_cache = self.model.forward(x, at)
        z, head_cache = self.lm_head.forward(rows(h))
        z = z.reshape(*h.shape[:-1], z.shape[-1])
        return z, (model_cache, head_cache, h.shape)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[None, Grads]:
        """Return None, since ids have no gradient, and the gradients of all trainable arrays."""
        model_cache, head_cache, shape = cache
        dh, grads = self.lm_head.backward(rows(dy), head_cache, need_dx=trains(self.model))
        below = {} if dh is None else self.model.backward(dh.reshape(shape), model_cache)[1]
        return None, nest("model", below) | nest("lm_head", grads)

    def __call__(self, x: Array) -> Array:
        """Return the logits without keeping any layer's cache."""
        z = self.lm_head(rows(self.model(x)))
        return z.reshape(*x.shape, z.shape[-1])

    def extend(self, ids: Array, past: list[Past] | None = None) -> tuple[Array, list[Past]]:  # (B, T) -> (B, V)
        """Return the logits after the last id, for ids at the positions after `past`, and the new `past`.

        Call ``logits, past = llama.extend(prompt)``, then ``llama.extend(token, past)`` with one new token (B, 1) at a
        time. The logits equal those of `forward` on the whole text, up to rounding, at the cost of one position each.
        """
        h, past = self.model.extend(ids, past)
        return self.lm_head(h[:, -1]), past

    @classmethod
    def build(cls, config: LlamaConfig, arrays: Mapping[str, Array]) -> Llama:
        """Build a model from its arrays, which must have the names and shapes of ``config.shapes()``.

        In place of a linear layer's weight, `arrays` may contain a frozen layer without a bias that keeps the weight
        quantised, such as a `minilora.QuantizedLinear`. A wrong shape raises ValueError, a missing array KeyError.
        """
        shapes = config.shapes()
        for name, shape in shapes.items():  # an array of another shape might broadcast
            check_shape(f"arrays[{name!r}]", arrays[name], shape)

        def linear(path: str) -> Linear:
            weight, bias = arrays[f"{path}.weight"], arrays[name] if (name := f"{path}.bias") in shapes else None
            return weight.with_bias(bias) if isinstance(weight, FrozenQuantizedLinear) else Linear(weight, bias)

        def norm(path: str) -> RMSNorm:
            return RMSNorm(arrays[f"{path}.weight"], config.rms_norm_eps)

        def gated(path: str) -> GatedMLP:
            return GatedMLP(*(linear(f"{path}.{name}_proj") for name in ("gate", "up", "down")))

        def mixture(path: str) -> MixtureOfExperts:
            sizes: Any = config.mixture
            weight, gate_up, down = (
                StackedLinear(arrays[f"{path}.{name}"])
                for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
            )
            router = Router(weight, sizes.num_experts_per_tok, sizes.norm_topk_prob)
            if sizes.shared_expert_intermediate_size is None:
                return MixtureOfExperts(router, ExpertsByRows(gate_up, down))
            shared = gated(f"{path}.shared_expert"), linear(f"{path}.shared_expert_gate")
            return MixtureOfExperts(router, ExpertsByRows(gate_up, down), *shared)

        def block(path: str) -> Block:
            q, k, v, o = (linear(f"{path}.self_attn.{name}_proj") for name in "qkvo")
            q_norm, k_norm = (norm(f"{path}.self_attn.{name}_norm") if config.qk_norm else None for name in "qk")
            attention = BlockwiseAttention(q, k, v, o, Rotary(config.frequencies), q_norm, k_norm)
            first, second = norm(f"{path}.input_layernorm"), norm(f"{path}.post_attention_layernorm")
            mixed = f"{path}.mlp.gate.weight" in shapes
            return Block(first, attention, second, mixture(f"{path}.mlp") if mixed else gated(f"{path}.mlp"))

        embedding = Embedding(arrays["model.embed_tokens.weight"])
        blocks = [block(f"model.layers.{i}") for i in range(config.num_hidden_layers)]
        head = Linear(embedding.weight) if config.tie_word_embeddings else linear("lm_head")
        return cls(Decoder(embedding, blocks, norm("model.norm")), head, config)

    @classmethod
    def load(
        cls, path: str | Path, *, dtype: Any = "float32", backend: Backend | None = None, keep_blocks: bool = False
    ) -> Llama:
        """Load a model from a Hugging Face folder, a .gguf file or a glassllm .npz file.

        `dtype` is "float32" or "float64"; half precision is widened exactly. With `keep_blocks`, linear layers of a
        .gguf file in Q4_0, Q4_1 or Q8_0 stay quantised. A damaged file, a model that is not a Llama decoder, or a
        setting that is not implemented raises a ValueError that names the problem, usually before weights are read.
        """
        with requiring("Llama.load"):
            from .files.weights import load  # imported here: building from arrays needs no package that reads files

        llama = cls.build(*load(path, dtype=dtype, backend=backend, keep_blocks=keep_blocks))
        llama.source = Path(path)
        return llama


# --- memory ---


@dataclass(eq=False, repr=False)
class CheckpointedBlock(Block):
    """A block that caches only its input. Its backward reruns the forward, with bit-identical results."""

    def forward(self, x: Array, at: Array | None = None) -> tuple[Array, Cache]:  # (B, T, d) -> (B, T, d)
        """Return y, and a cache that contains only the inputs."""
        y, _ = super().forward(x, at)
        return y, (x, at)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, Grads]:
        """Return dx (B, T, d) and the gradients of all trainable arrays."""
        return super().backward(dy, self.block_cache(*cache), need_dx=need_dx)

    def block_cache(self, x: Array, at: Array | None) -> Cache:
        """Return the cache that `Block.forward` would return."""
        return super().forward(x, at)[1]


def checkpointed(model: Model) -> Model:
    """Return a model with gradient checkpointing, which shares all arrays and has bit-identical gradients.

    Its L blocks cache only their inputs. A step then keeps L inputs and one block's cache at a time instead of L
    caches, at the cost of a second forward pass.
    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
    """

    def checkpointed_block(path: str, layer: Any) -> Any:
        if type(layer) is not Block:
            return layer
        return CheckpointedBlock(layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp)

    return rebuild(model, layer=checkpointed_block)  # type: ignore[no-any-return]


recomputed = checkpointed
"""The fifth edition's name for `checkpointed`."""


def scatter_rows(x: Array, at: Array) -> Array:  # (M, d), (B, T) -> (B, T, d)
    """Return an array with the rows of x at the M positions where `at` is true, and zeros elsewhere."""
    whole = backend_of(x).zeros((*at.shape, x.shape[-1]), x.dtype)
    whole[at] = x
    return whole
