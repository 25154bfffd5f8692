"""Which variant of LoRA an adapter is: what PEFT's files say with one flag for all of a folder's adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..layer import Layer
from ..lora import LoRA, LoRALinear
from .adapter import Adapter, beyond_factors
from .dora import DoRA, DoRAAdapter


@dataclass(frozen=True)
class Variant:
    """A variant's classes, and the array (out,) that it has besides the factors, by name."""

    name: str
    beside: type[Layer]
    adapter: type[Any]
    array: str = ""


LORA = Variant("LoRA", LoRALinear, Adapter)
DORA = Variant("DoRA", DoRA, DoRAAdapter, "magnitude")


def variant_of(adapter: LoRA) -> Variant:
    """Return the variant that an adapter is one of."""
    return DORA if isinstance(adapter, DoRAAdapter) else LORA


def of_its_own(adapter: LoRA) -> list[str]:
    """Return what an adapter has and computes besides its variant, in words."""
    return [what for what in beyond_factors(adapter) if what != f"a {variant_of(adapter).array}"]
