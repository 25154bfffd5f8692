"""A LoRA that knows where it stands, how it is scaled and how it started: what files say of it, and need."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, fields
from typing import Any

from ..checks import check_choice, check_flag, check_instance, check_integer, check_shape, is_array, shown
from ..lora import LoRA
from .scaling import scaling

KINDS = ("linear", "embedding", "conv1d", "conv2d")


@dataclass(eq=False, repr=False)
class Adapter(LoRA):
    """Two factors for the matrix of any layer: lora_A (r, in), lora_B (out, r).

    For an embedding `in` is V and `out` is dim; for a convolution `in` is C times the kernel's size, channel first.
    `alpha` is PEFT's ``lora_alpha``.

    Arrays that do not fit together, an unknown kind, and an alpha out of range are a ValueError or a TypeError.
    """

    kind: str = "linear"  # or "embedding", "conv1d", "conv2d"
    kernel: tuple[int, ...] = ()  # its size along each axis, of a convolution
    use_rslora: bool = False  # whether the scaling is alpha / sqrt(r), and not alpha / r
    start: LoRA | None = None  # frozen: PiSSA's factors before training

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("kind", self.kind, KINDS)
        self.use_rslora = check_flag("use_rslora", self.use_rslora)
        _check_kernel(self.kernel)
        if self.start is not None:
            check_instance("start", self.start, LoRA)
            check_shape("start.lora_A", self.start.lora_A, self.lora_A.shape)
            check_shape("start.lora_B", self.start.lora_B, self.lora_B.shape)

    @property
    def scaling(self) -> float:
        """The factor s: alpha / r, or alpha / sqrt(r) under rsLoRA."""
        return scaling(self.alpha, self.rank, use_rslora=self.use_rslora)

    def further(self) -> dict[str, Any]:
        """Return the arrays that it computes with besides the factors. How it started is none of them."""
        return {name: part for name, part in super().further().items() if name != "start"}

    def __repr__(self) -> str:
        """Leave out what is as usual: of a plain adapter, all but the factors and alpha."""
        brief = copy(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if not is_array(value) and value == field.default:
                del vars(brief)[field.name]
        return super(Adapter, brief).__repr__()


def _check_kernel(kernel: Any) -> None:
    """Refuse what is not a tuple of sizes. Whether it fits a layer shows beside that layer, and in a file."""
    if not isinstance(kernel, tuple):
        raise TypeError(f"kernel must be a tuple of sizes, one for each axis, got {shown(kernel)}")
    for i, size in enumerate(kernel):
        check_integer(f"kernel[{i}]", size, at_least=1)
