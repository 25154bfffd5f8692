"""Which known bugs an implementation's wrong answers are.

- `diagnoses`: which of them explain wrong answers
- `wrong_arrays`: what can be said of a wrong array that none of them explains
"""
