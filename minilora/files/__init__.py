"""Adapters and trainings as files: what is in them, how they are read, and what is refused.

For callers: `adapters` loads and saves an adapter in PEFT's layout, `merge` folds one into a model, `inspection`
shows what is in one, `checkpoint` keeps a training.

Under them, `peft` is an adapter's folder, `patterns` and `expert_adapters` say whose factors are whose, and `placement`
where an adapter lands in a model's files: `tensors`, `experts`, and `modelfolder` for what lies around them. `disk`
reads and writes.
"""

from .. import lazily

__getattr__, __dir__ = lazily(__name__)
