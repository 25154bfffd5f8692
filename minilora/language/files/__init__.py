"""A language model's files: which formats its weights, its tokenizer and its chat template come in.

`weights` reads a model, from a folder with `nf4files`, from a .gguf file with `gguf`; `save` writes one, and
`ggufexport` an adapter. `tokens` is the tokenizer, and `chattemplate` writes messages as the text that the model knows.
"""
