"""One weight whose outputs are slots, as others write it: nothing here is of this library."""


def slots(lora_A, lora_B, alpha, widths):
    at = 0
    for i, (A, B, a, w) in enumerate(zip(lora_A, lora_B, alpha, widths, strict=True)):
        if A is not None:
            yield i, A, B, a / len(A), slice(at, at + w)
        at += w


def forward(x, weight, bias, lora_A, lora_B, alpha, widths):
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    for _, A, B, s, where in slots(lora_A, lora_B, alpha, widths):
        y[..., where] += s * (x @ A.T) @ B.T
    return y


def backward(dy, x, weight, bias, lora_A, lora_B, alpha, widths):
    dx = dy @ weight
    dA, dB = [None] * len(widths), [None] * len(widths)
    for i, A, B, s, where in slots(lora_A, lora_B, alpha, widths):
        own = s * dy[..., where]
        dx = dx + own @ B @ A
        dA[i] = (own @ B).T @ x
        dB[i] = own.T @ (x @ A.T)
    return {"x": dx, "lora_A": dA, "lora_B": dB}


def merge(weight, lora_A, lora_B, alpha, widths):
    merged = weight.copy()
    for _, A, B, s, where in slots(lora_A, lora_B, alpha, widths):
        merged[where] += s * B @ A
    return merged
