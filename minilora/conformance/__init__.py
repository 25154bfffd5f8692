"""What a LoRA must do, said once: for the layers here, for planted bugs, and for implementations of other people.

`check` holds an implementation against the formulas and names what is wrong with it, and so does the command
``python -m minilora.conformance``. `claims` has what every layer of this library must do. `problems` has the arrays
that both are tried on, `reference` the right answers, and `diagnoses` the known bugs.
"""

from .suite import CannotRun, Report, check

__all__ = ["CannotRun", "Report", "check"]
