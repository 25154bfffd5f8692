"""The layers of a language model under test, each with a second way to compute its forward: one number at a time."""

import math
from dataclasses import dataclass

import numpy as np

from minilora import Llama, LlamaConfig, LoRA, attach, gradcheck
from minilora.layers.rotary import frequencies
from minilora.verify.instances import EPS, ROTARY_BASE

from .claims import (
    CLAIMS,
    Arrays,
    Case,
    a_frozen_layer_only_passes_dx,
    backward_is_pure,
    backward_is_the_slope_of_forward,
    backward_without_dx_is_the_same,
    forward_is_the_reference,
    require_close,
)
from .loops import FUNCTIONS, Beside, case_of, child, linear_by_loops
from .problems import Problem


@dataclass(frozen=True)
class Heads:
    """How many heads, keys and positions, drawn from the problem's seed; a head is 2 or 4 wide."""

    kv: int
    group: int
    width: int
    positions: int

    @classmethod
    def of(cls, p: Problem) -> "Heads":
        rng = np.random.default_rng([p.seed, 7])
        return cls(int(rng.integers(1, 3)), int(rng.integers(1, 4)), 2 * int(rng.integers(1, 3)), 3 + p.n % 2)


def few(p: Problem) -> int:
    """Sequences in a batch: each entry is moved for its slope, and one or two will do."""
    return 1 + p.n % 2


def norm_by_loops(x, weight, eps=EPS):
    y = np.empty_like(x)
    for at in np.ndindex(x.shape[:-1]):
        r = math.sqrt(sum(v * v for v in x[at]) / x.shape[-1] + eps)
        y[at] = [v / r * g for v, g in zip(x[at], weight, strict=True)]
    return y


