"""llama.cpp's format: `ggufreader` reads a model, `ggufexport` writes an adapter.

`ggufblocks` has quantised types and a layer that keeps them, `ggufnames` llama.cpp's names of arrays and sizes.
"""
