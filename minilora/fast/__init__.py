"""The same numbers with less work. Nothing here is needed to understand LoRA.

`residual` has the gradients of the squared error without the error, `adam` the update for large arrays and for a GPU,
and `gather` a batch's rows without new memory. What changes the way to a gradient is asked for by name::

    train(adapter, X, residual, rng=rng, gradients=minilora.fast.residual_form)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .residual import residual_form

__all__ = ["residual_form"]


def __getattr__(name: str) -> Any:
    if name == "residual_form":  # fetched when it is asked for: it needs `minilora.lora`, which needs nothing from here
        from .residual import residual_form

        return residual_form
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
