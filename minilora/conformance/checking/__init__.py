"""An implementation held against the formulas.

`contract` says what an implementation is; `check` goes through the other files, from the first call to the report.
"""
