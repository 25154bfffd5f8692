"""What is asked of a layer, the right answers to it, and the wrong ones that people have written.

- `problem`: sizes and a seed, from which all arrays are drawn
- `formulas`: the right answers to a problem, part by part
- `tolerance`: precisions, and a problem in one of them, with its right answers, and how far rounding may move them
- `images`, `lowprecision`, `several`: kinds of layers that are not just rows of numbers
- `kinds`: all kinds of layers, each as a linear layer on rows, and the set of problems for each
- `bugs`: the known bugs, a row each; `bugparts`: formulas of theirs that take more than a line
"""

from .problem import Problem

__all__ = ["Problem"]
