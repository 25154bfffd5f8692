"""Dropout with a given mask, as others write it: nothing here is of this library."""


def forward(x, weight, bias, lora_A, lora_B, alpha, mask):
    s = alpha / lora_A.shape[0]
    kept = x * mask
    y = x @ weight.T + s * (kept @ lora_A.T) @ lora_B.T
    return y if bias is None else y + bias


def backward(dy, x, weight, bias, lora_A, lora_B, alpha, mask):
    s = alpha / lora_A.shape[0]
    kept = x * mask
    dh = s * dy @ lora_B
    dA = dh.T @ kept
    dB = s * dy.T @ (kept @ lora_A.T)
    dx = dy @ weight + mask * (dh @ lora_A)
    return {"x": dx, "lora_A": dA, "lora_B": dB}


def merge(weight, lora_A, lora_B, alpha):
    return weight + alpha / lora_A.shape[0] * lora_B @ lora_A
