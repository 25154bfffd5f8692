"""A language model's files: the formats of its weights, tokenizer and chat template.

`weights` reads a model, from a folder with `nf4files`, from a .gguf file with `gguf`; `save` writes one, and
`ggufexport` an adapter. `tokens` reads the tokenizer, and `chattemplate` renders messages as the model's text.
"""