def turned(x, D):
    """Rows (T, D) as complex numbers: a rotation is then one product."""
    f = np.array([ROTARY_BASE ** (-2 * j / D) for j in range(D // 2)])
    z = (x[:, : D // 2] + 1j * x[:, D // 2 :]) * np.exp(1j * np.outer(np.arange(len(x)), f))
    return np.concatenate([z.real, z.imag], axis=1)


def on_rows(p: Arrays, x):
    return linear_by_loops(p, x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def attention_by_loops(p: Arrays, x, D):
    """Head by head and position by position, with a softmax over the positions that it may see."""
    q, k, v = (on_rows(child(f"{name}_proj", p), x) for name in "qkv")
    if "q_norm.weight" in p:
        q, k = (
            norm_by_loops(rows.reshape(*x.shape[:2], -1, D), p[f"{name}_norm.weight"]).reshape(rows.shape)
            for name, rows in zip("qk", (q, k), strict=True)
        )
    o = np.zeros_like(q)
    H, group = q.shape[-1] // D, q.shape[-1] // k.shape[-1]
    for b, h in np.ndindex(len(x), H):
        mine, shared = slice(h * D, (h + 1) * D), slice(h // group * D, (h // group + 1) * D)
        Q, K, V = turned(q[b, :, mine], D), turned(k[b, :, shared], D), v[b, :, shared]
        for t in range(x.shape[1]):
            scores = [Q[t] @ K[u] / math.sqrt(D) for u in range(t + 1)]
            largest = max(scores)
            shares = [math.exp(s - largest) for s in scores]
            o[b, t, mine] = sum(s * V[u] for u, s in enumerate(shares)) / sum(shares)
    return on_rows(child("o_proj", p), o)


def gated_by_loops(p: Arrays, x):
    gate, up = (on_rows(child(f"{name}_proj", p), x) for name in ("gate", "up"))
    return on_rows(child("down_proj", p), FUNCTIONS["silu"](gate) * up)


def attention_case(row: str = "Attention") -> Case:
    return case_of(row, lambda layer, p, x: attention_by_loops(p, x, layer.rotary.in_features))


def backward_is_the_slope_along_directions(case: Case, problem: Problem) -> None:
    """By complex step to 1e-12. A model has many arrays: of each, a few directions are moved, and not every entry."""
    params, dy = case.params(problem), case.dy(problem)
    grads = case.gradients(problem, params, dy)
    gradcheck(case.output(problem), params, grads, cotangent=dy, method="complex", tolerance=1e-12, every_entry_below=0)


MODEL_CLAIMS = (
    backward_is_the_slope_along_directions,
    *(claim for claim in CLAIMS if claim is not backward_is_the_slope_of_forward),
)
# What differs where only some layers train; the rest is the same code as in a decoder that trains whole.
ADAPTED_CLAIMS = (
    backward_is_the_slope_along_directions,
    forward_is_the_reference,
    backward_is_pure,
    backward_without_dx_is_the_same,
    a_frozen_layer_only_passes_dx,
)


def small_config(c: Problem, *, tied: bool = False) -> LlamaConfig:
    h = Heads.of(c)
    return LlamaConfig(
        vocab_size=c.out_features + 4, hidden_size=c.in_features + 1, intermediate_size=c.rank + 1, num_hidden_layers=2,
        num_attention_heads=h.kv * h.group, num_key_value_heads=h.kv, head_dim=h.width, rms_norm_eps=EPS,
        frequencies=frequencies(h.width, ROTARY_BASE), tie_word_embeddings=tied, attention_bias=c.bias, mlp_bias=c.bias,
    )  # fmt: skip


def llama_arrays(c: Problem, config: LlamaConfig) -> Arrays:
    return {name: c.randn(name, *shape) / (1 + (len(shape) > 1)) for name, shape in config.shapes().items()}


def llama_ids(c: Problem) -> np.ndarray:
    """Some id comes twice, and not all are alike: then every position would read the same, whatever the scores."""
    V = c.out_features + 4
    ids = np.random.default_rng([c.seed, 1]).integers(0, V, (few(c), Heads.of(c).positions))
    ids[:, -1] = ids[:, 0]
    ids[:, 1] = (ids[:, 0] + 1) % V
    return ids


def llama_by_loops(c: Problem, p: Arrays, ids: np.ndarray) -> np.ndarray:
    x = np.stack([[p["model.embed_tokens.weight"][i] for i in row] for row in ids])
    for i in range(2):
        block = child(f"model.layers.{i}", p)
        h = norm_by_loops(x, block["input_layernorm.weight"])
        x = x + attention_by_loops(child("self_attn", block), h, Heads.of(c).width)
        h = norm_by_loops(x, block["post_attention_layernorm.weight"])
        x = x + gated_by_loops(child("mlp", block), h)
    head = p.get("lm_head.weight", p["model.embed_tokens.weight"])
    return on_rows({"weight": head}, norm_by_loops(x, p["model.norm.weight"]))


def llama_case(*targets: str) -> Case:
    """A decoder whose every array trains; or one with LoRA beside the layers at these paths, and nothing else."""

    def arrays(c: Problem) -> Arrays:
        frozen = llama_arrays(c, small_config(c))
        if not targets:
            return frozen
        found = {}
        for path in targets:
            out, width = frozen[f"{path}.weight"].shape
            found[f"{path}.lora_A"] = c.randn(f"{path} A", c.rank, width)
            found[f"{path}.lora_B"] = c.randn(f"{path} B", out, c.rank) / 8
        return found

    def build(c: Problem, p: Arrays) -> Beside:
        if not targets:
            return Beside(Llama.build(small_config(c), p), llama_ids(c))
        dtype = p[f"{targets[0]}.lora_A"].real.dtype
        base = {name: a.astype(dtype) for name, a in llama_arrays(c, small_config(c)).items()}
        beside = {path: LoRA(**child(path, p), alpha=1.5) for path in targets}
        return Beside(attach(Llama.build(small_config(c), base), beside), llama_ids(c))

    def reference(c: Problem, p: Arrays, x: np.ndarray) -> np.ndarray:
        whole = p if not targets else llama_arrays(c, small_config(c))
        for path in targets:
            delta = 1.5 / c.rank * p[f"{path}.lora_B"] @ p[f"{path}.lora_A"]
            whole[f"{path}.weight"] = whole[f"{path}.weight"] + delta
        return x + llama_by_loops(c, whole, llama_ids(c))

    def x(c: Problem) -> np.ndarray:
        return c.randn("x", few(c), Heads.of(c).positions, c.out_features + 4)

    name = f"Llama with LoRA on {', '.join(targets)}" if targets else "Llama"
    return Case(name, arrays, build, reference, x, ADAPTED_CLAIMS if targets else MODEL_CLAIMS)


def extended_by_its_past_is_the_whole(case: Case, problem: Problem) -> None:
    """One position, and the others with its keys and values."""
    params = case.params(problem)
    layer, x = case.build(problem, params), params["x"]
    first, past = layer.extend(x[..., :1, :], None)
    others, _ = layer.extend(x[..., 1:, :], past)
    require_close("the output of all", np.concatenate([first, others], axis=-2), layer(x), 1e-12)


LANGUAGE_CASES = (
    case_of("RMSNorm", lambda layer, p, x: norm_by_loops(x, p["weight"])),
    case_of("Rotary", lambda layer, p, x: np.stack([turned(rows, x.shape[-1]) for rows in x])),
    case_of("GatedMLP", lambda layer, p, x: gated_by_loops(p, x)),
    attention_case(),
    attention_case("Attention, q and k normed"),
    attention_case("Attention, by blocks"),
    llama_case(),
    llama_case("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"),
    llama_case("model.layers.1.mlp.up_proj", "lm_head"),
)
