"""A linear layer, as others write it: nothing here is of this library."""

import numpy as np


def scale(alpha, r):
    return alpha / r


def forward(x, weight, bias, lora_A, lora_B, alpha):
    r = lora_A.shape[0]
    s = scale(alpha, r)
    h = x @ lora_A.T
    update = s * (h @ lora_B.T)
    base = x @ weight.T
    y = base + update
    if bias is not None:
        y = y + bias
    return y


def backward(dy, x, weight, bias, lora_A, lora_B, alpha):
    s = scale(alpha, lora_A.shape[0])
    h = x @ lora_A.T
    dB = s * dy.T @ h
    dh = s * dy @ lora_B
    dA = dh.T @ x
    dx_base = dy @ weight
    dx_lora = dh @ lora_A
    dx = dx_base + dx_lora
    return {"x": dx, "lora_A": dA, "lora_B": dB}


def merge(weight, lora_A, lora_B, alpha):
    s = scale(alpha, lora_A.shape[0])
    delta = lora_B @ lora_A
    return weight + s * delta


def init(in_features, out_features, rank, rng):
    bound = 1 / np.sqrt(in_features)
    A = rng.uniform(-bound, bound, (rank, in_features))
    return A, np.zeros((out_features, rank))


def step(params, grads, state):
    lr, b1, b2, eps = 1e-3, 0.9, 0.999, 1e-8
    if state is None:
        state = {"t": 0} | {name: {k: np.zeros_like(p) for k, p in params.items()} for name in "mv"}
    t = state["t"] + 1
    new, ms, vs = {}, {}, {}
    for k, p in params.items():
        g = grads[k]
        m = b1 * state["m"][k] + (1 - b1) * g
        v = b2 * state["v"][k] + (1 - b2) * g**2
        mh = m / (1 - b1**t)
        vh = v / (1 - b2**t)
        new[k] = p - lr * mh / (np.sqrt(vh) + eps)
        ms[k], vs[k] = m, v
    return new, {"t": t, "m": ms, "v": vs}
