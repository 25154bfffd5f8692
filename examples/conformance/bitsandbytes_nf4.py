"""bitsandbytes' four bits, with LoRA beside them as PEFT has it. minilora conformance bitsandbytes_nf4.py"""

from types import SimpleNamespace

import bitsandbytes.functional as bnb
import torch
from plain_torch import backward, forward

__all__ = ["backward", "forward", "kinds"]
BOOK = bnb.get_4bit_type("nf4", device="cpu")


def decoded(packed, absmax, shape, nested_absmax=None, mean=0.0):
    """By the flattened weight: of some matrices 0.50.2 decodes rows wrongly on a processor with AVX-512."""
    flat = torch.Size([shape[0] * shape[1]])
    state = bnb.QuantState(torch.from_numpy(absmax.copy()), flat, BOOK, 64, "nf4", torch.float32)
    if nested_absmax is not None:
        state.nested, state.offset = True, torch.tensor(mean)
        nested = torch.from_numpy(nested_absmax.copy())
        state.state2 = bnb.QuantState(nested, code=bnb.create_dynamic_map(), blocksize=256, dtype=torch.float32)
    return bnb.dequantize_4bit(torch.from_numpy(packed.copy())[:, None], state).reshape(shape)


def weight_of(packed, absmax, A, B, nested_absmax, mean):
    return decoded(packed, absmax, (len(B), A.shape[1]), nested_absmax, mean).numpy()


def forward_4bit(x, packed, absmax, bias, A, B, alpha, nested_absmax=None, mean=0.0):
    return forward(x, weight_of(packed, absmax, A, B, nested_absmax, mean), bias, A, B, alpha)


def backward_4bit(dy, x, packed, absmax, bias, A, B, alpha, nested_absmax=None, mean=0.0):
    return backward(dy, x, weight_of(packed, absmax, A, B, nested_absmax, mean), bias, A, B, alpha)


kinds = {"nf4": SimpleNamespace(forward=forward_4bit, backward=backward_4bit)}
