"""Compute a Llama decoder's logits in float64, bit-identical on every processor.

The logits equal those of `minilora.language.llama` up to rounding; a test compares the two. The last bits of that model
depend on the BLAS, which adds terms in its own order, and on NumPy's exp, cos and sin, which differ between processors.
The functions here use only sums, products, quotients and roots, whose rounding IEEE 754 defines, and add one term after
another.

A weight may have an extra leading axis, (v, out, in), for v decoders that differ in it. They are computed together.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

import numpy as np

from ...language.config import LlamaConfig, MixtureConfig

LN2 = 0.6931471805599453
LN2_HIGH = 0.693147180369123816490  # its leading 32 bits, so that n times it is exact
LN2_LOW = 1.90821492927058770002e-10
TERMS = 14
"""The number of terms of the series for exp(r), where |r| is at most ln(2) / 2; the next one is below 1e-17."""


def exp(x: np.ndarray) -> np.ndarray:
    """Return e^x, computed as 2^n e^r with an integer n."""
    n = np.rint(x / LN2)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    e = np.ones_like(r)
    for k in range(TERMS, 0, -1):
        e = 1 + e * r / k
    return np.asarray(np.ldexp(e, n.astype(int)))


def cos_sin(angle: np.ndarray, halvings: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines and sines, from series at the angle halved `halvings` times (to 1 or less) and then doubled."""
    part = angle / 2**halvings
    z = -(part**2)
    cos, sin = np.ones_like(z), np.ones_like(z)
    for k in range(9, 0, -1):
        cos, sin = 1 + cos * z / ((2 * k - 1) * 2 * k), 1 + sin * z / (2 * k * (2 * k + 1))
    sin = sin * part
    for _ in range(halvings):
        cos, sin = cos * cos - sin * sin, 2 * sin * cos
    return cos, sin


def product(x: np.ndarray, W: np.ndarray) -> np.ndarray:  # (..., N, in), (..., out, in) -> (..., N, out)
    """Return x W^T, adding the terms from first to last."""
    left, right = x[..., None], np.ascontiguousarray(np.swapaxes(W, -1, -2))[..., None, :, :]
    total = left[..., 0, :] * right[..., 0, :]
    term = np.empty_like(total)
    for k in range(1, x.shape[-1]):
        total += np.multiply(left[..., k, :], right[..., k, :], out=term)
    return np.asarray(total)


def sums(x: np.ndarray) -> np.ndarray:  # (..., n) -> (..., 1)
    """Return the sums along the last axis, adding the terms from first to last."""
    return np.asarray(np.cumsum(x, axis=-1)[..., -1:])


