"""The tensors of a mixture's experts in a model's files.

An array of a mixture, ``….experts.gate_up_proj`` or ``….down_proj``, has a matrix W_e (out, in) for each expert.

The matrices of an array are stored in one of three layouts:

    one tensor for all             one for each, in most folders               one for each, in a Mixtral
    mlp.experts.gate_up_proj       mlp.experts.e.gate_proj.weight, .up_proj    block_sparse_moe.experts.e.w1, .w3
    mlp.experts.down_proj          mlp.experts.e.down_proj.weight              block_sparse_moe.experts.e.w2
    mlp.gate.weight                the same                                    block_sparse_moe.gate.weight

An adapter's paths are those of the first column. An expert's gate_up_proj stacks its gate_proj on its up_proj. A tensor
for all experts is (E, out, in) here. Some models, such as gpt-oss, have (E, in, out): see `are_exchanged`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..texts import FileRefused, short
from .tensors import Weights

EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The arrays of a module of experts, in its order, and the weights of one expert that each array stacks."""
EXPERT_ORDER = tuple(EXPERT_PARTS)


def are_exchanged(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool | None:
    """Return whether shapes (out, in) of gate_up_proj and down_proj are transposed; None if that is ambiguous."""
    (out, width), (d, m) = gate_up, down
    if (out, width) == (2 * m, d):
        return False
    return True if (out, width) == (m, 2 * d) else None


MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""The names of the weights in a Mixtral's files."""
MIXTRAL_MLP = "block_sparse_moe"


@dataclass(frozen=True)
class ExpertTensor:
    """A tensor that contains rows of an array's matrices, for one or more experts."""

    name: str
    experts: tuple[int, ...]
    rows: slice  # the rows of each expert's matrix (out, in)
    shape: tuple[int, ...]  # the required shape


def expert_tensors(path: str, experts: int, out: int, width: int, weights: Weights) -> list[ExpertTensor]:
    """Return the tensors that contain an array's E matrices (out, in); require that their shapes fit."""
    tensors = _for_all(path, experts, out, width, weights) or _for_each(path, experts, out, width, weights)
    for tensor in tensors:
        if (shape := weights.spec(tensor.name).shape) != tensor.shape:
            raise FileRefused(
                weights.holder[tensor.name].path,
                f"{short(tensor.name)} has shape {list(shape)}, expected {list(tensor.shape)} "
                f"({experts} experts, {out} x {width} each)",
            )
    return tensors


def _spellings(path: str) -> list[str]:
    """Return the possible names of an array in a file: its path, and its path in a Mixtral."""
    before, mlp, after = path.rpartition(".mlp.")
    return [path, f"{before}.{MIXTRAL_MLP}.{after}"] if mlp else [path]


def _for_all(path: str, experts: int, out: int, width: int, weights: Weights) -> list[ExpertTensor]:
    """Return the tensor for all experts, if there is one."""
    for name in _spellings(path):
        if name not in weights.holder:
            continue
        if experts == 1 and len(weights.spec(name).shape) == 2:
            return [ExpertTensor(name, (0,), slice(out), (out, width))]
        _check_orientation(name, weights)
        return [ExpertTensor(name, tuple(range(experts)), slice(out), (experts, out, width))]
    return []


def _check_orientation(name: str, weights: Weights) -> None:
    """Require that a tensor for all experts is (E, out, in), judging by its shape and the other array's."""
    both = [f"{name.rpartition('.')[0]}.{array}" for array in EXPERT_ORDER]
    shapes = [weights.spec(array).shape for array in both if array in weights.holder]
    known = len(shapes) == 2 and all(len(shape) == 3 for shape in shapes)
    exchanged = are_exchanged(shapes[0][1:], shapes[1][1:]) if known else None
    _, *matrix = weights.spec(name).shape
    if exchanged:
        what = "is stored (E, in, out), as the shapes of both arrays show: only (E, out, in) is supported"
    elif exchanged is None and len(matrix) == 2 and len({*matrix}) == 1:
        what = "has square matrices, and the other array does not show whether it is stored (E, out, in)"
    else:
        return
    raise FileRefused(weights.holder[name].path, f"{short(name)} {what}")


def _for_each(path: str, experts: int, out: int, width: int, weights: Weights) -> list[ExpertTensor]:
    """Return the tensors that each belong to one expert; require that they exist for exactly this number of experts."""
    name = path.rpartition(".")[2]
    parts = EXPERT_PARTS.get(name, ())
    edges = [0, *(out // len(parts) for _ in parts[1:]), out]  # the bounds of the parts' rows
    for spelled in _spellings(path):
        for names in ({part: part for part in parts}, MIXTRAL):
            start, last = spelled.removesuffix(name), [f"{names[part]}.weight" for part in parts]
            if not parts or f"{start}0.{last[0]}" not in weights.holder:
                continue
            for more in (f"{start}{experts}.{end}" for end in last):
                if more in weights.holder:
                    raise FileRefused(weights.path, f"there is {short(more)}, expected only {experts} experts")
            tensors = [
                ExpertTensor(f"{start}{e}.{end}", (e,), slice(top, bottom), (bottom - top, width))
                for e in range(experts)
                for end, top, bottom in zip(last, edges, edges[1:], strict=False)
            ]
            for tensor in tensors:
                if tensor.name not in weights.holder:
                    raise FileRefused(weights.path, f"there is no {short(tensor.name)}, expected {experts} experts")
            return tensors
    examples = [short(f"{path.removesuffix(name)}0.{part}.weight") for part in parts[:1]]
    others = "".join(f", nor a tensor for each expert, such as {tensor}" for tensor in examples)
    raise FileRefused(weights.path, f"there is no {short(path)}{others}")
