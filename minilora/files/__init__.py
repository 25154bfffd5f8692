"""Adapters and checkpoints as files: what is in them, how they are read, and what is refused.

For callers: `adapters` loads and saves an adapter in PEFT's layout, `merge` folds one into a model, `inspection`
shows what is in one, `checkpoint` keeps a training.

Under them: `tensorfile` reads the format of all these files, safetensors. `adapterfolder`, with `peftconfig` and
`patterns`, is an adapter's folder, and `forms` says how each kind of layer is written there; `basefile` is a checkpoint
that an adapter is merged into, `layouts` which way round its weights lie, and `modelfolder` what stands beside them in
a model's folder. `writing` puts files in their place whole or not at all; `errors` is what is raised.

A language model's: `llama` reads one, from the folders of `llamafolder`, the files of `llamagguf` or of `llamanpz`, and
`llamasave` writes one as such a folder; `llamasettings` lists what those may say, and `tokenizer` makes ids of text.
`chattemplate` is how a model wants a chat written, and `rendering` the process that writes it.
Weights that stay quantised: `nf4weights`, as bitsandbytes writes them, and `ggufblocks`. `ggufexport` writes an adapter
for llama.cpp, and `ggufnames` has its names.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "save_llama":  # at its first use: the command line starts without NumPy
        from .llamasave import save_llama

        return save_llama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
