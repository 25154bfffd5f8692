"""Adapters that are put together, as others write it: nothing here is of this library."""

import numpy as np


def s_of(i, lora_A, alpha, use_rslora):
    r = len(lora_A[i])
    return alpha[i] / (r**0.5 if use_rslora[i] else r)


def w_of(i, weights):
    return weights[i]


def change(lora_A, lora_B, alpha, use_rslora, weights):
    every = range(len(lora_A))
    return sum(w_of(i, weights) * s_of(i, lora_A, alpha, use_rslora) * lora_B[i] @ lora_A[i] for i in every)


def cat(lora_A, lora_B, alpha, use_rslora, weights):
    A = np.concatenate([w_of(i, weights) * s_of(i, lora_A, alpha, use_rslora) * lora_A[i] for i in range(len(lora_A))])
    B = np.concatenate(lora_B, axis=1)
    new = 1.0
    return new * B @ A


def linear(lora_A, lora_B, alpha, use_rslora, weights):
    A = B = 0
    for i in range(len(lora_A)):
        w, s = w_of(i, weights), s_of(i, lora_A, alpha, use_rslora)
        root = abs(w * s) ** 0.5
        left, right = root, root * np.sign(w * s)
        A = A + right * lora_A[i]
        B = B + left * lora_B[i]
    new = 1.0
    return new * B @ A


def svd(lora_A, lora_B, alpha, use_rslora, weights, rank):
    D = change(lora_A, lora_B, alpha, use_rslora, weights)
    U, S, Vt = np.linalg.svd(D, full_matrices=False)
    S[rank:] = 0
    new = 1.0
    return new * (U * S) @ Vt
