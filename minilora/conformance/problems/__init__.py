"""What is asked of a layer, the right answers to it, and the wrong ones that people have written.

- `problem`: sizes and a seed, from which all arrays are drawn, and the hooks of a kind; `problems.toml` has the sizes
- `formulas`: the right answers to a problem, part by part
- `tolerance`: precisions, and a problem in one of them, with its right answers, and how far rounding may move them
- `kind`: all that a kind says of itself; `kinds`: the list of them
- `plain`, `images`, `lowprecision`, `several`: the kinds
- `bugs`: the known bugs, a row each; `bugparts`: formulas of theirs that take more than a line
"""

from .problem import Problem

__all__ = ["Problem"]
