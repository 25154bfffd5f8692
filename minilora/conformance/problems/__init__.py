"""The test problems for a layer, their right answers, and the known bugs.

- `problem`: a problem, which is defined by sizes and a seed; `problems.toml` has the sizes
- `formulas`: the right answers to a problem, part by part
- `tolerance`: a problem in one precision, with its right answers and the rounding error that is allowed
- `kind`: the record of a kind of layer; `kinds`: the list of all kinds
- `plain`, `images`, `lowprecision`, `several`: the kinds
- `bugs`: the table of known bugs; `bugparts`: their longer formulas
"""

from .problem import Problem

__all__ = ["Problem"]
