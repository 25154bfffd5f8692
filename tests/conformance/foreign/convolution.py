"""A convolution over any number of axes, as others write it: nothing here is of this library."""

from itertools import product

import numpy as np


def places(shape, kernel, stride, padding, dilation):
    axes = range(len(kernel))
    sizes = [(shape[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in axes]
    for at in product(*map(range, kernel)):
        firsts = [at[i] * dilation[i] for i in axes]
        yield at, tuple(slice(firsts[i], firsts[i] + (sizes[i] - 1) * stride[i] + 1, stride[i]) for i in axes)


def padded(x, padding):
    return np.pad(x, ((0, 0), (0, 0), *((p, p) for p in padding)))


def conv(x, w, stride, padding, dilation, groups):
    xp = padded(x, padding)
    out, cg = w.shape[:2]
    og = out // groups
    y = 0
    for at, where in places(x.shape[2:], w.shape[2:], stride, padding, dilation):
        seen = xp[(slice(None), slice(None), *where)]
        k = w[(slice(None), slice(None), *at)]
        parts = [
            np.einsum("nc...,oc->no...", seen[:, g * cg : (g + 1) * cg], k[g * og : (g + 1) * og])
            for g in range(groups)
        ]
        y = y + np.concatenate(parts, axis=1)
    return y


def conv_grads(dy, x, w, stride, padding, dilation, groups):
    xp = padded(x, padding)
    dxp, dw = np.zeros_like(xp), np.zeros_like(w)
    out, cg = w.shape[:2]
    og = out // groups
    for at, where in places(x.shape[2:], w.shape[2:], stride, padding, dilation):
        for g in range(groups):
            o, c = slice(g * og, (g + 1) * og), slice(g * cg, (g + 1) * cg)
            seen = xp[(slice(None), c, *where)]
            dw[(o, slice(None), *at)] = np.tensordot(dy[:, o], seen, axes=([0, *range(2, seen.ndim)],) * 2)
            dxp[(slice(None), c, *where)] += np.einsum("no...,oc->nc...", dy[:, o], w[(o, slice(None), *at)])
    inner = tuple(slice(p, n + p) for p, n in zip(padding, x.shape[2:], strict=True))
    return dxp[(slice(None), slice(None), *inner)], dw


def forward(x, weight, bias, lora_A, lora_B, alpha, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    dims = weight.ndim - 2
    ones, zeros = (1,) * dims, (0,) * dims
    s = alpha / lora_A.shape[0]
    h = conv(x, lora_A, stride, padding, dilation, 1)
    y = conv(x, weight, stride, padding, dilation, groups) + s * conv(h, lora_B, ones, zeros, ones, groups)
    if bias is not None:
        y = y + bias.reshape(-1, *ones)
    return y


def backward(dy, x, weight, bias, lora_A, lora_B, alpha, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    dims = weight.ndim - 2
    ones, zeros = (1,) * dims, (0,) * dims
    s = alpha / lora_A.shape[0]
    h = conv(x, lora_A, stride, padding, dilation, 1)
    dh, dB = conv_grads(s * dy, h, lora_B, ones, zeros, ones, groups)
    dx_lora, dA = conv_grads(dh, x, lora_A, stride, padding, dilation, 1)
    dx_base, _ = conv_grads(dy, x, weight, stride, padding, dilation, groups)
    return {"x": dx_base + dx_lora, "lora_A": dA, "lora_B": dB}


def merge(weight, lora_A, lora_B, alpha):
    s = alpha / lora_A.shape[0]
    delta = np.tensordot(lora_B.reshape(lora_B.shape[:2]), lora_A, axes=(1, 0))
    return weight + s * delta


def init(in_features, out_features, rank, rng, kernel):
    fan = in_features * int(np.prod(kernel))
    bound = 1 / np.sqrt(fan)
    B = np.zeros((out_features, rank, *(1 for _ in kernel)))
    return rng.uniform(-bound, bound, (rank, in_features, *kernel)), B
