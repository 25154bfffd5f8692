"""An embedding, as others write it: nothing here is of this library."""

import numpy as np


def forward(x, weight, bias, lora_A, lora_B, alpha):
    s = alpha / lora_A.shape[0]
    rows = lora_A[:, x].T
    return weight[x] + s * (rows @ lora_B.T)


def backward(dy, x, weight, bias, lora_A, lora_B, alpha):
    s = alpha / lora_A.shape[0]
    rows = lora_A[:, x].T
    dB = s * dy.T @ rows
    d_rows = s * dy @ lora_B
    dA = np.zeros_like(lora_A)
    for n, i in enumerate(x):
        dA[:, i] += d_rows[n]
    return {"lora_A": dA, "lora_B": dB}


def merge(weight, lora_A, lora_B, alpha):
    s = alpha / lora_A.shape[0]
    return weight + s * (lora_B @ lora_A).T


def init(in_features, out_features, rank, rng):
    return np.zeros((rank, in_features)), rng.normal(size=(out_features, rank))
