"""Random arrays under the names that the equations and the code use, for `equations` to compute both with.

All sizes differ, so that a transposed factor does not fit, and no scale is 1, so that a lost one is seen. Where the
code has another name for a symbol, both names are here, ``x`` and ``X``. What was computed before a line, as ``h``, is
computed from the others, so that a line can be compared with its whole equation.
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
    x, dy, W, b = randn((N, IN)), randn((N, OUT)), randn((OUT, IN)), randn(OUT)
    A, B, s, dh = randn((r, IN)), randn((OUT, r)), ALPHA / r, randn((N, r))
    p, t, h = randn((N, OUT)), randn((N, OUT)), x @ A.T
    base, adapter = Linear(W, b), LoRA(A, B, ALPHA)
    return {
        **{"x": x, "dy": dy, "W": W, "b": b, "A": A, "B": B, "s": s, "h": h, "dh": dh, "p": p, "t": t},
        **{"X": x, "dH": dh, "bias": b, "update": s * h @ B.T, "dx_adapter": dh @ A, "adapter": adapter},
        **{"layers": {"Linear": base, "LoRA": adapter, "LoRALinear": LoRALinear(base, adapter)}},
        **{"error": p - t, "count": N * OUT},
        "printed": {"N": N, "out": OUT, "alpha": ALPHA, "r": r, "DeltaW": s * B @ A},
    }


def residual(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (17) to (19)."""
    X, T, W, A, B, s = randn((N, IN)), randn((N, OUT)), randn((OUT, IN)), randn((r, IN)), randn((OUT, r)), ALPHA / r
    R, H = T - X @ W.T, X @ A.T
    return {
        **{"X": X, "T": T, "W": W, "A": A, "B": B, "s": s, "R": R, "H": H, "RtH": R.T @ H, "RB": R @ B},
        "c": 2 * s / (N * OUT),
    }