def exact_frequencies(width: int, theta: float) -> tuple[float, ...]:
    """Return the rotary frequencies theta^(-2j / width), each rounded once."""
    return tuple(float(Decimal(theta) ** (Decimal(-2 * j) / width)) for j in range(width // 2))


def gated(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return silu(a) b."""
    return np.asarray(a / (1 + exp(-a)) * b)


def router_weights(scores: np.ndarray, mixture: MixtureConfig) -> np.ndarray:  # (..., N, E) -> (..., N, E)
    """Return each row's weight for each expert, from the router's scores; 0 for experts outside its top k."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    kept = np.argsort(order, axis=-1, kind="stable") < mixture.num_experts_per_tok
    e = exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(kept * e / sums(kept * e if mixture.norm_topk_prob else e))


def expert_outputs(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:  # (..., N, d) -> (..., E, N, d)
    """Return the output of each expert for each row."""
    a, b = np.split(product(x[..., None, :, :], gate_up), 2, axis=-1)
    return product(gated(a, b), down)


def sum_of_experts(g: np.ndarray, o: np.ndarray) -> np.ndarray:  # (..., N, E), (..., E, N, d) -> (..., N, d)
    """Return each row's weighted sum over experts, added from the first expert to the last."""
    parts = np.swapaxes(g, -1, -2)[..., None] * o
    return np.asarray(np.cumsum(parts, axis=-3)[..., -1, :, :])


def exact_logits(
    config: LlamaConfig, arrays: Mapping[str, np.ndarray], ids: np.ndarray, cached: int = 0, last: int = 0,
    mixture: MixtureConfig | None = None, plain: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:  # fmt: skip
    """Compute the logits (..., B, T, V) of token ids (B, T).

    `arrays` are those of `LlamaConfig.shapes` in float64, always with ``lm_head.weight``. A linear layer's bias is
    added if it is among them. With several decoders, all use the first one's keys and values at the first `cached`
    positions, as from a cache. With `last`, only the logits after the last `last` tokens are computed, and T is `last`
    in the result's shape. `mixture` replaces the configuration's. `plain` has a mixture's arrays without adapters; if
    it is given, the adapters' contributions are not scaled by the router's weights.
    """
    B, T = ids.shape
    D, K = config.head_dim, config.num_key_value_heads
    g = config.num_attention_heads // K
    cos, sin = cos_sin(np.arange(T)[:, None] * np.array(config.frequencies), 6 if T <= 64 else 12)

    def linear(path: str, x: np.ndarray) -> np.ndarray:
        y = product(x, arrays[f"{path}.weight"])
        bias = arrays.get(f"{path}.bias")
        return y if bias is None else y + bias[..., None, :]

    def norm(path: str, x: np.ndarray) -> np.ndarray:
        return np.asarray(x / np.sqrt(sums(x * x) / x.shape[-1] + config.rms_norm_eps) * arrays[f"{path}.weight"])

    def split(x: np.ndarray, heads: int) -> np.ndarray:  # (..., B T, heads D) -> (..., B, heads, T, D)
        return np.moveaxis(x.reshape(*x.shape[:-2], B, T, heads, D), -2, -3)

    def rotated(x: np.ndarray) -> np.ndarray:
        x1, x2 = x[..., : D // 2], x[..., D // 2 :]
        return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)

    def from_cache(x: np.ndarray) -> np.ndarray:  # (v, B, heads, T, D)
        if cached and x.ndim == 5:  # one x is shared until the weights differ
            x = x.copy()
            x[1:, ..., :cached, :] = x[:1, ..., :cached, :]
        return x

    def attention(path: str, x: np.ndarray, ends: int) -> np.ndarray:  # (..., B T, h) -> (..., B ends, h)
        q = rotated(split(linear(f"{path}.q_proj", x), K * g))[..., T - ends :, :]
        k = from_cache(rotated(split(linear(f"{path}.k_proj", x), K))).repeat(g, axis=-3)
        v = from_cache(split(linear(f"{path}.v_proj", x), K)).repeat(g, axis=-3)
        S = D**-0.5 * product(q, k)
        e = exp(S - S.max(axis=-1, keepdims=True)) * np.tri(T)[T - ends :]
        o = product(e / sums(e), np.swapaxes(v, -1, -2))
        return linear(f"{path}.o_proj", np.moveaxis(o, -3, -2).reshape(*o.shape[:-4], B * ends, K * g * D))

    def mlp(path: str, x: np.ndarray) -> np.ndarray:
        sizes = mixture or config.mixture
        if sizes is not None and path.endswith(".mlp") and sizes.has_mixture(int(path.split(".")[2])):
            return mixed(path, x, sizes)
        return linear(f"{path}.down_proj", gated(linear(f"{path}.gate_proj", x), linear(f"{path}.up_proj", x)))

    def mixed(path: str, x: np.ndarray, sizes: MixtureConfig) -> np.ndarray:
        g = router_weights(product(x, arrays[f"{path}.gate.weight"]), sizes)
        names = [f"{path}.experts.gate_up_proj", f"{path}.experts.down_proj"]
        o = expert_outputs(x, *(arrays[name] for name in names))
        if plain is None:
            y = sum_of_experts(g, o)
        else:
            without = expert_outputs(x, *(plain[name] for name in names))
            y = sum_of_experts(g, without) + sum_of_experts(np.where(g > 0, 1.0, 0.0), o - without)
        if sizes.shared_expert_intermediate_size is None:
            return y
        q = 1 / (1 + exp(-linear(f"{path}.shared_expert_gate", x)))
        return np.asarray(y + q * mlp(f"{path}.shared_expert", x))

    x = arrays["model.embed_tokens.weight"][..., ids.ravel(), :]
    for i in range(config.num_hidden_layers):
        block, ends = f"model.layers.{i}", last if last and i == config.num_hidden_layers - 1 else T
        y = attention(f"{block}.self_attn", norm(f"{block}.input_layernorm", x), ends)
        x = x.reshape(*x.shape[:-2], B, T, -1)[..., T - ends :, :].reshape(*x.shape[:-2], B * ends, -1) + y
        x = x + mlp(f"{block}.mlp", norm(f"{block}.post_attention_layernorm", x))
    z = linear("lm_head", norm("model.norm", x))
    return z.reshape(*z.shape[:-2], B, ends, z.shape[-1])
