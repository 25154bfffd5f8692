"""What is asked of a layer, and the right answers to it.

- `problem`: sizes and a seed, from which all arrays are drawn
- `reference`: the right answers to a problem, part by part; `adam_answers`: those of Adam
- `rounding`: precisions, and rounding to them
- `slots`, `mixed`: two kinds of layers, several slots in one weight, and factors in float32 beside a base in bfloat16
- `stacks`: a stack of experts, each row with the number of its own
- `sums`: several adapters put together
- `trial`: a problem in one precision, with its right answers, and how far rounding may move them
- `kinds`: all kinds of layers, each as a linear layer on rows, and the set of problems for each
"""

from .problem import Problem, SmallIntegers

__all__ = ["Problem", "SmallIntegers"]
