"""The wrong LoRAs that people have written, and which of them an implementation's wrong answers are.

- `table`: the known bugs, a row each
- `diagnoses`: which of them explain wrong answers
- `wrong_arrays`: what is seen inside a wrong array that none of them explains
"""
