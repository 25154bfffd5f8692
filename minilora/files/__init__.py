"""Adapters and trainings as files: what is in them, how they are read, and what is refused.

For callers: `adapters` loads and saves an adapter in PEFT's layout, `merge` folds one into a model, `inspection`
shows what is in one, `checkpoint` keeps a training.

Under them, `peft` is an adapter's folder, and `tensors`, `mixtures` and `modelfolder` are a model's files.
`save_llama` is a door to `minilora.language`.
"""

from .. import lazily

__getattr__, __dir__ = lazily(__name__)
