"""What a network is made of besides `Linear`: one file, one derivation each.

Between and around layers: `activation`; `flatten`, from images to rows; `sequential`, the chain rule along a list, and
`mlp`, the first model made of it.

Linear layers on a rewritten input: `embedding` and `convolution`.

A weight in four bits: `nf4`, the numbers, and `quantized`, the frozen layer that keeps them.

A language model's: `attention`, with `rotary` positions, `norm`, and `gated`, the MLP that follows. In that MLP's place
a mixture: a `router`, `stacked` weights, and `experts`.
"""
