"""Adapters and checkpoints as files: what is in them, how they are read, and what is refused.

For callers: `adapters` loads and saves an adapter in PEFT's layout, `merge` folds one into a model, `inspection`
shows what is in one, `checkpoint` keeps a training.

Under them: `adapterfolder`, with `peftconfig`, is an adapter's folder, and `forms` says how each kind of layer is
written there; `basefile` is a checkpoint that an adapter is merged into, `layouts` which way round its weights lie, and
`modelfolder` what stands beside them in a model's folder. `minilora.guards` reads and writes the files themselves.
`save_llama` and `ggufblocks` are doors to `minilora.language`.
"""

from .. import lazy

__getattr__, __dir__ = lazy.attributes(__name__)
