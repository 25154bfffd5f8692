"""The audit of an adapter's files: whether it is sound, alone or in a model. ``minilora audit`` prints the report.

`auditing` runs all the checks. `headers` opens an adapter or a model, and `formats` detects which program wrote the
adapter. The rules are functions that yield `findings`. They check the `keys` of the configuration, the `contents` of
the file, where its modules land in the model (`landing`), their shapes (`fitting`), their `numbers`, and what merging
would lose (`changes`).

`merging` compares a merged model with its base, one of its `units` at a time. `rounding` computes what a correct merge
may write, `suspects` identifies what a wrong weight contains, and `verdicts` sums up the whole model.
"""
