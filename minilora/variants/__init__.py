"""What became of LoRA: one file, one derivation each.

`scaling` has rsLoRA and LoRA+, a number each; `pissa` another start; `dora` another layer; `stackedlora` a LoRA for
each expert of a mixture; `dropout` a mask before an adapter, in a step; `sums` puts adapters together. `adapter` is a
LoRA that knows where it stands and how it started, `variant` the table of variants, which adaptation, files and merging
ask, and `rewritten` takes all of them to embeddings and convolutions.
"""
