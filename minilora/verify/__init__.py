"""Is it right? Gradients against measured slopes, and training against the best there is.

`gradcheck` compares a gradient with slopes that it measures, and `slopes` measures them. `closed_form` has the best
adapter that any training could find. `selfcheck` is what ``minilora check`` runs, over the layers in `instances`.
"""
