"""A layer in NF4, as others write it: nothing here is of this library."""

import numpy as np

BOOK = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip


def dynamic_map():
    values = []
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        means = (edges[:-1] + edges[1:]) / 2
        values += list(10 ** (i - 6) * means) + list(-(10 ** (i - 6)) * means)
    return np.sort(np.array([*values, 0.0, 1.0])).astype(np.float32)


CODES8 = dynamic_map()


def weight_of(packed, absmax, out, n_in, nested_absmax=None, mean=0.0):
    if nested_absmax is not None:
        absmax = CODES8[absmax] * np.repeat(nested_absmax, 256)[: len(absmax)] + np.float32(mean)
    high, low = packed >> 4, packed & 15
    codes = np.stack([high, low], axis=1).reshape(-1)[: out * n_in]
    flat = BOOK[codes] * np.repeat(absmax, 64)[: out * n_in]
    return flat.reshape(out, n_in).astype(np.float32)


def forward(x, packed, absmax, bias, lora_A, lora_B, alpha, nested_absmax=None, mean=0.0):
    W = weight_of(packed, absmax, len(lora_B), lora_A.shape[1], nested_absmax, mean)
    y = x @ W.T + alpha / len(lora_A) * (x @ lora_A.T) @ lora_B.T
    return y if bias is None else y + bias


def backward(dy, x, packed, absmax, bias, lora_A, lora_B, alpha, nested_absmax=None, mean=0.0):
    W = weight_of(packed, absmax, len(lora_B), lora_A.shape[1], nested_absmax, mean)
    s = alpha / len(lora_A)
    dh = s * dy @ lora_B
    return {"x": dy @ W + dh @ lora_A, "lora_A": dh.T @ x, "lora_B": s * dy.T @ (x @ lora_A.T)}


def merge(packed, absmax, lora_A, lora_B, alpha, nested_absmax=None, mean=0.0):
    W = weight_of(packed, absmax, len(lora_B), lora_A.shape[1], nested_absmax, mean)
    return W + alpha / len(lora_A) * lora_B @ lora_A
