"""LoRA from scratch in NumPy, every gradient derived and coded by hand; the same code on a GPU through CuPy.

Read these files in this order. Each adds one idea:

1. `minilora.lora`: the low-rank adapter, and a layer with an adapter beside it
2. `minilora.linear`: the layer that is adapted
3. `minilora.losses`: mean squared error, cross-entropy, and their gradients
4. `minilora.optim`: Adam; `minilora.optim` is how its step length changes
5. `minilora.training`: the loop; `minilora.evaluation`, `minilora.state` and `minilora.watching` are what it is made of
6. `minilora.article`: the experiment of "Understanding LoRA with a minimal example"

The book goes on, and imports nothing of what stands beside it:

- from one layer to a model: `minilora.layer` (the protocol), `minilora.layers`, and `minilora.adaptation` (an adapter
  beside each layer that you name)
- what became of LoRA: `minilora.variants`; a base in four bits: `minilora.layers.nf4`, `minilora.variants.loftq`
- is a gradient right? `minilora.verify`
- trained adapters as files: `minilora.files`
- the same numbers with less work: `minilora.fast`
- `minilora.backend` (NumPy or CuPy) and `minilora.checks` (errors for bad input) serve all of them

Beside it stand two neighbours. `minilora.language` is a language model, fine-tuned. `minilora.conformance` judges what
other people wrote: layers, readers of adapters, files. `minilora.exercises` grades a backward of yours,
`minilora.figures` draws, and `minilora.cli` with `minilora.cli` is the command line.

Importing the package imports none of this: `minilora.lazy` fetches a name when it is first used, so
``import minilora.lora`` needs NumPy alone.
"""

from . import lazy

__version__ = "0.4.0"
__getattr__, __dir__ = lazy.attributes(__name__)
