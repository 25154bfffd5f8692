"""The same numbers with less work. Nothing here is needed to understand LoRA.

`residual` has the gradients of the squared error without the error, and `accumulation` those of a large batch with the
memory of a small one, its parts side by side on `threads`. `train` takes them only where you name them::

    train(adapter, X, residual, rng=rng, gradients=minilora.fast.residual_form)

`blockwise` is attention in memory that grows with a text and not with its square; a language model takes it for long
ones. `memory` keeps one step's memory for the next, where you call it. `adam` and `gather` serve every training: Adam
updates a large array in place, some rows at a time, on a GPU in one kernel, and the rows of a batch go into a buffer
that is kept.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .accumulation import accumulate
    from .memory import keep_pages
    from .residual import residual_form

__all__ = ["accumulate", "keep_pages", "residual_form"]
_HOME = {"accumulate": "accumulation", "keep_pages": "memory", "residual_form": "residual"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # fetched when it is asked for: `residual` needs `minilora.lora`, which needs nothing from here
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
