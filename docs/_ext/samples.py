"""Random arrays under the names that the equations and the code use, for `equations` to compute both with.

All sizes differ, so that a transposed factor does not fit, and no scale is 1, so that a lost one is seen. Where the
code has another name for a symbol, both names are here, ``x`` and ``X``. What was computed before a line, as ``h``, is
computed from the others, so that a line can be compared with its whole equation. A function's own names are the names
that an equation and its line may speak of; `printed` has those that stand in the formula alone.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np

from minilora import (
    NF4,
    Adapter,
    Conv1d,
    DoRA,
    DoRAAdapter,
    Embedding,
    Linear,
    LoRA,
    LoRALinear,
    RMSNorm,
    dequantize_nf4,
    quantize_nf4,
)
from minilora.layers.experts import Router
from minilora.layers.nf4 import scale_book
from minilora.layers.stacked import StackedLinear
from minilora.variants.adapter import Rewritten
from minilora.variants.dropout import DroppingLoRALinear

N, IN, OUT, ALPHA = 7, 5, 4, 6.5
RANKS = (3, 1)  # rank 1 has a product of its own, `minilora.lora.widen`

Names = dict[str, Any]


def samples(label: str, rank: int) -> Names:
    """Return new arrays for an equation, always the same for the same label and rank."""
    group, _, number = label.rpartition(".")
    if label in GROUPS:
        group = label
    elif not group:
        group = next(
            name for name, last in (("layer", 16), ("residual", 19), ("adam", 24), ("best", 27)) if int(number) <= last
        )
    if group not in GROUPS:
        raise LookupError(f"({label}) has no arrays: docs/_ext/samples.py needs a function, and its name in GROUPS")
    rng = np.random.default_rng(0)
    return {"np": np, "xp": np, "einsum": np.einsum, "need_dx": True, **GROUPS[group](rng.standard_normal, rng, rank)}


def layer(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (1) to (16): a base, its adapter, and the loss. `layers` has what ``self`` is, by its class."""
    X = x = randn((N, IN))
    W, bias, A, B, s = randn((OUT, IN)), randn(OUT), randn((r, IN)), randn((OUT, r)), ALPHA / r
    b, dy, dh, p, t, h = bias, randn((N, OUT)), randn((N, r)), randn((N, OUT)), randn((N, OUT)), x @ A.T
    dH, update, dx_adapter, error, count = dh, s * h @ B.T, dh @ A, p - t, N * OUT
    base, adapter = Linear(W, b), LoRA(A, B, ALPHA)
    layers = {"Linear": base, "LoRA": adapter, "LoRALinear": LoRALinear(base, adapter)}
    printed = {"N": N, "out": OUT, "alpha": ALPHA, "r": r, "DeltaW": s * B @ A}
    return locals()


