"""The same numbers with less work. Nothing here is needed to understand LoRA.

`residual` has the gradients of the squared error without the error, and `accumulation` those of a large batch with the
memory of a small one, its parts on several `threads`; `widths` makes the parts of texts. `train` takes them only where
you name them::

    train(layer, X, Y, rng=rng, gradients=minilora.fast.residual_form)

`pages` keeps one step's memory for the next. `blockwise` is attention in memory that grows with a text and not with its
square; a language model takes it for long ones. `experts_by_rows` is a mixture's gate, which takes some rows at a time.
`adam` is Adam's update by blocks, and for a GPU in one kernel.
"""

from .. import lazily

__getattr__, __dir__ = lazily(__name__)
