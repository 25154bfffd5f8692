"""What a LoRA must do, said once: for the layers here, for planted bugs, and for implementations of other people.

`check` holds an implementation against the formulas and names what is wrong with it. So do the command ``minilora
conformance`` and, as tests with an id each, the pytest plugin.

- `claims`: what every layer of this library must do, as functions that take any layer
- `problems`: sizes and a seed, from which the arrays are drawn that layers and implementations are tried on
- `kinds`: the kinds of layers, each as a linear layer on rows, and a set of problems for each
- `mixed`, `slots`: two of these kinds, factors in float32 beside a base in bfloat16 and several slots in one weight
- `reference`: the right answers to a problem, and how far rounding may move them
- `adam`: the right answers of Adam
- `bugs`: the known bugs, a row each
- `suite`: `check`, and what an implementation is
- `report`: what was found, with an id for each claim and problem
- `calling`: calls an implementation's functions, and notes what they do beside
- `judges`: the claims that compare no layer's numbers: the start, Adam, the frozen base
- `edges`: the claims about what an implementation may refuse: no rows, more axes, an alpha of 0
- `fourbits`: the claims about `pack` and `unpack`, of a layer in NF4
- `outputs`: the claim about the output's precision, of a layer in bfloat16 with factors in float32
- `diagnoses`: which known bugs explain wrong answers
- `patterns`: what is seen inside a wrong array that no known bug explains
- `target`: finds the module or the file that is named on a command line
- `apart`: checks in a process of its own, whatever foreign code does there
- `xfails`: failures that are known, in a file that an adopter keeps
- `plugin`, `test_implementation`: the same for pytest
- `vectors`: problems and answers as files, for implementations in any language
- `golden`: adapters as files with right answers, for programs that read them
"""

from .report import CannotRun, Report
from .suite import check

__all__ = ["CannotRun", "Report", "check"]
