"""A stack of experts, as others write it: nothing here is of this library."""

import numpy as np


def A_of(lora_A, e, E):
    r = len(lora_A) // E
    return lora_A[e * r : (e + 1) * r]


def B_of(lora_B, e, E):
    return lora_B[:, e::E]


def s_of(alpha, lora_A, e, E):
    return alpha / (len(lora_A) // E)


def forward(x, weight, lora_A, lora_B, alpha, expert_ids):
    E = len(weight)
    y = np.zeros((len(x), weight.shape[1]), x.dtype)
    for e in range(E):
        rows = np.flatnonzero(expert_ids == e)
        A, B, s = A_of(lora_A, e, E), B_of(lora_B, e, E), s_of(alpha, lora_A, e, E)
        y[rows] = x[rows] @ weight[e].T + s * (x[rows] @ A.T) @ B.T
    return y


def backward(dy, x, weight, lora_A, lora_B, alpha, expert_ids):
    E = len(weight)
    r = len(lora_A) // E
    dx, dA, dB = np.zeros_like(x), np.zeros_like(lora_A), np.zeros_like(lora_B)
    for e in range(E):
        rows = np.flatnonzero(expert_ids == e)
        A, B, s = A_of(lora_A, e, E), B_of(lora_B, e, E), s_of(alpha, lora_A, e, E)
        du = s * dy[rows]
        dx[rows] = dy[rows] @ weight[e] + du @ B @ A
        gA = (du @ B).T @ x[rows]
        gB = du.T @ (x[rows] @ A.T)
        dA[e * r : (e + 1) * r] = gA
        dB[:, e::E] = gB
    return {"x": dx, "lora_A": dA, "lora_B": dB}


def merge(weight, lora_A, lora_B, alpha):
    E = len(weight)
    return np.stack([weight[e] + s_of(alpha, lora_A, e, E) * B_of(lora_B, e, E) @ A_of(lora_A, e, E) for e in range(E)])
