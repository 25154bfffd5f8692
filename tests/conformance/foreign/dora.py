"""DoRA, its norm taken for a constant, as others write it: nothing here is of this library."""

import numpy as np


def V_of(weight, lora_A, lora_B, alpha):
    s = alpha / lora_A.shape[0]
    return weight + s * (lora_B @ lora_A)


def norm_of(weight, lora_A, lora_B, alpha):
    V = V_of(weight, lora_A, lora_B, alpha)
    return np.sqrt((V * V).sum(axis=1))


def forward(x, weight, bias, lora_A, lora_B, alpha, magnitude):
    s = alpha / lora_A.shape[0]
    n = norm_of(weight, lora_A, lora_B, alpha)
    gain = magnitude / np.where(n == 0, 1, n)
    base = x @ weight.T
    update = s * (x @ lora_A.T) @ lora_B.T
    y = gain * (base + update)
    if bias is not None:
        y = y + bias
    return y


def backward(dy, x, weight, bias, lora_A, lora_B, alpha, magnitude):
    s = alpha / lora_A.shape[0]
    V = V_of(weight, lora_A, lora_B, alpha)
    n = norm_of(weight, lora_A, lora_B, alpha)
    n = np.where(n == 0, 1, n)
    gain = magnitude / n
    dm = (dy * (x @ V.T)).sum(axis=0) / n
    G = dy * gain
    dA = s * (G @ lora_B).T @ x
    dB = s * G.T @ (x @ lora_A.T)
    dx = G @ V
    return {"x": dx, "lora_A": dA, "lora_B": dB, "magnitude": dm}


def merge(weight, lora_A, lora_B, alpha, magnitude):
    V = V_of(weight, lora_A, lora_B, alpha)
    n = norm_of(weight, lora_A, lora_B, alpha)
    return (magnitude / n)[:, None] * V


def init(in_features, out_features, rank, rng, weight):
    bound = in_features**-0.5
    A, B = rng.uniform(-bound, bound, (rank, in_features)), np.zeros((out_features, rank))
    return A, B, np.linalg.norm(weight, axis=1)
