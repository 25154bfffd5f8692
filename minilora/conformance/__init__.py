"""The judge: what a LoRA must do, and what is wrong with one that does not do it.

People install this package to have their own LoRA judged. Which of these is yours?

==============================  ================================================================================
you have                        you run
==============================  ================================================================================
a LoRA in Python, any library   ``minilora conformance MODULE[:OBJECT]``, or `check` from your own code
the same, with your own tests   ``python -m pytest -p minilora.conformance.plugin --pyargs
                                minilora.conformance.test_implementation --lora MODULE[:OBJECT]``
a LoRA in another language      ``minilora vectors FOLDER``, then ``minilora vectors FOLDER --compare YOURS``
an engine that reads adapters   ``minilora golden FOLDER``, then ``minilora golden FOLDER --compare YOURS``
an adapter, and its model       ``minilora audit ADAPTER --model MODEL``
an adapter in an engine         ``minilora diagnose LOGITS --model MODEL --adapter ADAPTER``
==============================  ================================================================================

Each compares your numbers with the formulas, up to rounding. Where they differ it names the known bug that gives just
your numbers and says in whose code it was made; where no bug does, it says what it sees. Each exits with 0, 1 where
something is wrong, or 2 where nothing could be judged.

The rooms, in the order in which they import each other:

- `problems`: what is asked, and the right answers
- `bugs`: the table of known bugs, and which of them explain wrong answers
- `checking`: an implementation held against the formulas: `check`, its claims and its report
- `running`: foreign code, found by its name and run in a process of its own
- `vectors`: problems and answers as files, for implementations in any language
- `golden`: adapters as files, with right answers, for programs that read them
- `diagnosis`: an engine's logits, held against what known mistakes make of a person's own adapter
- `plugin`, `test_implementation`: `check` as tests of pytest, with an id each
"""

from .checking.check import check
from .report import CannotRun, Report

__all__ = ["CannotRun", "Report", "check"]