def residual(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (17) to (19)."""
    X, T, W, A, B, s = randn((N, IN)), randn((N, OUT)), randn((OUT, IN)), randn((r, IN)), randn((OUT, r)), ALPHA / r
    R, H, c = T - X @ W.T, X @ A.T, 2 * s / (N * OUT)
    RtH, RB = R.T @ H, R @ B
    return locals()


def adam(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (20) to (24), in step 3, and of (decay.1)."""
    g, m, theta, m_hat, v, v_hat = randn(6), randn(6), randn(6), randn(6), rng.random(6), rng.random(6)
    t, beta1, beta2, lr, eps, decay = 3, 0.8, 0.95, 0.03, 0.1, 0.4
    printed = {"beta_1": beta1, "beta_2": beta2, "epsilon": eps, "mhat": m_hat, "vhat": v_hat, "lambda": decay}
    printed |= {f"{name}_{when}": of for name, of in (("m", m), ("v", v), ("theta", theta)) for when in ("t", "t-1")}
    return locals()


def clipped(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (clip.1) and (clip.2): gradients that are longer than C, and shorter ones; (clip.2) is of one of them."""
    grads, norm, most = {"A": randn((r, IN)), "B": randn((OUT, r))}, 2.5, 0.7 if r == 1 else 3.1
    printed = {"g": np.append(grads["A"], grads["B"]), "n": norm, "C": most}
    return locals()


def clipped_alone(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (clip.2), of one gradient."""
    names = clipped(randn, rng, r)
    A = names["grads"]["A"]
    return names | {"grads": {"A": A}, "printed": names["printed"] | {"g": A}}


def best(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (25) to (27)."""
    T, Z, D = randn((N, IN)), randn((N, OUT)), randn((OUT, IN))
    V = np.linalg.svd(T @ D.T, full_matrices=False)[2][:r].T
    printed = {"V_r": V}
    return locals()


def activation(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (act.1) to (act.6)."""
    x, dy = randn((N, IN)), randn((N, IN))
    mask, y, q = x > 0, np.tanh(x), 1 / (1 + np.exp(-x))
    return locals()


def cross_entropy(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (ce.1) to (ce.3): z, the ids t, and M, the number of the rows that count; two rows do not."""
    z, t, counts = randn((N, OUT)), rng.integers(0, OUT, N), np.arange(N) % 4 != 1
    e, M, ids = np.exp(z), counts.sum(), t[:, None]
    total, share = e.sum(axis=1, keepdims=True), counts[:, None] / M
    q = e / total
    log_q_t = np.where(counts, np.log(q[np.arange(N), t]), 0)[:, None]
    printed = {"C": np.flatnonzero(counts)}
    return locals()


def sequential(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (seq.1) and (seq.2), where layer i is a linear one."""
    x, dx, W, i, below = randn((N, IN)), randn((N, OUT)), randn((OUT, IN)), 0, True
    layer = Linear(W)
    caches, printed = [layer.forward(x)[1]], {"x_i": x, "x_i-1": x, "f_i": lambda x: x @ W.T}
    return locals()


def flatten(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (flat.1) and (flat.2): 3 channels of 5 entries."""
    shape = N, 3, IN
    x, dy = randn(shape), randn((N, 3 * IN))
    printed = {"dy": dy.reshape(shape)}
    return locals()


def embedding(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (emb.1) and (emb.2): a table W of 6 vectors, N ids of which some repeat, and their one-hot rows."""
    W, ids, dy, dW = randn((6, OUT)), rng.integers(0, 6, N), randn((N, OUT)), np.zeros((6, OUT))
    layers, printed = {"Embedding": Embedding(W)}, {"X": np.eye(6)[ids]}
    X = layers["Embedding"].rewrite(ids)
    return locals()


def convolution(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (conv.1), at entry k of the kernel: stride s, dilation d, P positions, x with its padding."""
    s, d, k, P = 2, 3, 1, 4
    offset, window = (k,), (slice(d * k, d * k + s * (P - 1) + 1, s),)
    padded = x = randn((N, 3, s * (P - 1) + d * 2 + 1))
    return locals()


def convolution_back(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (conv.2): there the code has the channels first."""
    known = convolution(randn, rng, r)
    padded = dx = randn((3, N, known["x"].shape[2]))
    dz = randn((3, 2, N, known["P"]))
    return known | {"dx": dx, "padded": padded, "dz": dz}


def rewritten(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (rw.1) to (rw.4), for a convolution of 3 channels. T is the rewriting as a matrix, from x to z."""
    shape, kernel, P = (2, 3, 9), 2, 4
    base = Conv1d(randn((OUT, 3, kernel)), randn(OUT), stride=2, dilation=2)
    A, B, s, x, W, b = (
        randn((r, 3 * kernel)),
        randn((OUT, r)),
        ALPHA / r,
        randn(shape),
        base.as_linear().weight,
        base.bias,
    )
    layers = {"Rewritten": Rewritten(base, LoRA(A, B, ALPHA))}
    T = np.stack([base.rewrite(e).ravel() for e in np.eye(x.size).reshape(-1, *shape)], axis=1)
    z, layer, input_gradient = base.rewrite(x), layers["Rewritten"].on_rows(), base.input_gradient
    rows_cache, u, du = layer.forward(z)[1], randn((2 * P, OUT)), randn((2 * P, OUT))
    printed = {
        "T": lambda x: (T @ x.ravel()).reshape(z.shape),
        "T^*": lambda dz: (T.T @ dz.ravel()).reshape(shape),
        "R": lambda u: np.stack([u.reshape(-1, P, OUT)[:, :, o] for o in range(OUT)], axis=1),
        "V": W + s * B @ A,
    }
    return locals()


def dora(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (dora.1) to (dora.8)."""
    W, b, m, A, B, s = randn((OUT, IN)), randn(OUT), rng.random(OUT), randn((r, IN)), randn((OUT, r)), ALPHA / r
    layers = {"DoRA": DoRA(Linear(W, b), DoRAAdapter(A, B, ALPHA, magnitude=m, dora_norm="full"))}
    n, g, dm, dn = (rng.random(OUT) for _ in range(4))
    V, dV, u, dy = W + s * B @ A, randn((OUT, IN)), randn((N, OUT)), randn((N, OUT))
    return locals()


def pissa(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (pissa.1) to (pissa.3), of a rank above 1; A0 and B0 are the start."""
    r, alpha, join, times = max(r, 2), ALPHA, np.concatenate, 2
    W, b, A, B, A0, B0 = randn((OUT, IN)), randn(OUT), randn((r, IN)), randn((OUT, r)), randn((r, IN)), randn((OUT, r))
    s, linear, adapter = ALPHA / r, Linear(W, b), LoRA(A, B, ALPHA)
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    root = np.sqrt(S[:r] / s)
    printed = {"u": U[:, :r], "v": Vt[:r].T, "A_0": A0, "B_0": B0}
    return locals()


def weighted(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (sum.1): two adapters of weights w1 and w2; in the code B and A are lists at first."""
    A1, A2, B1, B2, w1, w2 = randn((r, IN)), randn((2, IN)), randn((OUT, r)), randn((OUT, 2)), 0.7, -1.3
    s1, s2 = ALPHA / r, ALPHA / 2
    B, A = [w1 * s1 * B1, w2 * s2 * B2], [A1, A2]
    of = {"A": (A1, A2), "B": (B1, B2), "w": (w1, w2), "s": (s1, s2)}
    printed = {f"{name}_{j}": two[j - 1] for name, two in of.items() for j in (1, 2)}
    return locals()


def added(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (sum.5): the factors of two adapters of one rank; c1 and c2 are w s of each."""
    As, Bs, c1, c2 = [randn((r, IN)), randn((r, IN))], [randn((OUT, r)), randn((OUT, r))], 0.7, -1.3
    roots, signed = [0.7**0.5, 1.3**0.5], [0.7**0.5, -(1.3**0.5)]
    printed = {"c": np.array([c1, c2]), "A": np.stack(As, axis=-1), "B": np.stack(Bs, axis=-1)}
    return locals()


def small(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (sum.2) and (sum.3), for an adapter of rank 3."""
    A, B, s, r, linalg = randn((3, IN)), randn((OUT, 3)), ALPHA / 3, min(r, 2), np.linalg
    (Q_A, R_A), (Q_B, R_B), adapter = np.linalg.qr(A.T), np.linalg.qr(B), LoRA(A, B, ALPHA)
    U, S, Vt = np.linalg.svd(s * R_B @ R_A.T, full_matrices=False)
    root, printed = np.sqrt(S[:r]), {"U_r": U[:, :r], "S_r": np.diag(S[:r]), "V_r": Vt[:r].T, "B_r": None, "A_r": None}
    printed["at"] = {"k": range(1, 4)}
    return locals()


def dropout(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (drop.1) to (drop.3), with a mask m."""
    names, m, p = layer(randn, rng, r), rng.random((N, IN)) >= 0.3, 0.3
    dropped, dx_dropped, both = m * names["x"] / 0.7, names["dh"] @ names["A"], names["layers"]["LoRALinear"]
    update = names["s"] * dropped @ names["A"].T @ names["B"].T
    layers = {"DroppingLoRALinear": DroppingLoRALinear(both.base, both.adapter, 0.3, (1,))}
    printed = {"x'": dropped, "dx'": dx_dropped}
    return names | locals()


def rates(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (rate.1) to (rate.4): a step in the warmup, or one behind it."""
    t, w, T, u, d = 2 if r == 1 else 9, 4, 20, 0.3, 0.7
    printed = {"u_t": u, "f_t": None, "d": lambda u: {0.3: 0.7}[u]}
    return locals()


def scaling(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (rs.1) and (lp.1)."""
    alpha, rank, use_rslora, lr, ratio = ALPHA, 3, True, 0.02, 16.0
    printed = {"r": rank, "lambda": ratio, "lr_A": lr, "lr_B": 0.32}
    return locals()


def norm(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (norm.1) to (norm.4). Here r is the root mean square of each row."""
    x, dy, g, eps, d = randn((N, IN)), randn((N, IN)), randn(IN), 0.3, IN
    r = np.sqrt((x**2).mean(axis=1, keepdims=True) + eps)  # type: ignore[assignment]
    mean, layers = (dy * g * x / r).mean(axis=1, keepdims=True), {"RMSNorm": RMSNorm(g, eps)}
    printed = {"xhat": x / r, "dxhat": dy * g, "varepsilon": eps}
    return locals()


def branch(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (llama.1) and (llama.2), where F is linear."""
    known = norm(randn, rng, r)
    W, of, x, g, root, d = randn((IN, IN)), known["layers"]["RMSNorm"], *(known[name] for name in ("x", "g", "r", "d"))
    h, cache = of.forward(x)
    update, dx_branch = h @ W.T, of.backward(known["dy"] @ W, cache)[0]
    slope = np.eye(d) / root[..., None] - np.einsum("ni,nj->nij", x, x) / (d * root[..., None] ** 3)
    printed = {
        **{"norm": lambda x: x / root * g, "norm's backward of": lambda dh: np.einsum("ni,i,nij->nj", dh, g, slope)},
        **{"F": lambda h: h @ W.T, "F's backward of": lambda dy: dy @ W},
    }
    return known | {"W": W, "update": update, "dx_branch": dx_branch, "printed": printed}


def gate(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (gate.1) to (gate.4)."""
    x, dz, da, db = randn((N, IN)), randn((N, OUT)), randn((N, OUT)), randn((N, OUT))
    W_a, W_b, W_c = randn((OUT, IN)), randn((OUT, IN)), randn((IN, OUT))
    a, b, dx_a, dx_b = x @ W_a.T, x @ W_b.T, da @ W_a, db @ W_b
    q = 1 / (1 + np.exp(-a))
    u, p = a * q, b * (q + a * q * (1 - q))
    printed = {"f": lambda a: a / (1 + np.exp(-a)), "f'": lambda a: q * (1 + a * (1 - q))}
    printed |= {"x": x, "W_c": W_c, "y": u * b @ W_c.T, "z": u * b}
    return {name: of for name, of in locals().items() if name not in printed} | {"printed": printed}


def generation(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (gen.1) to (gen.3): scores z, a temperature c, and two values of P."""
    z, c, P = randn(IN), 0.7, 0.6 if r == 1 else 0.95
    e, a = np.exp((z - z.max()) / c), rng.random(IN)
    q, a = e / e.sum(), a * (a > a.min())
    order = np.argsort(-q)
    return locals()


def sorted_shares(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (gen.2), which speaks of shares from the largest on."""
    known = generation(randn, rng, r)
    return known | {"printed": {"q": np.sort(known["q"])[::-1]}}


def rotary(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (rope.1) to (rope.4): rows of 6 entries. R[t] is the rotation at position t, as a matrix."""
    D = width = 6
    half, base = 3, 50.0
    x, dy, a = randn((N, D)), randn((N, D)), np.outer(np.arange(N), (1.0, 0.4, 0.16))
    cos, sin, R, x1, x2 = np.cos(a), np.sin(a), np.zeros((N, D, D)), x[:, :half], x[:, half:]
    for j in range(half):
        R[:, j, j] = R[:, j + half, j + half] = cos[:, j]
        R[:, j, j + half], R[:, j + half, j] = -sin[:, j], sin[:, j]
    del j  # an index of the formulas
    return locals()


def attention(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (att.1) to (att.9): 2 sequences, 2 key heads of 3 heads each, 4 queries after one earlier position, D = 3."""
    B, K, g, T, U, D = 2, 2, 3, 4, 5, 3
    q, k, v, do = randn((B, K, g, T, D)), randn((B, K, U, D)), randn((B, K, U, D)), randn((B, K, g * T, D))
    later = np.tile(np.arange(U) > np.arange(U - T, U)[:, None], (g, 1))  # (g T, U)
    S = np.where(later, -np.inf, randn((B, K, g * T, U)))
    P = np.exp(S) / np.exp(S).sum(axis=-1, keepdims=True)
    names = {"q": q, "q_rows": q.reshape(B, K, g * T, D), "k_rows": k, "v_rows": v, "do_rows": do, "c": D**-0.5}
    printed = {"q": names["q_rows"], "k": k, "v": v, "do": do, "D": D}
    names["printed"] = printed | {"at": {"t": np.tile(np.arange(U - T, U), g), "u": range(U), "w": range(U)}}
    names |= {"S": S, "P": P, "dP": randn(P.shape), "dS": randn(P.shape)}
    for name, width in (("q", 6), ("k", 4), ("v", 3)):
        d, W = randn((N, width)), randn((width, IN))
        names |= {f"d{name}": d, f"W_{name}": W, f"dx_{name}": d @ W}
    return names


def routed(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (moe.1) to (moe.4), (moe.14) and (moe.15): four experts, of which a row keeps two."""
    E, K, n = 4, 2, N
    x, W, dp, d_scores, scores, f = (
        randn((N, IN)),
        randn((E, IN)),
        randn((N, E)),
        randn((N, E)),
        randn((N, E)),
        rng.random(E),
    )
    choice = np.argsort(-scores, axis=1)[:, :K]
    p = np.where((choice[:, :, None] == np.arange(E)).any(axis=1), np.exp(scores), 0)
    p /= p.sum(axis=1, keepdims=True)
    layers = {"Router": Router(StackedLinear(W), K)}
    weight_cache = layers["Router"].weight.forward(x)[1]
    printed = {"dl": d_scores, "l": scores, "S": np.array([{*kept} for kept in choice]), "c": choice}
    return locals() | {"N": N}


def stack(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (moe.5) to (moe.7): expert 1 of three, which has the rows 2 to 4."""
    x, dy, W, e, part = randn((N, IN)), randn((N, OUT)), randn((3, OUT, IN)), 1, slice(2, 5)
    printed = {"x": x[part], "dy": dy[part], "fixed": {"e": e}}
    return locals()


def mixed(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (moe.8) to (moe.13): each row keeps three experts."""
    g, o, s, q, routed = rng.random((N, 3)), randn((N, 3, IN)), randn((N, IN)), rng.random((N, 1)), randn((N, IN))
    dy = d_rows = randn((N, IN))
    return locals()


def packed(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (moe.16) and (moe.17): the factors of four experts."""
    E = experts = 4
    A, B = randn((E * r, IN)), randn((OUT, r * E))
    return locals()


def blockwise(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (blk.1) to (blk.13): a block of 4 queries, 3 heads for each key, and of 5 keys; Z and N are sums so far."""
    B, K, g, n, J, D = 2, 2, 3, 4, 5, 3
    rows = {name: randn((B, K, g * n, 1)) for name in ("m", "m_new", "f", "dZ")}
    rows["Z"] = rows["Z_rows"] = 1 + rng.random((B, K, g * n, 1))
    rows |= {name: randn((B, K, g * n, D)) for name in ("N", "do_rows", "q_rows", "dq_rows")}
    rows |= {"o_rows": rows["N"] / rows["Z"], "dN": rows["do_rows"] / rows["Z"]}
    names: Names = rows | {name: randn((B, K, J, D)) for name in ("k_rows", "v_rows")}
    names |= {name: randn((B, K, g * n, J)) for name in ("S", "E", "dE", "dS")}
    names |= {name: randn((B, K, 1, J + 2, D)) for name in ("dk", "dv")}
    names |= {"c": D**-0.5, "cq_rows": D**-0.5 * rows["q_rows"], "u": slice(2, 2 + J)}
    known = {name: names[f"{name}_rows"] for name in ("k", "v", "q", "do", "o", "dq")}
    known |= {"m'": names["m_new"], "J": range(J), "dk": names["dk"][:, :, 0, 2:], "dv": names["dv"][:, :, 0, 2:]}
    return names | {"B": B, "K": K, "g": g, "n": n, "D": D, "printed": known}


def raised(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (blk.2), where m is the new one already."""
    names = blockwise(randn, rng, r)
    return names | {"printed": names["printed"] | {"m'": names["m"]}}


def divided(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (blk.6), which gives each head's rows apart."""
    names = blockwise(randn, rng, r)
    return names | {"printed": {x: names[x].reshape(2, 2, 3, 4, -1) for x in ("N", "Z")}}


def four_bits(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (nf.1) to (nf.6): three blocks of 8."""
    n, m, p_1, quantile, count, block_size = 16, 8, 0.96, NormalDist().inv_cdf, 24, 8
    blocks, c, absmax, codes = randn((3, 8)), randn((3, 8)), 1 + rng.random(3), rng.integers(0, 16, 24)
    printed = {"w": blocks, "a": absmax, "Phi^-1": quantile, "q_0": codes[0::2], "q_1": codes[1::2], "c": NF4}
    return locals()


def decoded(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (nf.5): the code of each weight is its own."""
    names = four_bits(randn, rng, r)
    printed = {"a": names["absmax"], "q": np.arange(24).reshape(3, 8), "c": names["c"].ravel()}
    return names | {"printed": printed}


def scales(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (nf.7) and (nf.8): three blocks of 8 scales, less their mean."""
    blocks, n = randn((3, 8)), 1 + rng.random(3)
    printed = {"a": blocks + 0.375, "m": 0.375, "d": scale_book()}
    return locals()


def scaled(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (nf.9), for one block of scales."""
    n, d, mean = 1.7, randn(3), 0.375
    printed = {"n_B": n, "t": np.arange(3), "m": mean}
    return locals()


def loftq(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (loftq.1) and (loftq.2)."""
    W, A, B, s, rank, alpha = randn((OUT, IN)), randn((r, IN)), randn((OUT, r)), ALPHA / r, r, ALPHA
    quantised = lambda W: dequantize_nf4(*quantize_nf4(W), W.shape, dtype="float64")  # noqa: E731
    Q, rest, options, printed = quantised(W), Linear(W - s * B @ A), {"double_quant": False}, {"quantised": quantised}
    U, S, Vt = np.linalg.svd(W - Q, full_matrices=False)
    return locals() | {"Adapter": Adapter}


GROUPS = {
    **{"layer": layer, "residual": residual, "adam": adam, "best": best, "decay": adam, "clip": clipped},
    **{"norm": norm, "rope": rotary, "att": attention, "blk": blockwise, "gate": gate, "llama": branch},
    **{"act": activation, "ce": cross_entropy, "seq": sequential, "flat": flatten, "emb": embedding},
    **{"conv.1": convolution, "conv.2": convolution_back, "rw": rewritten, "dora": dora, "drop": dropout},
    **{"rate": rates, "pissa": pissa, "sum": small, "rs": scaling, "gen": generation, "lp": scaling, "loftq": loftq},
    **{"moe": routed, **{f"moe.{number}": stack for number in (5, 6, 7)}},
    **{f"moe.{number}": mixed for number in range(8, 14)},
    **{f"moe.{number}": packed for number in (16, 17)},
    **{"nf": four_bits, "nf.5": decoded, "nf.7": scales, "nf.8": scales, "nf.9": scaled},
    **{"clip.2": clipped_alone, "sum.1": weighted, "sum.5": added},
    **{"gen.2": sorted_shares, "blk.2": raised, "blk.6": divided},
}
