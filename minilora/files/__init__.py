"""Readers and writers for the files of adapters, models and training runs.

The public modules are `adapters`, which loads and saves an adapter in PEFT's layout, `merge`, which merges one into a
model's files, `inspection`, which summarises one, and `checkpoint`, which saves the state of a training run.

They build on `peft`, which reads an adapter's folder; on `patterns` and `expert_adapters`, which match factors with
modules; and on `placement`, which finds the tensors of a model that an adapter changes. `tensors`, `experts` and
`modelfolder` read a model's files. `disk` reads and writes files safely.
"""

from .. import lazily

__getattr__, __dir__ = lazily(__name__)
