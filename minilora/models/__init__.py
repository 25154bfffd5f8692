"""Models: layers made of layers, with the paths that adapters call them by.

`mlp` has two linear layers. `llama` is the decoder that most open language models are, `llamaconfig` its sizes;
`generate` continues a text with it, and `memory` counts what its training keeps.
"""
