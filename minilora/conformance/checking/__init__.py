"""An implementation held against the formulas.

- `contract`: what an implementation is, and what it must do
- `check`: `check`
- `calling`: calls an implementation's functions, and notes what they do beside
- `comparing`: its numbers compared with the right ones: outcomes, verdicts from them, and what is wrong by name
- `suite`: problems, answers and known bugs as a world of the namer, and a scaling that is measured
- `describing`: what is said of a wrong array that no known bug explains
- `in_common`: what the problems have in common on which it is wrong
- `claims`: the claims that compare no layer's numbers, and those about what an implementation may refuse
- `child`: foreign code, found by its name and run in a process of its own
- `kindreport`: what `check` returns, with an id for each claim and problem
"""
