"""A language model, fine-tuned by hand-written gradients: the book's neighbour that speaks.

Everything here is made of the book's layers, and the book imports nothing from here.

`llama` is the decoder that most open language models are, `config` its sizes, `generation` how it goes on with a text.
`files` are a model's: its weights, its tokenizer and its chat template. Its data: `text` with the loss of the next
tokens, `chat`, and `data`. Its training: `recipe` is what a user asks for, `finetune` the way from there to an adapter,
`losstable` what is printed, `memory` what a step keeps, and `resume` what a checkpoint does.
"""

from .. import lazily

__getattr__, __dir__ = lazily(__name__)
