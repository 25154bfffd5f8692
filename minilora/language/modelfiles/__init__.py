"""The files in which a language model comes: how each is read, and what is refused.

`reading` reads a model: from the folders of `llamafolder`, the files of `llamagguf` or of `llamanpz`. `llamasettings`
lists what those may say. Weights that stay quantised: `nf4weights`, as bitsandbytes writes them, and `ggufblocks`.
`ggufexport` writes an adapter for llama.cpp, and `ggufnames` has its names.
"""
