"""The judge: what a LoRA must do, and what is wrong with one that does not do it.

Which of these is yours?

==============================  ================================================================================
you have                        you run
==============================  ================================================================================
a LoRA in Python, any library   ``minilora conformance --start torch -o my_lora.py`` writes a file to fill in; then
                                ``minilora conformance my_lora.py``, or `check` from your own code
the same, with your own tests   ``python -m pytest -p minilora.conformance.plugin --pyargs
                                minilora.conformance.test_implementation --lora MODULE[:OBJECT]``
a LoRA in another language      ``minilora vectors FOLDER``, then ``minilora vectors FOLDER --compare YOURS``
an engine that reads adapters   ``minilora golden FOLDER``, then ``minilora golden FOLDER --compare YOURS``
an adapter, and its model       ``minilora audit ADAPTER --model MODEL``
an adapter in an engine         ``minilora diagnose LOGITS --model MODEL --adapter ADAPTER``
==============================  ================================================================================

The answers are compared with the formulas, up to rounding. Where they differ, a known bug that gives just these numbers
is named, and in whose code it was made; where no bug does, the report says what it sees. The exit code is 0, 1 where
something is wrong, or 2 where nothing could be judged.

`problems` has what is asked, the right answers and the known bugs. `checking` holds an implementation against them,
`naming` finds the bug, and `report` tells it. `vectors` and `golden` do the same by files, `plugin` and
`test_implementation` in pytest.
"""

from .. import lazily

__getattr__, __dir__ = lazily(__name__)
