"""Files of adapters, models and trainings.

The public modules are `adapters`, which loads and saves an adapter in PEFT's layout, `merge`, which merges one into a
model's files, `inspection`, which summarises one, and `checkpoint`, which saves the state of a training.

Below them, `peft` reads an adapter's folder, `patterns` and `expert_adapters` match factors with modules, and
`placement` finds the tensors of a model that an adapter changes. A model's files are read by `tensors`, `experts` and
`modelfolder`; `disk` reads and writes.
"""

from .. import lazily

__getattr__, __dir__ = lazily(__name__)
