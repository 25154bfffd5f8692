"""A matrix whose rows are not whole blocks, decoded by bitsandbytes as it is and flattened. The two should be equal.

python examples/conformance/bitsandbytes_rows.py
"""

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

torch.manual_seed(0)
print("bitsandbytes", bitsandbytes.__version__)
for rows, width in ((64, 64), (64, 96), (64, 112), (64, 80), (64, 128)):
    for blocksize in (64, 128):
        weight = torch.randn(rows, width)
        packed, state = quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
        flat, flat_state = quantize_4bit(weight.flatten(), blocksize=blocksize, quant_type="nf4")
        assert torch.equal(packed.flatten(), flat.flatten())  # the same bytes
        off = (dequantize_4bit(packed, state).flatten() - dequantize_4bit(flat, flat_state).flatten()).abs().max()
        print(f"{rows} x {width:3}, blocks of {blocksize:3}: the two differ by {off:.3f}")
