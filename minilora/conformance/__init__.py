"""What a LoRA must do, said once: for the layers here, for planted bugs, and for implementations of other people.

`check` holds an implementation against the formulas and names what is wrong with it, and so does the command
``python -m minilora.conformance``. `claims` has what every layer of this library must do. `problems` has the arrays
that both are tried on, `reference` the right answers, and `diagnoses` the known bugs.

Under `check`: `suite` asks and compares, and `judges` decides what is no comparison of numbers; `kinds` has the kinds
of layers, and `calling` calls what other people wrote. `vectors` puts the problems and the right answers into files.
"""

from .suite import CannotRun, Report, check

__all__ = ["CannotRun", "Report", "check"]
