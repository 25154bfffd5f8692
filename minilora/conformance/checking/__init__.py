"""An implementation held against the formulas.

- `contract`: what an implementation is, and what it must do
- `check`: `check`
- `calling`: calls an implementation's functions, and notes what they do beside
- `comparing`: its numbers compared with the right ones; `other_scaling`: what its update is multiplied by instead
- `describing`: what is said of a wrong array that no known bug explains
- `in_common`: the property of the problems that decides where it is wrong
- `behaviour`: the claims that compare no layer's numbers: the start, Adam, the frozen base, merged and back
- `edges`: the claims about what an implementation may refuse: no rows, more axes, an alpha of 0
- `packing`: the claims about `pack` and `unpack`, of a layer in NF4
- `output_dtype`: the claim about the output's precision, of a layer in bfloat16 with factors in float32
- `kindreport`: what `check` returns, with an id for each claim and problem
"""
