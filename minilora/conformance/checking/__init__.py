"""Check an implementation of LoRA against the formulas.

`contract` defines what an implementation is. `check` uses the other files in order, from the first call to the report.
"""
