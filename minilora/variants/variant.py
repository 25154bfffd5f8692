"""The variants of LoRA, one row each: adaptation, files and merging ask a row, and name no variant themselves.

A variant may put one more array beside the two factors, with a number for each output. It stands a layer of its own
beside the frozen one, and may give each row of V = W + s B A another length when it is merged:

    variant    the further array        the layer                               a row of the merged matrix
    LoRA       none                     `minilora.lora.LoRALinear`              V_o
    DoRA       magnitude m (out,)       `minilora.variants.dora.DoRA`           (m_o / |V_o|) V_o

rsLoRA is a number (`minilora.variants.scaling`) and PiSSA a start (`minilora.variants.pissa`): both go with any row.
A variant need not stand here to be used. A layer of your own that has a ``base``, an ``adapter`` and ``merge()`` is
placed by `minilora.adaptation.put_beside`, and `merge` and `adapters` find it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import truediv
from typing import Any

from ..checks import Array
from ..layer import Layer
from ..linear import Linear
from ..lora import LoRA, LoRALinear
from .dora import DoRA, row_lengths


@dataclass(frozen=True)
class Variant:
    """What one variant does otherwise than another."""

    name: str
    beside: Callable[[Any, Any], Layer]  # (a frozen `Linear`, an adapter) -> the two side by side
    array: str = ""  # the further array (out,), by its name in `Adapter`
    flag: str = ""  # the key of PEFT's adapter_config.json, and the argument of `adapt`, that asks for the variant
    key: str = ""  # the further array's name in PEFT's files
    start: Callable[[Linear, LoRA], Array] | None = None  # what the further array starts with
    gain: Callable[[Array, Array], Array] | None = None  # (further array, |V_o|) -> what multiplies each row of V


LORA = Variant("LoRA", LoRALinear)
DORA = Variant(
    "DoRA", DoRA, array="magnitude", flag="use_dora", key="lora_magnitude_vector", start=row_lengths, gain=truediv
)
VARIANTS = (LORA, DORA)


def variant_of(adapter: LoRA) -> Variant:
    """Return the variant whose further array an adapter has: plain LoRA where it has none."""
    with_array = (variant for variant in VARIANTS if variant.array)
    return next((variant for variant in with_array if getattr(adapter, variant.array, None) is not None), LORA)
