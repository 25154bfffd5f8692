"""LoRA from scratch in NumPy, every gradient derived and coded by hand; the same code on a GPU through CuPy.

Read the files in this order; each adds one idea:

1. `minilora.lora`: the low-rank adapter, and a layer with an adapter beside it
2. `minilora.linear`: the layer that is adapted
3. `minilora.losses`: mean squared error and its gradient
4. `minilora.optim`: Adam
5. `minilora.train`: the loop
6. `minilora.article`: the experiment of "Understanding LoRA with a minimal example"

How it is known to be right: `minilora.gradcheck` compares a gradient with slopes measured as `minilora.slopes` tells,
`minilora.proof` does so for every gradient here, and `minilora.closed_form` has the answer that training should find.
`minilora.exercises` grades a backward that you write yourself.

Then what trained layers are for: `minilora.adapters` (adapters as files, in PEFT's layout), `minilora.merge` (folded
into a checkpoint) and `minilora.inspection` (looked at), and `minilora.checkpoint` (stop and resume, bit for bit); the
formats of their files are in `minilora.files`.

Behind them stand `minilora.backend` (NumPy or CuPy), `minilora.checks` (errors for bad input), `minilora.figures`
(pictures) and `minilora.cli` (the command line).
"""

from .adapters import AdapterFileError, load_adapter, save_adapter
from .backend import Backend, BackendUnavailable, get_backend
from .checkpoint import CheckpointError
from .closed_form import best_adapter, best_adapter_from_gram
from .gradcheck import GradientError, GradReport, gradcheck
from .linear import Linear
from .lora import LoRA, LoRALinear
from .losses import mse
from .merge import merge_adapter
from .optim import Adam
from .slopes import CheckRefused, TaylorOrders, taylor_orders
from .train import History, TrainingDiverged, evaluate, train

__version__ = "0.1.0"

__all__ = [
    "Adam",
    "AdapterFileError",
    "Backend",
    "BackendUnavailable",
    "CheckRefused",
    "CheckpointError",
    "GradReport",
    "GradientError",
    "History",
    "Linear",
    "LoRA",
    "LoRALinear",
    "TaylorOrders",
    "TrainingDiverged",
    "best_adapter",
    "best_adapter_from_gram",
    "evaluate",
    "get_backend",
    "gradcheck",
    "load_adapter",
    "merge_adapter",
    "mse",
    "save_adapter",
    "taylor_orders",
    "train",
]
