"""A language model, fine-tuned by hand-written gradients: the book's neighbour that speaks.

Everything here is made of the book's layers, and the book imports nothing from here. `llama` is the decoder that most
open language models are, `config` its sizes. `weights` reads a model from the files in which it comes, and `save`
writes one. Importing the package imports none of this.
"""

from .. import lazy

__getattr__, __dir__ = lazy.attributes(__name__)
