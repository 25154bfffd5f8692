"""A model's folder in Hugging Face's layout.

`folderreader` reads its weights and `configjson` its sizes; `folderwriter` writes one. `experttensors` has the
weights of a mixture's experts, and `nf4tensors` weights in bitsandbytes' four bits.
"""
