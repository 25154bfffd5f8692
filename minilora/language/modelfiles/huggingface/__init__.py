"""A model's folder in Hugging Face's layout.

`folderreader` reads its weights and `configjson` its sizes; `folderwriter` writes one. `experttensors` has the
tensors of a mixture's experts, `nf4tensors` weights in bitsandbytes' four bits.
"""
