"""The variants of LoRA that PEFT's files have, one row each: adaptation, files and merging ask the row.

A variant may put one more array beside the two factors, with a number for each output. It stands a layer of its own
beside the frozen one, and says what the two are merged into:

    variant    the further array           the layer                            the merged matrix, with V = W + s B A
    LoRA       none                        `minilora.lora.LoRALinear`           V
    DoRA       a length m (out,)           `minilora.variants.dora.DoRA`        (m_o / |V_o|) V_o in row o

rsLoRA is a number (`minilora.variants.scaling`) and PiSSA a start (`minilora.variants.pissa`): both go with any row.
A variant need not stand here to be used. A layer of your own that has a ``base``, an ``adapter`` and ``merge()`` is
placed by `minilora.adaptation.put_beside`, and `merge` and `adapters` find it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ..checks import Array
from ..layer import Layer
from ..linear import Linear
from ..lora import LoRA, LoRALinear
from .adapter import Adapter, beyond_factors
from .dora import DoRA, DoRAAdapter, merged, row_lengths


@dataclass(frozen=True)
class Variant:
    """What one variant does otherwise than another."""

    name: str
    beside: Callable[[Any, Any], Layer]  # (a frozen `Linear`, an adapter) -> the two side by side: the layer's class
    adapter: type[Adapter] = Adapter  # the adapter's class
    array: str = ""  # the further array (out,), by its name there
    initial: Callable[[Linear, LoRA], Array] | None = None  # what the further array starts with
    merged: Callable[[Array, Array, Array, Any], Array] | None = None
    """(rows of W, the same rows of s B A, of the further array, of |V_o|) -> rows of the merged matrix; V without."""
    needs_lengths: bool = False  # whether `merged` divides by |V_o|; without, it is handed None

    def __post_init__(self) -> None:
        if self.array and not (self.adapter is not Adapter and self.initial and self.merged):
            raise ValueError(f"the variant {self.name!r} has an array, and needs adapter, initial and merged for it")

    def start(self, base: Linear, adapter: Adapter, **options: Any) -> Adapter:
        """Return a new adapter as one of the variant, with the further array as it starts."""
        if self.initial is None:
            return adapter
        same = {field.name: getattr(adapter, field.name) for field in fields(adapter)}
        return self.adapter(**same, **{self.array: self.initial(base, adapter)}, **options)


LORA = Variant("LoRA", LoRALinear)
DORA = Variant(
    "DoRA",
    DoRA,
    adapter=DoRAAdapter,
    array="magnitude",
    initial=row_lengths,
    merged=merged,
    needs_lengths=True,
)
VARIANTS = (LORA, DORA)


def variant_of(adapter: LoRA) -> Variant:
    """Return the variant that an adapter is one of: plain LoRA where it has no variant's array."""
    return next((variant for variant in VARIANTS if variant.array and isinstance(adapter, variant.adapter)), LORA)


def of_its_own(adapter: LoRA) -> list[str]:
    """Return what an adapter has and computes besides its variant, in words."""
    return [what for what in beyond_factors(adapter) if what != f"a {variant_of(adapter).array}"]
