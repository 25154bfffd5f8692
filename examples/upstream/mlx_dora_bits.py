"""mlx-lm's DoRA beside a quantised layer: it takes the width for another where 32 is no multiple of the bits.

    pip install "mlx[cpu]" mlx-lm; python mlx_dora_bits.py

mlx-lm 0.32.2: with 3, 5 and 6 bits DoRALinear makes lora_a for a width of 180 instead of 192, and its forward raises.
LoRALinear computes the width as `input_dims * 32 // bits`, DoRALinear as `input_dims *= 32 // bits`.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

for bits in (2, 3, 4, 5, 6, 8):
    layer = nn.QuantizedLinear.from_linear(nn.Linear(192, 64, bias=False), group_size=64, bits=bits)
    for kind in (LoRALinear, DoRALinear):
        adapted = kind.from_base(layer, r=2)
        try:
            mx.eval(adapted(mx.ones((1, 192))))
            said = "runs"
        except ValueError as error:
            said = f"raises {error}"[:70]
        print(f"{bits} bits, {kind.__name__}: lora_a {adapted.lora_a.shape}, {said}")
