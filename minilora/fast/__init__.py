"""The same numbers with less work. Nothing here is needed to understand LoRA.

`residual` computes the gradients of the squared error without the error, and `accumulation` those of a large batch with
the memory of a small one, on several `threads`; `widths` cuts batches of texts into parts. `train` uses them only on
request::

    train(layer, X, Y, rng=rng, gradients=minilora.fast.residual_form)

`pages` keeps one step's memory for the next. `blockwise` is attention with memory linear in the length of a text, which
a language model uses for long texts. `experts_by_rows` computes a mixture's gate some rows at a time. `adam` is Adam's
update in blocks, or in one kernel on a GPU.
"""

from .. import lazily

__getattr__, __dir__ = lazily(__name__)
