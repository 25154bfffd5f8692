"""The variants of LoRA, each with its derivation in its own file.

`adapter` is a LoRA that knows where it stands, also beside embeddings and convolutions; `scaling` has rsLoRA and LoRA+,
a number each; `pissa` another start; `dora` another layer; `stackedlora` a LoRA for each expert of a mixture; `dropout`
a mask before an adapter, in a step; `loftq` a base in four bits, and an adapter that starts at what those lose; `sums`
puts adapters together.
"""
