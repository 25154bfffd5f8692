"""The files of the model that an adapter is merged into.

`shards` opens its weights, one safetensors file or several with an index; `orientation` says which way round a weight
lies in them. `companions` copies what stands beside the weights, the configuration and the tokenizer. `tiedhead` gives
a model a head of its own where its head was its embedding. `expertweights` says where the weights of a mixture's
experts are.
"""
