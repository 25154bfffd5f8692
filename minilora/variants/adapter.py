"""A LoRA that knows where it stands and how it started. It computes as `LoRA` does; the rest is what files need."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, fields

from ..checks import Array, check_adapter, is_array
from ..lora import LoRA
from .scaling import rslora_alpha

KINDS = ("linear", "embedding", "conv1d", "conv2d")
NORMS = ("constant", "full")


@dataclass(eq=False, repr=False)
class Adapter(LoRA):
    """Two factors for the matrix of any layer: lora_A (r, in), lora_B (out, r).

    For an embedding `in` is V and `out` is dim; for a convolution `in` is C times the kernel's size, channel first.
    `alpha` always means a scaling of alpha / r, under rsLoRA too.
    """

    kind: str = "linear"  # or "embedding", "conv1d", "conv2d"
    kernel: tuple[int, ...] = ()  # its size along each axis, of a convolution
    use_rslora: bool = False  # whether a file should say lora_alpha / sqrt(r)
    magnitude: Array | None = None  # (out,), where the adapter is a DoRA's
    dora_norm: str = "constant"  # or "full": how DoRA's backward treats the norm
    start: LoRA | None = None  # frozen: PiSSA's factors before training

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adapter(self, KINDS, NORMS)

    @property
    def lora_alpha(self) -> float:
        """The alpha that PEFT's configuration has: under rsLoRA its scaling is lora_alpha / sqrt(r)."""
        return self.alpha / rslora_alpha(1, self.rank) if self.use_rslora else self.alpha

    def __repr__(self) -> str:
        """Leave out what is as usual: of a plain adapter, all but the factors and alpha."""
        brief = copy(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if not is_array(value) and value == field.default:
                del vars(brief)[field.name]
        return super(Adapter, brief).__repr__()
