"""An implementation held against the formulas.

- `contract`: what an implementation is, and what it must do
- `check`: `check`
- `calling`: calls an implementation's functions, and notes what they do beside
- `comparing`: its numbers compared with the right ones; `other_scaling`: what its update is multiplied by instead
- `describing`: what is said of a wrong array that no known bug explains
- `in_common`: the property of the problems that decides where it is wrong
- `claims`: the claims that compare no layer's numbers: a new adapter, Adam, a merge, the edge of the contract
- `kindreport`: what `check` returns, with an id for each claim and problem
"""
