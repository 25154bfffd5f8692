"""The base class of adapted layers: a frozen base with an adapter that trains."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import unwrap
from typing import Any

from .checks import Array
from .layer import Layer, members_besides


@dataclass(eq=False, repr=False)
class Adapted(Layer):
    """A base with its adapter. A subclass annotates their classes, and defines forward, backward and merge."""

    base: Any
    adapter: Any  # with the same widths and dtype

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole()

    def check_whole(self) -> None:
        """Refuse an adapter with an array that this layer would ignore.

        A subclass of the adapter's class may have more arrays if it defines its own `forward` and `delta`.
        """
        cls, expected = type(self.adapter), self.fits()["adapter"][1]
        unknown = members_besides(self.adapter, "start", *expected.fits())
        if unknown and any(unwrap(getattr(cls, m)) is unwrap(getattr(expected, m)) for m in ("forward", "delta")):
            raise ValueError(f"adapter has a {next(iter(unknown))}, which a {type(self).__name__} ignores")

    def trainable(self) -> dict[str, Array]:
        """Return the adapter's arrays, but not the base's, which do not train."""
        return self.adapter.trainable()  # type: ignore[no-any-return]

    def delta(self) -> Array:  # -> (out, in)
        """Return the change of the base's weight."""
        return self.adapter.delta()

    @property
    def rank(self) -> int:
        """The adapter's rank r."""
        return self.adapter.rank  # type: ignore[no-any-return]

    @property
    def alpha(self) -> float:
        """The adapter's alpha. Set it on the adapter."""
        return self.adapter.alpha  # type: ignore[no-any-return]

    @property
    def scaling(self) -> float:
        """The adapter's scaling s."""
        return self.adapter.scaling  # type: ignore[no-any-return]
