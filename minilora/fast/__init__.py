"""The same numbers with less work. Nothing here is needed to understand LoRA.

`residual` has the gradients of the squared error without the error, `parts` those of a large batch with the memory of a
small one, `pages` one step's memory kept for the next, `adam` the update for large arrays and for a GPU, and `gather` a
batch's rows without new memory. `train` takes another way to the gradients only where you name it::

    train(adapter, X, residual, rng=rng, gradients=minilora.fast.residual_form)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pages import keep_pages
    from .parts import accumulate
    from .residual import residual_form

__all__ = ["accumulate", "keep_pages", "residual_form"]
_HOME = {"accumulate": "parts", "keep_pages": "pages", "residual_form": "residual"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # fetched when it is asked for: `residual` needs `minilora.lora`, which needs nothing from here
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
