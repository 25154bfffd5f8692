r"""Random arrays under the names that equations or code use, so that `stated` can evaluate both.

All sizes differ, so that a transposed factor does not fit, and no scale is 1, so that a missing one shows. If the code
has another name for a symbol, both names are here, ``x`` and ``X``. Values that are computed before a line, such as
``h``, are computed from the others, so that a line can be compared with its whole equation. The names of a layer, its
adapter and its loss are the same everywhere; a case of `arrays` adds or replaces names for its equations. `printed`
has the names that occur only in a formula, `layers` the value of ``self`` by class. If the left side of a formula is
more than the line's value, ``X D^\top``, `named` returns the formula's names for that value.
"""

from __future__ import annotations

from itertools import product
from statistics import NormalDist
from typing import Any

import numpy as np

from minilora import (
    NF4,
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
from minilora.layers.nf4 import scale_book
from minilora.layers.router import Router
from minilora.layers.stacked import StackedLinear
from minilora.variants.adapter import AdaptedRows
from minilora.variants.dropout import DroppingLoRALinear

N, IN, OUT, ALPHA = 7, 5, 4, 6.5
RANKS = (3, 1)  # rank 1 has its own product, `minilora.layer.matmul`


def samples(label: str, rank: int) -> dict[str, Any]:
    """Return new arrays for an equation, always the same for the same label and rank."""
    group, _, number = label.rpartition(".")
    names = arrays(group, int(number), np.random.default_rng(0), rank)
    return {"np": np, "xp": np, "einsum": np.einsum, "need_dx": True, **names}


def arrays(group, number, rng, r):
    """Return the values of the names in an equation's group, at rank r."""
    randn = rng.standard_normal
    X = x = randn((N, IN))
    W, bias, A, B, alpha, s = randn((OUT, IN)), randn(OUT), randn((r, IN)), randn((OUT, r)), ALPHA, ALPHA / r
    b, dy, dh, p, t, h = bias, randn((N, OUT)), randn((N, r)), randn((N, OUT)), randn((N, OUT)), x @ A.T
    dH, update, dx_adapter, error, count = dh, s * h @ B.T, dh @ A, p - t, N * OUT
    base, adapter = Linear(W, b), LoRA(A, B, ALPHA)
    layers = {"Linear": base, "LoRA": adapter, "LoRALinear": LoRALinear(base, adapter)}
    printed = {"N": N, "out": OUT, "r": r, "DeltaW": s * B @ A, "W_merged": None, "b_merged": None}
    match group, number:
        case "", (17 | 18 | 19):
            T = randn((N, OUT))
            R, H, c = T - X @ W.T, X @ A.T, 2 * s / (N * OUT)
            RtH, RB = R.T @ H, R @ B
        case ("", (20 | 21 | 22 | 23 | 24)) | ("decay", _):  # at step 3
            g, m, theta, m_hat, v, v_hat = randn(6), randn(6), randn(6), randn(6), rng.random(6), rng.random(6)
            t, beta1, beta2, lr, eps, decay = 3, 0.8, 0.95, 0.03, 0.1, 0.4
            printed = {"beta_1": beta1, "beta_2": beta2, "epsilon": eps, "mhat": m_hat, "vhat": v_hat, "lambda": decay}
            printed |= {"m_t": m, "m_t-1": m, "v_t": v, "v_t-1": v, "theta_t": theta, "theta_t-1": theta}
        case "", (25 | 26 | 27):
            T, Z, D = randn((N, IN)), randn((N, OUT)), randn((OUT, IN))
            U, S, Vt = np.linalg.svd(T @ D.T, full_matrices=False)
            V, printed = Vt[:r].T, {"X": T, "R": Z, "U": U, "Sigma": np.diag(S), "V_r": Vt[:r].T}
            if number != 27:
                named = (lambda D: {"D": D}) if number == 25 else (lambda Vt: {"V": Vt.T})
        case "clip", _:  # gradients longer and shorter than C; (clip.2) is about one of them
            grads, norm, most = {"A": A, "B": B} if number == 1 else {"A": A}, 2.5, 0.7 if r == 1 else 3.1
            printed = {"g": np.append(A, B) if number == 1 else A, "n": norm, "C": most}
        case "act", _:
            x[0, 0] = 0
            dy, mask, y, q = randn((N, IN)), x > 0, np.tanh(x), 1 / (1 + np.exp(-x))
        case "ce", _:  # z, the ids t, and M, the number of counted rows; two rows do not count
            z, t, counts = randn((N, OUT)), rng.integers(0, OUT, N), np.arange(N) % 4 != 1
            e, M, ids = np.exp(z), counts.sum(), t[:, None]
            total, share = e.sum(axis=1, keepdims=True), counts[:, None] / M
            q = e / total
            log_q_t = np.where(counts, np.log(q[np.arange(N), t]), 0)[:, None]
            printed = {"C": np.flatnonzero(counts)}
        case "seq", _:  # layer i is linear
            dx, i, below, layer = dy, 0, True, Linear(W)
            caches, printed = [layer.forward(x)[1]], {"x_i": x @ W.T, "x_i-1": x, "dx_i": dx, "dx_i-1,grads_i": None}
            printed |= {"f_i": lambda x: x @ W.T, "backward_i": lambda dx: dx @ W}
        case "flat", _:  # 3 channels of 5 entries
            shape = N, 3, IN
            x, dy = randn(shape), randn((N, 3 * IN))
            printed = {"dy": dy.reshape(shape)}
        case "emb", _:  # a table W of 6 vectors, ids with repetitions, and their one-hot rows
            W, ids, dW = randn((6, OUT)), rng.integers(0, 6, N), np.zeros((6, OUT))
            layers, printed = {"Embedding": Embedding(W)}, {"X": np.eye(6)[ids]}
            X = layers["Embedding"].to_rows(ids)
        case "conv", _:  # entry k of the kernel: stride s, dilation d, P positions, padded x
            s, d, k, P = 2, 3, 2, 4
            offset, window = (k,), (slice(d * k, d * k + s * (P - 1) + 1, s),)
            padded = x = randn((N, 3, s * (P - 1) + d * 2 + 1))
            # The code has the channels first. In (conv.2) it has already added the terms of the other entries.
            printed, named = {"fixed": {"k": k}}, lambda z: {"z": z.transpose(1, 2, 0)}
            if number == 2:
                dz, padded = randn((3, 3, N, P)), np.zeros((3, N, x.shape[2]))
                for j, p in product(range(k), range(P)):
                    padded[:, :, s * p + d * j] += dz[:, j, :, p]
                printed, named = {"dz": dz.transpose(2, 3, 0, 1)}, lambda part: {"dx": put(padded, window, part)}
                del k, p  # indices of the formula
        case "rw", _:  # a convolution of 3 channels. T is the matrix that maps x to z
            shape, kernel, P = (2, 3, 9), 2, 4
            base, A = Conv1d(randn((OUT, 3, kernel)), b, stride=2, dilation=2), randn((r, 3 * kernel))
            x, W, layers = randn(shape), base.as_linear().weight, {"AdaptedRows": AdaptedRows(base, LoRA(A, B, ALPHA))}
            T = np.stack([base.to_rows(e).ravel() for e in np.eye(x.size).reshape(-1, *shape)], axis=1)
            z, layer, input_gradient = base.to_rows(x), layers["AdaptedRows"].on_rows(), base.input_gradient
            rows_cache, u, du = layer.forward(z)[1], randn((2 * P, OUT)), randn((2 * P, OUT))
            printed = {
                "T": lambda x: (T @ x.ravel()).reshape(z.shape),
                "T^*": lambda dz: (T.T @ dz.ravel()).reshape(shape),
                "R": lambda u: np.stack([u.reshape(-1, P, OUT)[:, :, o] for o in range(OUT)], axis=1),
                "V": W + s * B @ A,
            }
        case "dora", _:
            m, n, g, dm, dn = (rng.random(OUT) for _ in range(5))
            layers = {"DoRA": DoRA(base, DoRAAdapter(A, B, ALPHA, magnitude=m, dora_norm="full"))}
            V, dV, u = W + s * B @ A, randn((OUT, IN)), randn((N, OUT))
        case "pissa", _:  # rank above 1; A0 and B0 are the initial factors
            r, join, times = max(r, 2), np.concatenate, 2
            A, B, A0, B0 = randn((r, IN)), randn((OUT, r)), randn((r, IN)), randn((OUT, r))
            s, linear, adapter = ALPHA / r, base, LoRA(A, B, ALPHA)
            U, S, Vt = np.linalg.svd(W, full_matrices=False)
            root = np.sqrt(S[:r] / s)
            printed = {"r": r, "u": U[:, :r], "v": Vt[:r].T, "A_0": A0, "B_0": B0, "W_rest": None, "b_rest": None}
        case "sum", 1:  # two adapters with weights w1 and w2; in the code B and A are lists at first
            A1, A2, B1, B2, w1, w2, s1, s2 = A, randn((2, IN)), B, randn((OUT, 2)), 0.7, -1.3, ALPHA / r, ALPHA / 2
            B, A = [w1 * s1 * B1, w2 * s2 * B2], [A1, A2]
            of = {"A": (A1, A2), "B": (B1, B2), "w": (w1, w2), "s": (s1, s2)}
            printed = {f"{name}_{j}": two[j - 1] for name, two in of.items() for j in (1, 2)}
        case "sum", 5:  # the factors of two adapters of the same rank; c1 and c2 are their w s
            As, Bs, c1, c2 = [A, randn((r, IN))], [B, randn((OUT, r))], 0.7, -1.3
            roots, signed = [0.7**0.5, 1.3**0.5], [0.7**0.5, -(1.3**0.5)]
            printed = {"c": np.array([c1, c2]), "A": np.stack(As, axis=-1), "B": np.stack(Bs, axis=-1)}
        case "sum", _:  # an adapter of rank 3; of rank 6 in (sum.2), so that U S V^T has no two equal shapes in a row
            A, B = (randn((6, OUT)), randn((IN, 6))) if number == 2 else (randn((3, IN)), randn((OUT, 3)))
            s, r, linalg = ALPHA / len(A), min(r, 2), np.linalg
            (Q_A, R_A), (Q_B, R_B), adapter = np.linalg.qr(A.T), np.linalg.qr(B), LoRA(A, B, ALPHA)
            U, S, Vt = np.linalg.svd(s * R_B @ R_A.T, full_matrices=False)
            root, printed = np.sqrt(S[:r]), {"U_r": U[:, :r], "S_r": np.diag(S[:r]), "V_r": Vt[:r].T}
            printed |= {"B_r": None, "A_r": None, "at": {"k": range(1, 4)}}
            if number == 2:
                printed, named = {"D": s * B @ A}, lambda U, S, Vt: {"U": U, "S": np.diag(S), "V": Vt.T}
            if number == 4:
                printed |= {"D": s * B @ A, "B_r": Q_B @ U[:, :r] * S[:r], "A_r": Vt[:r] @ Q_A.T}
        case "drop", _:  # with a mask m
            m, p = rng.random((N, IN)) >= 0.3, 0.3
            dropped, dx_dropped = m * x / 0.7, dh @ A
            update, layers = (
                s * dropped @ A.T @ B.T,
                {"DroppingLoRALinear": DroppingLoRALinear(base, adapter, 0.3, (1,))},
            )
            printed |= {"x'": dropped, "dx'": dx_dropped}
        case "rate", _:  # a step in the warmup, or one after it
            t, w, T, u, d = 2 if r == 1 else 9, 4, 20, 0.3, 0.7
            printed = {"u_t": u, "f_t": None, "d(u)": None, "d": lambda u: {0.3: 0.7}[u]}
        case (("rs" | "lp"), _):
            rank, use_rslora, lr, ratio = 3, True, 0.02, 16.0
            printed = {"r": rank, "lambda": ratio, "lr_A": lr, "lr_B": 0.32}
        case (("norm" | "llama"), _):  # r is the root mean square of each row; F is linear
            dy, g, eps, d, W = randn((N, IN)), randn(IN), 0.3, IN, randn((IN, IN))
            r = root = np.sqrt((x**2).mean(axis=1, keepdims=True) + eps)
            mean, of = (dy * g * x / r).mean(axis=1, keepdims=True), RMSNorm(g, eps)
            layers, (h, cache) = {"RMSNorm": of}, of.forward(x)
            update, dx_branch = h @ W.T, of.backward(dy @ W, cache)[0]
            slope = np.eye(d) / r[..., None] - np.einsum("ni,nj->nij", x, x) / (d * r[..., None] ** 3)
            printed = {"xhat": x / r, "dxhat": dy * g, "varepsilon": eps, "norm": lambda x: x / root * g}
            printed |= {"norm's backward of": lambda dh: np.einsum("ni,i,nij->nj", dh, g, slope)}
            printed |= {"F": lambda h: h @ W.T, "F's backward of": lambda dy: dy @ W}
        case "gate", _:
            dz, da, db = randn((N, OUT)), randn((N, OUT)), randn((N, OUT))
            W_a, W_b, W_c = randn((OUT, IN)), randn((OUT, IN)), randn((IN, OUT))
            a, b, dx_a, dx_b = x @ W_a.T, x @ W_b.T, da @ W_a, db @ W_b
            q = 1 / (1 + np.exp(-a))
            u, p = a * q, b * (q + a * q * (1 - q))
            printed = {"f": lambda a: a / (1 + np.exp(-a)), "f'": lambda a: q * (1 + a * (1 - q))}
            printed |= {"y": u * b @ W_c.T, "z": u * b}
        case "gen", _:  # scores z, a temperature c, and two values of P; (gen.2) takes shares in descending order
            z, c, P = randn(IN), 0.7, 0.6 if r == 1 else 0.95
            e, a = np.exp((z - z.max()) / c), rng.random(IN)
            q, a = e / e.sum(), a * (a > a.min())
            order, a[1] = np.argsort(-q), P
            printed = {"q": np.sort(q)[::-1]} if number == 2 else {}
        case "rope", _:  # rows of 6 entries. R[t] is the rotation at position t, as a matrix
            D = width = 6
            half, base = 3, 50.0
            x, dy, a = randn((N, D)), randn((N, D)), np.outer(np.arange(N), (1.0, 0.4, 0.16))
            cos, sin, R, x1, x2 = np.cos(a), np.sin(a), np.zeros((N, D, D)), x[:, :half], x[:, half:]
            for j in range(half):
                R[:, j, j] = R[:, j + half, j + half] = cos[:, j]
                R[:, j, j + half], R[:, j + half, j] = -sin[:, j], sin[:, j]
            if number == 3:  # the second half of y
                named = lambda part: {"y": np.hstack([x1, part])}  # noqa: E731
            del j, t  # indices of the formulas
        case "att", _:  # 2 sequences, 2 key heads with 3 query heads each, 4 queries after one earlier position, D = 3
            B, K, g, T, U, D = 2, 2, 3, 4, 5, 3
            q, k, v, do = randn((B, K, g, T, D)), randn((B, K, U, D)), randn((B, K, U, D)), randn((B, K, g * T, D))
            later = np.tile(np.arange(U) > np.arange(U - T, U)[:, None], (g, 1))  # (g T, U)
            S = np.where(later, -np.inf, randn((B, K, g * T, U)))
            P = np.exp(S) / np.exp(S).sum(axis=-1, keepdims=True)
            names = {"q": q, "q_rows": q.reshape(B, K, g * T, D), "k_rows": k, "v_rows": v, "do_rows": do, "c": D**-0.5}
            names |= {"S": S, "P": P, "dP": randn(P.shape), "dS": randn(P.shape)}
            for name, width in (("q", 6), ("k", 4), ("v", 3)):
                d, W = randn((N, width)), randn((width, IN))
                names |= {f"d{name}": d, f"W_{name}": W, f"dx_{name}": d @ W}
            at = {"t": np.tile(np.arange(U - T, U), g), "u": range(U), "w": range(U)}
            return names | {"printed": {"q": names["q_rows"], "k": k, "v": v, "do": do, "D": D, "at": at}}
        case "moe", (5 | 6 | 7):  # expert 1 of three, which has the rows 2 to 4
            W, e, part = randn((3, OUT, IN)), 1, slice(2, 5)
            printed = {"x": x[part], "dy": dy[part], "fixed": {"e": e}}
        case "moe", (8 | 9 | 10 | 11 | 12 | 13):  # each row keeps three experts
            g, o, s, q, routed = (
                rng.random((N, 3)),
                randn((N, 3, IN)),
                randn((N, IN)),
                rng.random((N, 1)),
                randn((N, IN)),
            )
            dy = d_rows = randn((N, IN))
        case "moe", (16 | 17):  # the factors of four experts
            E = experts = 4
            A, B = randn((E * r, IN)), randn((OUT, r * E))
        case "moe", _:  # four experts, of which each row keeps two
            E, K, n, f, W = 4, 2, N, rng.random(4), randn((4, IN))
            dp, d_scores, scores = randn((N, E)), randn((N, E)), randn((N, E))
            choice = np.argsort(-scores, axis=1)[:, :K]
            p = np.where((choice[:, :, None] == np.arange(E)).any(axis=1), np.exp(scores), 0)
            p /= p.sum(axis=1, keepdims=True)
            layers = {"Router": Router(StackedLinear(W), K)}
            weight_cache = layers["Router"].weight.forward(x)[1]
            printed = {"N": N, "dl": d_scores, "l": scores, "S": np.array([{*kept} for kept in choice]), "c": choice}
        case "blk", _:  # a block of 4 queries, 3 heads per key head, and 5 keys; Z and N are partial sums
            B, K, g, n, J, D = 2, 2, 3, 4, 5, 3
            rows = {name: randn((B, K, g * n, 1)) for name in ("m", "m_new", "f", "dZ")}
            rows["Z"] = rows["Z_rows"] = 1 + rng.random((B, K, g * n, 1))
            rows |= {name: randn((B, K, g * n, D)) for name in ("N", "do_rows", "q_rows", "dq_rows")}
            rows |= {"o_rows": rows["N"] / rows["Z"], "dN": rows["do_rows"] / rows["Z"]}
            rows |= {name: randn((B, K, J, D)) for name in ("k_rows", "v_rows")}
            rows |= {name: randn((B, K, g * n, J)) for name in ("S", "E", "dE", "dS")}
            rows |= {name: randn((B, K, 1, J + 2, D)) for name in ("dk", "dv")}
            rows |= {"c": D**-0.5, "cq_rows": D**-0.5 * rows["q_rows"], "u": slice(2, 2 + J)}
            printed = {name: rows[f"{name}_rows"] for name in ("k", "v", "q", "do", "o", "dq")}
            printed |= {
                "m'": rows["m" if number == 2 else "m_new"],
                "J": range(J),
            }  # in (blk.2) m is already the new one
            printed |= {name: rows[name][:, :, 0, 2:] for name in ("dk", "dv")}
            if number == 6:  # it has each head's rows separately
                printed = {name: rows[name].reshape(B, K, g, n, -1) for name in ("N", "Z")}
            return rows | {"B": B, "K": K, "g": g, "n": n, "D": D, "printed": printed}
        case "nf", (7 | 8):  # three blocks of 8 scales, minus their mean
            blocks, n = randn((3, 8)), 1 + rng.random(3)
            printed = {"a": blocks + 0.375, "m": 0.375, "d": scale_book()}
        case "nf", 9:  # one block of scales
            n, d, mean = 1.7, randn(3), 0.375
            printed = {"n_B": n, "t": np.arange(3), "m": mean}
        case "nf", _:  # three blocks of 8; in (nf.5) each weight has a different code
            n, m, p_1, quantile, count, block_size = 16, 8, 0.96, NormalDist().inv_cdf, 24, 8
            blocks, c, absmax, codes = randn((3, 8)), randn((3, 8)), 1 + rng.random(3), rng.integers(0, 16, 24)
            printed = {"w": blocks, "a": absmax, "Phi^-1": quantile, "q_0": codes[0::2], "q_1": codes[1::2], "c": NF4}
            if number == 5:
                printed = {"a": absmax, "q": np.arange(24).reshape(3, 8), "c": c.ravel()}
        case "loftq", _:
            quantised = lambda W: dequantize_nf4(*quantize_nf4(W), W.shape, dtype="float64")  # noqa: E731
            Q, rank, rest, options = quantised(W), r, Linear(W - s * B @ A), {"double_quant": False}
            printed = {"quantised": quantised, "best_r": lambda D: nearest(D, r)}
            if number == 2:
                named = lambda A, B, s: {"A": A, "B": B, "s": s}  # noqa: E731
    return locals()


def put(padded, window, part):
    """Return dx, (N, C, L), after setting a window of the code's array (C, N, L) to new values."""
    dx = padded.copy()
    dx[(..., *window)] = part
    return dx.swapaxes(0, 1)


def nearest(D, r):
    """Return the nearest matrix of rank r."""
    U, S, Vt = np.linalg.svd(D)
    return U[:, :r] * S[:r] @ Vt[:r]
