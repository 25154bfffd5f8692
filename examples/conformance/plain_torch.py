"""Any torch module with a base, A and B: this is the whole wrapper. minilora conformance plain_torch.py"""

import torch


def module(weight, bias, lora_A, lora_B, alpha):
    """Put a layer of yours here: return it, with its two factors."""
    A, B = torch.nn.Parameter(lora_A), torch.nn.Parameter(lora_B)
    return lambda x: torch.nn.functional.linear(x, weight, bias) + alpha / len(A) * (x @ A.T @ B.T), A, B


def tensors(arrays):
    return [torch.from_numpy(a) if hasattr(a, "dtype") else a for a in arrays]


def forward(x, *arrays, module=module):
    (x,), (layer, *_) = tensors([x]), module(*tensors(arrays))
    return layer(x).detach().numpy()


def backward(dy, x, *arrays, module=module):
    (dy, x), (layer, *factors) = tensors([dy, x]), module(*tensors(arrays))
    layer(x.requires_grad_(x.is_floating_point())).backward(dy)
    grads = [None if p.grad is None else p.grad.numpy() for p in (x, *factors)]
    return dict(zip(("x", "lora_A", "lora_B", "magnitude"), grads, strict=False))