def adam(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (20) to (24), in step 3, and of (decay.1)."""
    arrays = {name: randn(6) for name in ("g", "m", "theta", "m_hat")} | {
        name: rng.random(6) for name in ("v", "v_hat")
    }
    printed = {"beta_1": 0.8, "beta_2": 0.95, "epsilon": 0.1, "mhat": arrays["m_hat"], "vhat": arrays["v_hat"]}
    printed["lambda"] = 0.4
    printed |= {f"{name}_{when}": arrays[name] for name in ("m", "v", "theta") for when in ("t", "t-1")}
    return arrays | {"t": 3, "beta1": 0.8, "beta2": 0.95, "lr": 0.03, "eps": 0.1, "decay": 0.4, "printed": printed}


def clipped(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (clip.1) and (clip.2): gradients that are longer than C, and shorter ones; (clip.2) is of one of them."""
    A, B, most = randn((r, IN)), randn((OUT, r)), 0.7 if r == 1 else 3.1
    printed = {"g": np.append(A, B), "n": 2.5, "C": most}
    return {"grads": {"A": A, "B": B}, "norm": 2.5, "most": most, "printed": printed}


def clipped_alone(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (clip.2), of one gradient."""
    names = clipped(randn, rng, r)
    A = names["grads"]["A"]
    return names | {"grads": {"A": A}, "printed": names["printed"] | {"g": A}}


def best(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (25) to (27)."""
    T, Z, D = randn((N, IN)), randn((N, OUT)), randn((OUT, IN))
    V = np.linalg.svd(T @ D.T, full_matrices=False)[2][:r].T
    return {"T": T, "Z": Z, "V": V, "printed": {"V_r": V}}


def activation(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (act.1) to (act.6)."""
    x, dy = randn((N, IN)), randn((N, IN))
    return {"x": x, "dy": dy, "mask": x > 0, "y": np.tanh(x), "q": 1 / (1 + np.exp(-x))}


def cross_entropy(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (ce.1) to (ce.3): z, the ids t, and M, the number of the rows that count; two rows do not."""
    z, t, counts = randn((N, OUT)), rng.integers(0, OUT, N), np.arange(N) % 4 != 1
    e, M = np.exp(z), counts.sum()
    q = e / e.sum(axis=1, keepdims=True)
    return {
        **{"z": z, "q": q, "t": t, "M": M},
        **{"e": e, "total": e.sum(axis=1, keepdims=True), "ids": t[:, None], "share": counts[:, None] / M},
        "log_q_t": np.where(counts, np.log(q[np.arange(N), t]), 0)[:, None],
        "printed": {"C": np.flatnonzero(counts)},
    }


def sequential(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (seq.1) and (seq.2), where layer i is a linear one."""
    x, dx, W = randn((N, IN)), randn((N, OUT)), randn((OUT, IN))
    linear = Linear(W)
    printed = {"x_i": x, "x_i-1": x, "f_i": lambda x: x @ W.T}
    names = {"x": x, "dx": dx, "W": W, "layer": linear, "caches": [linear.forward(x)[1]], "i": 0, "below": True}
    return names | {"printed": printed}


def flatten(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (flat.1) and (flat.2): 3 channels of 5 entries."""
    dy = randn((N, 3 * IN))
    return {"x": randn((N, 3, IN)), "dy": dy, "shape": (N, 3, IN), "printed": {"dy": dy.reshape(N, 3, IN)}}


def embedding(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (emb.1) and (emb.2): a table W of 6 vectors, N ids of which some repeat, and their one-hot rows."""
    W, ids, dy = randn((6, OUT)), rng.integers(0, 6, N), randn((N, OUT))
    table = Embedding(W)
    return {
        **{"W": W, "dy": dy, "X": table.rewrite(ids), "dW": np.zeros((6, OUT))},
        "layers": {"Embedding": table},
        "printed": {"X": np.eye(6)[ids]},
    }


def convolution(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (conv.1), at entry k of the kernel: stride s, dilation d, P positions, x with its padding."""
    s, d, k, P = 2, 3, 1, 4
    known = {"s": s, "d": d, "k": k, "P": P, "offset": (k,), "window": (slice(d * k, d * k + s * (P - 1) + 1, s),)}
    x = randn((N, 3, s * (P - 1) + d * 2 + 1))
    return known | {"x": x, "padded": x}


def convolution_back(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (conv.2): there the code has the channels first."""
    known = convolution(randn, rng, r)
    dx, dz = randn((3, N, known["x"].shape[2])), randn((3, 2, N, known["P"]))
    return known | {"dx": dx, "padded": dx, "dz": dz}


def rewritten(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (rw.1) to (rw.4), for a convolution of 3 channels. T is the rewriting as a matrix, from x to z."""
    shape, kernel, P = (2, 3, 9), 2, 4
    base = Conv1d(randn((OUT, 3, kernel)), randn(OUT), stride=2, dilation=2)
    A, B, s, x = randn((r, 3 * kernel)), randn((OUT, r)), ALPHA / r, randn(shape)
    layer = Rewritten(base, LoRA(A, B, ALPHA))
    basis = np.eye(x.size).reshape(-1, *shape)
    T = np.stack([base.rewrite(e).ravel() for e in basis], axis=1)
    z, rows = base.rewrite(x), layer.on_rows()
    return {
        **{
            "x": x,
            "z": z,
            "W": base.as_linear().weight,
            "b": base.bias,
            "A": A,
            "B": B,
            "s": s,
            "shape": shape,
        },
        **{"u": randn((2 * P, OUT)), "P": P, "du": randn((2 * P, OUT))},
        "printed": {
            "T": lambda x: (T @ x.ravel()).reshape(z.shape),
            "T^*": lambda dz: (T.T @ dz.ravel()).reshape(shape),
            "R": lambda u: np.stack([u.reshape(-1, P, OUT)[:, :, o] for o in range(OUT)], axis=1),
            "V": base.as_linear().weight + s * B @ A,
        },
        **{"layer": rows, "rows_cache": rows.forward(z)[1], "input_gradient": base.input_gradient},
        "layers": {"Rewritten": layer},
    }


def dora(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (dora.1) to (dora.8)."""
    W, b, m, A, B, s = randn((OUT, IN)), randn(OUT), rng.random(OUT), randn((r, IN)), randn((OUT, r)), ALPHA / r
    layer = DoRA(Linear(W, b), DoRAAdapter(A, B, ALPHA, magnitude=m, dora_norm="full"))
    vectors = {name: rng.random(OUT) for name in ("n", "g", "dm", "dn")}
    return vectors | {
        **{"W": W, "b": b, "m": m, "A": A, "B": B, "s": s, "V": W + s * B @ A, "dV": randn((OUT, IN))},
        **{"u": randn((N, OUT)), "dy": randn((N, OUT)), "layers": {"DoRA": layer}},
    }


def pissa(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (pissa.1) to (pissa.3), of a rank above 1; A0 and B0 are the start."""
    r = max(r, 2)
    W, b, A, B, s = randn((OUT, IN)), randn(OUT), randn((r, IN)), randn((OUT, r)), ALPHA / r
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    names = {"W": W, "b": b, "A": A, "B": B, "s": s, "U": U, "S": S, "Vt": Vt, "r": r, "root": np.sqrt(S[:r] / s)}
    names |= {"A0": randn((r, IN)), "B0": randn((OUT, r)), "alpha": ALPHA, "join": np.concatenate, "times": 2}
    names["printed"] = {"u": U[:, :r], "v": Vt[:r].T, "A_0": names["A0"], "B_0": names["B0"]}
    return names | {"linear": Linear(W, b), "adapter": LoRA(A, B, ALPHA)}


def weighted(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (sum.1): two adapters of weights w1 and w2; in the code B and A are lists at first."""
    A1, A2, B1, B2 = randn((r, IN)), randn((2, IN)), randn((OUT, r)), randn((OUT, 2))
    names = {"A1": A1, "A2": A2, "B1": B1, "B2": B2, "w1": 0.7, "w2": -1.3, "s1": ALPHA / r, "s2": ALPHA / 2}
    names["printed"] = {f"{name}_{j}": names[f"{name}{j}"] for name in "ABws" for j in (1, 2)}
    return names | {"B": [0.7 * ALPHA / r * B1, -1.3 * ALPHA / 2 * B2], "A": [A1, A2]}


def added(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (sum.5): the factors of two adapters of one rank; c1 and c2 are w s of each."""
    A1, A2, B1, B2, c1, c2 = randn((r, IN)), randn((r, IN)), randn((OUT, r)), randn((OUT, r)), 0.7, -1.3
    names = {"A1": A1, "A2": A2, "B1": B1, "B2": B2, "c1": c1, "c2": c2, "As": [A1, A2], "Bs": [B1, B2]}
    names["printed"] = {"c": np.array([c1, c2]), "A": np.stack([A1, A2], axis=-1), "B": np.stack([B1, B2], axis=-1)}
    return names | {"roots": [0.7**0.5, 1.3**0.5], "signed": [0.7**0.5, -(1.3**0.5)]}


def small(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (sum.2) and (sum.3), for an adapter of rank 3."""
    A, B, s, r = randn((3, IN)), randn((OUT, 3)), ALPHA / 3, min(r, 2)
    (Q_A, R_A), (Q_B, R_B) = np.linalg.qr(A.T), np.linalg.qr(B)
    U, S, Vt = np.linalg.svd(s * R_B @ R_A.T, full_matrices=False)
    names = {"Q_A": Q_A, "R_A": R_A, "Q_B": Q_B, "R_B": R_B, "U": U, "S": S, "Vt": Vt, "s": s, "r": r}
    names["printed"] = {"U_r": U[:, :r], "S_r": np.diag(S[:r]), "V_r": Vt[:r].T, "B_r": None, "A_r": None}
    names["printed"]["at"] = {"k": range(1, 4)}
    return names | {"root": np.sqrt(S[:r]), "adapter": LoRA(A, B, ALPHA), "linalg": np.linalg}


def dropout(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (drop.1) to (drop.3), with a mask m."""
    names, m = layer(randn, rng, r), rng.random((N, IN)) >= 0.3
    names |= {"m": m, "p": 0.3, "dropped": m * names["x"] / 0.7, "dx_dropped": names["dh"] @ names["A"]}
    names["printed"] = {"x'": names["dropped"], "dx'": names["dx_dropped"]}
    names["update"] = names["s"] * names["dropped"] @ names["A"].T @ names["B"].T
    both = names["layers"]["LoRALinear"]
    return names | {"layers": {"DroppingLoRALinear": DroppingLoRALinear(both.base, both.adapter, 0.3, (1,))}}


def rates(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (rate.1) to (rate.4): a step in the warmup, or one behind it."""
    printed = {"u_t": 0.3, "f_t": None, "d": lambda u: {0.3: 0.7}[u]}
    return {"t": 2 if r == 1 else 9, "w": 4, "T": 20, "u": 0.3, "d": 0.7, "printed": printed}


def scaling(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (rs.1) and (lp.1)."""
    printed = {"r": 3, "lambda": 16.0, "lr_A": 0.02, "lr_B": 0.32}
    return {"alpha": ALPHA, "rank": 3, "use_rslora": True, "lr": 0.02, "ratio": 16.0, "printed": printed}


def norm(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (norm.1) to (norm.4). Here r is the root mean square of each row."""
    x, dy, g, eps = randn((N, IN)), randn((N, IN)), randn(IN), 0.3
    root = np.sqrt((x**2).mean(axis=1, keepdims=True) + eps)
    names = {"x": x, "dy": dy, "g": g, "r": root, "d": IN, "layers": {"RMSNorm": RMSNorm(g, eps)}}
    names["printed"] = {"xhat": x / root, "dxhat": dy * g, "varepsilon": eps}
    return names | {"mean": (dy * g * x / root).mean(axis=1, keepdims=True)}


def branch(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (llama.1) and (llama.2), where F is linear."""
    known = norm(randn, rng, r)
    W, layer = randn((IN, IN)), known["layers"]["RMSNorm"]
    h, cache = layer.forward(known["x"])
    x, g, root, d = known["x"], known["g"], known["r"], IN
    slope = np.eye(d) / root[..., None] - np.einsum("ni,nj->nij", x, x) / (d * root[..., None] ** 3)
    known["printed"] = {
        **{"norm": lambda x: x / root * g, "norm's backward of": lambda dh: np.einsum("ni,i,nij->nj", dh, g, slope)},
        **{"F": lambda h: h @ W.T, "F's backward of": lambda dy: dy @ W},
    }
    return known | {"W": W, "update": h @ W.T, "dx_branch": layer.backward(known["dy"] @ W, cache)[0]}


def gate(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (gate.1) to (gate.4)."""
    x, dz, da, db = randn((N, IN)), randn((N, OUT)), randn((N, OUT)), randn((N, OUT))
    W_a, W_b, W_c = randn((OUT, IN)), randn((OUT, IN)), randn((IN, OUT))
    a, b = x @ W_a.T, x @ W_b.T
    q = 1 / (1 + np.exp(-a))
    names = {"a": a, "b": b, "dz": dz, "da": da, "db": db, "W_a": W_a, "W_b": W_b}
    slope = {"f": lambda a: a / (1 + np.exp(-a)), "f'": lambda a: q * (1 + a * (1 - q))}
    names["printed"] = slope | {"x": x, "W_c": W_c, "y": a * q * b @ W_c.T, "z": a * q * b}
    return names | {"u": a * q, "p": b * (q + a * q * (1 - q)), "dx_a": da @ W_a, "dx_b": db @ W_b}


def generation(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (gen.1) to (gen.3): scores z, a temperature c, and two values of P."""
    z, c, P = randn(IN), 0.7, 0.6 if r == 1 else 0.95
    e = np.exp((z - z.max()) / c)
    q, a = e / e.sum(), rng.random(IN)
    return {"z": z, "c": c, "P": P, "e": e, "q": q, "order": np.argsort(-q), "a": a * (a > a.min())}


def sorted_shares(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (gen.2), which speaks of shares from the largest on."""
    known = generation(randn, rng, r)
    return known | {"printed": {"q": np.sort(known["q"])[::-1]}}


def rotary(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (rope.1) to (rope.4): rows of 6 entries. R[t] is the rotation at position t, as a matrix."""
    D, half = 6, 3
    x, dy, a = randn((N, D)), randn((N, D)), np.outer(np.arange(N), (1.0, 0.4, 0.16))
    cos, sin, R = np.cos(a), np.sin(a), np.zeros((N, D, D))
    for j in range(half):
        R[:, j, j] = R[:, j + half, j + half] = cos[:, j]
        R[:, j, j + half], R[:, j + half, j] = -sin[:, j], sin[:, j]
    names = {"x": x, "dy": dy, "a": a, "cos": cos, "sin": sin, "R": R, "base": 50.0, "width": D}
    return names | {"x1": x[:, :half], "x2": x[:, half:], "printed": {"D": D}}


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
    E, K = 4, 2
    x, W, dp, d_scores = randn((N, IN)), randn((E, IN)), randn((N, E)), randn((N, E))
    scores = randn((N, E))
    choice = np.argsort(-scores, axis=1)[:, :K]
    p = np.where((choice[:, :, None] == np.arange(E)).any(axis=1), np.exp(scores), 0)
    p /= p.sum(axis=1, keepdims=True)
    router = Router(StackedLinear(W), K)
    names = {
        "x": x,
        "W": W,
        "p": p,
        "dp": dp,
        "d_scores": d_scores,
        "choice": choice,
        "E": E,
        "N": N,
        "n": N,
        "f": rng.random(E),
    }
    names["printed"] = {"dl": d_scores, "l": scores, "S": np.array([{*kept} for kept in choice]), "c": choice}
    return names | {"weight_cache": router.weight.forward(x)[1], "layers": {"Router": router}}


def stack(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (moe.5) to (moe.7): expert 1 of three, which has the rows 2 to 4."""
    x, dy, W = randn((N, IN)), randn((N, OUT)), randn((3, OUT, IN))
    printed = {"x": x[2:5], "dy": dy[2:5], "fixed": {"e": 1}}
    return {"x": x, "dy": dy, "W": W, "e": 1, "part": slice(2, 5), "printed": printed}


def mixed(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (moe.8) to (moe.13): each row keeps three experts."""
    g, o, dy, s, q = rng.random((N, 3)), randn((N, 3, IN)), randn((N, IN)), randn((N, IN)), rng.random((N, 1))
    return {"g": g, "o": o, "dy": dy, "d_rows": dy, "routed": randn((N, IN)), "s": s, "q": q}


def packed(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (moe.16) and (moe.17): the factors of four experts."""
    E = 4
    return {"A": randn((E * r, IN)), "B": randn((OUT, r * E)), "r": r, "E": E, "experts": E}


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
    names = {"n": 16, "m": 8, "p_1": 0.96, "quantile": NormalDist().inv_cdf, "blocks": randn((3, 8))}
    names |= {"c": randn((3, 8)), "absmax": 1 + rng.random(3), "codes": rng.integers(0, 16, 24)}
    names["printed"] = {
        **{"w": names["blocks"], "a": names["absmax"], "Phi^-1": names["quantile"]},
        **{"q_0": names["codes"][0::2], "q_1": names["codes"][1::2], "c": NF4},
    }
    return names | {"count": 24, "block_size": 8}


def decoded(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (nf.5): the code of each weight is its own."""
    names = four_bits(randn, rng, r)
    printed = {"a": names["absmax"], "q": np.arange(24).reshape(3, 8), "c": names["c"].ravel()}
    return names | {"printed": printed}


def scales(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (nf.7) and (nf.8): three blocks of 8 scales, less their mean."""
    blocks = randn((3, 8))
    n = 1 + rng.random(3)
    printed = {"a": blocks + 0.375, "m": 0.375, "d": scale_book()}
    return {"blocks": blocks, "n": n, "printed": printed}


def scaled(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (nf.9), for one block of scales."""
    return {"n": 1.7, "d": randn(3), "mean": 0.375, "printed": {"n_B": 1.7, "t": np.arange(3), "m": 0.375}}


def loftq(randn: Any, rng: np.random.Generator, r: int) -> Names:
    """Of (loftq.1) and (loftq.2)."""
    W, A, B, s = randn((OUT, IN)), randn((r, IN)), randn((OUT, r)), ALPHA / r
    Q = dequantize_nf4(*quantize_nf4(W), W.shape, dtype="float64")
    U, S, Vt = np.linalg.svd(W - Q, full_matrices=False)
    names = {"W": W, "A": A, "B": B, "s": s, "Q": Q, "U": U, "S": S, "Vt": Vt, "r": r, "rank": r, "alpha": ALPHA}
    names |= {"rest": Linear(W - s * B @ A), "options": {"double_quant": False}, "Adapter": Adapter}
    names["printed"] = {"quantised": lambda W: dequantize_nf4(*quantize_nf4(W), W.shape, dtype="float64")}
    return names


GROUPS = {
    **{"layer": layer, "residual": residual, "adam": adam, "best": best},
    **{"norm": norm, "rope": rotary, "att": attention, "blk": blockwise, "gate": gate, "llama": branch},
    **{"act": activation, "ce": cross_entropy, "seq": sequential, "flat": flatten, "emb": embedding},
    **{
        "conv.1": convolution,
        "conv.2": convolution_back,
        "rw": rewritten,
        "dora": dora,
        "drop": dropout,
        "rate": rates,
        "clip": clipped,
        "clip.2": clipped_alone,
        "decay": adam,
        "pissa": pissa,
        "sum.1": weighted,
        "sum.5": added,
        "sum": small,
        "rs": scaling,
        "gen": generation,
        "lp": scaling,
        "moe": routed,
        **{f"moe.{number}": stack for number in (5, 6, 7)},
        **{f"moe.{number}": mixed for number in range(8, 14)},
        **{f"moe.{number}": packed for number in (16, 17)},
        "nf": four_bits,
        **{"nf.5": decoded, "nf.7": scales, "nf.8": scales, "nf.9": scaled},
        **{"gen.2": sorted_shares, "blk.2": raised, "blk.6": divided},
        "loftq": loftq,
    },
}
