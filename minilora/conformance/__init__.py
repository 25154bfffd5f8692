"""Conformance tests for LoRA, which say whether an implementation is right and name its bug if not.

Which of these do you have?

==============================  ================================================================================
you have                        you run
==============================  ================================================================================
a LoRA in Python, any library   ``minilora conformance --start torch -o my_lora.py`` writes a file to fill in; then
                                run ``minilora conformance my_lora.py``, or call `check` from your own code
the same, inside pytest         ``python -m pytest -p minilora.conformance.plugin --pyargs
                                minilora.conformance.test_implementation --lora MODULE[:OBJECT]``
a LoRA in another language      ``minilora vectors FOLDER``, then ``minilora vectors FOLDER --compare YOURS``
an engine that reads adapters   ``minilora golden FOLDER``, then ``minilora golden FOLDER --compare YOURS``
an adapter and its model        ``minilora audit ADAPTER --model MODEL``
an adapter in an engine         ``minilora diagnose LOGITS --model MODEL --adapter ADAPTER``
==============================  ================================================================================

The answers are compared with the formulas, up to rounding. Where they differ, the report names a known bug that gives
exactly these numbers, and the project where it was found. If no known bug does, the report describes the difference.
The exit code is 0 if everything is right, 1 if something is wrong, and 2 if nothing could be judged.

`problems` has the inputs, the right answers and the known bugs. `checking` compares an implementation with them,
`naming` finds the bug, and `report` prints it. `vectors` and `golden` do the same through files, and `plugin` and
`test_implementation` do it in pytest.
"""

from .. import lazily

__getattr__, __dir__ = lazily(__name__)
