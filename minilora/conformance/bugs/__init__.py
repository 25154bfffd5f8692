"""The wrong LoRAs that people have written, and which of them an implementation's wrong answers are.

- `table`: the known bugs, a row each; `bug`: what a row is; `parts`: formulas that take more than a line
- `diagnoses`: which of them explain wrong answers
- `wrong_arrays`: what can be said of a wrong array that none of them explains
"""
