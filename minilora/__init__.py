"""LoRA from scratch in NumPy, every gradient derived and coded by hand; the same code on a GPU through CuPy.

Read these files in this order. Each adds one idea:

1. `minilora.lora`: the low-rank adapter, and a layer with an adapter beside it
2. `minilora.linear`: the layer that is adapted
3. `minilora.losses`: mean squared error, cross-entropy, and their gradients
4. `minilora.optim`: Adam
5. `minilora.training`: the loop
6. `minilora.article`: the experiment of "Understanding LoRA with a minimal example"

Then, by what you are here for:

- from one layer to a model: `minilora.layer` (the protocol), `minilora.layers`, `minilora.models`, and
  `minilora.adaptation` (an adapter beside each layer that you name)
- a language model: `minilora.models.llama`, `minilora.text` (windows of token ids), `minilora.models.generate`
- what became of LoRA: `minilora.variants`
- is a gradient right? `minilora.verify`, `minilora.conformance`, and `minilora.exercises` for a backward of your own
- trained adapters as files: `minilora.files`
- the same numbers with less work: `minilora.fast`

`minilora.backend` (NumPy or CuPy), `minilora.checks` (errors for bad input), `minilora.figures` (pictures) and
`minilora.cli` with `minilora.commands` (the command line) serve all of them.

Importing the package imports none of this: a name is fetched when it is first used, so ``import minilora.lora`` needs
NumPy alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; at run time, `__getattr__` below
    from .adaptation import adapt, adapters, attach, merge
    from .backend import Backend, BackendUnavailable, get_backend
    from .files.adapters import AdapterFileError, load_adapter, save_adapter
    from .files.checkpoint import CheckpointError
    from .files.merge import merge_adapter
    from .layer import Layer
    from .layers.activation import ReLU, SiLU, Tanh
    from .layers.attention import Attention
    from .layers.convolution import Conv1d, Conv2d
    from .layers.embedding import Embedding
    from .layers.flatten import Flatten
    from .layers.gated import GatedMLP
    from .layers.norm import RMSNorm
    from .layers.rotary import Rotary
    from .layers.sequential import Sequential
    from .linear import Linear
    from .lora import LoRA, LoRALinear
    from .losses import cross_entropy, mse
    from .models.llama import Llama
    from .models.llamaconfig import LlamaConfig
    from .models.mlp import MLP
    from .optim import Adam
    from .training import History, TrainingDiverged, evaluate, train
    from .variants.adapter import Adapter
    from .variants.dora import DoRA
    from .variants.scaling import loraplus
    from .variants.sums import best_of_rank, weighted_sum
    from .verify.closed_form import best_adapter, best_adapter_from_gram
    from .verify.gradcheck import GradientError, GradReport, gradcheck
    from .verify.slopes import CheckRefused, TaylorOrders, taylor_orders

__version__ = "0.2.0"

_HOMES = {
    "layer": ("Layer",),
    "models.llama": ("Llama",),
    "models.llamaconfig": ("LlamaConfig",),
    "models.mlp": ("MLP",),
    "layers.sequential": ("Sequential",),
    "layers.activation": ("ReLU", "SiLU", "Tanh"),
    "layers.convolution": ("Conv1d", "Conv2d"),
    "layers.embedding": ("Embedding",),
    "layers.flatten": ("Flatten",),
    "layers.norm": ("RMSNorm",),
    "layers.rotary": ("Rotary",),
    "layers.attention": ("Attention",),
    "layers.gated": ("GatedMLP",),
    "variants.adapter": ("Adapter",),
    "variants.dora": ("DoRA",),
    "variants.scaling": ("loraplus",),
    "variants.sums": ("best_of_rank", "weighted_sum"),
    "adaptation": ("adapt", "adapters", "attach", "merge"),
    "backend": ("Backend", "BackendUnavailable", "get_backend"),
    "files.adapters": ("AdapterFileError", "load_adapter", "save_adapter"),
    "files.checkpoint": ("CheckpointError",),
    "files.merge": ("merge_adapter",),
    "linear": ("Linear",),
    "lora": ("LoRA", "LoRALinear"),
    "losses": ("cross_entropy", "mse"),
    "optim": ("Adam",),
    "training": ("History", "TrainingDiverged", "evaluate", "train"),
    "verify.closed_form": ("best_adapter", "best_adapter_from_gram"),
    "verify.gradcheck": ("GradReport", "GradientError", "gradcheck"),
    "verify.slopes": ("CheckRefused", "TaylorOrders", "taylor_orders"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "MLP",
    "Adam",
    "Adapter",
    "AdapterFileError",
    "Attention",
    "Backend",
    "BackendUnavailable",
    "CheckRefused",
    "CheckpointError",
    "Conv1d",
    "Conv2d",
    "DoRA",
    "Embedding",
    "Flatten",
    "GatedMLP",
    "GradReport",
    "GradientError",
    "History",
    "Layer",
    "Linear",
    "Llama",
    "LlamaConfig",
    "LoRA",
    "LoRALinear",
    "RMSNorm",
    "ReLU",
    "Rotary",
    "Sequential",
    "SiLU",
    "Tanh",
    "TaylorOrders",
    "TrainingDiverged",
    "adapt",
    "adapters",
    "attach",
    "best_adapter",
    "best_adapter_from_gram",
    "best_of_rank",
    "cross_entropy",
    "evaluate",
    "get_backend",
    "gradcheck",
    "load_adapter",
    "loraplus",
    "merge",
    "merge_adapter",
    "mse",
    "save_adapter",
    "taylor_orders",
    "train",
    "weighted_sum",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
