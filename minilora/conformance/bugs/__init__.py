"""Which known bugs an implementation's wrong answers are.

- `diagnoses`: which of them explain wrong answers
"""
