"""What a network is made of besides `Linear`: one file, one derivation each.

`activation`, between layers; `flatten`, which makes each image a row; `mlp`, the chain rule along a list of layers.
Linear layers on a rewritten input: `embedding` and `convolution`.
`nf4`, a weight in four bits, and `quantized`, the frozen layer that keeps it.
A language model's: `attention`, with `rotary` positions, `norm`, and `gated`, the MLP that follows. In that MLP's place
a `mixture`: a `router`, with `experts` over `stacked` weights.
"""
