"""The files in which a language model comes: how each is read, and what is refused.

`loading` loads a model, whichever its format: a folder of `huggingface`, a file of `gguf`, or one of glassllm's, which
`npzreader` reads. `supportedsettings` lists what their configurations may say.
"""
