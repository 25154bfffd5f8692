"""A model's folder in Hugging Face's layout.

`folderreader` reads its weights and `configjson` its sizes; `folderwriter` writes one. `nf4tensors` has weights in
bitsandbytes' four bits.
"""
