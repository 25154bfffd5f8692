"""bitsandbytes' 8-bit blocks on a CPU: the smallest numbers of the map do not come back as themselves.

    pip install torch bitsandbytes; python bitsandbytes_small_codes.py

bitsandbytes 0.50.2: 5.5e-07, 3.25e-06 and 7.75e-06 come back as 2.125e-05, and 8.875e-05 as 6.625e-05. A number of the
map divided by a largest one of 1 is in the map, so rounding to the nearest would return it.
"""

import torch
from bitsandbytes import functional as F

code = F.create_dynamic_map().float()
small = torch.sort(code[code > 0])[0][:40]
block = torch.zeros(256)
block[:40], block[-1] = small, 1.0
codes, state = F.quantize_blockwise(block, code=code, blocksize=256)
back = F.dequantize_blockwise(codes, state)[:40]
for before, after in zip(small.tolist(), back.tolist(), strict=True):
    if before != after:
        print(f"{before:.4g} comes back as {after:.4g}")
