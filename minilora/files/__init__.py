"""Adapters and trainings as files: what is in them, how they are read, and what is refused.

For callers: `adapters` loads and saves an adapter in PEFT's layout, `merge` folds one into a model, `inspection`
shows what is in one, `checkpoint` keeps a training.

Under them, `peft` is an adapter's folder, and `patterns` and `experts` say whose factors are whose. `placement` says
where an adapter lands in a model's files, which are `tensors`, `mixtures` and `modelfolder`. `inputs` opens what is
read, and `atomic` writes whole or not at all.
"""

from .. import lazily

__getattr__, __dir__ = lazily(__name__)
