"""Where a checkpoint has the weights of a mixture's experts: a tensor for all of them, or for each one or two.

    all                            each, most folders                          each, a Mixtral's
    mlp.experts.gate_up_proj       mlp.experts.e.gate_proj.weight, .up_proj    block_sparse_moe.experts.e.w1, .w3
    mlp.experts.down_proj          mlp.experts.e.down_proj.weight              block_sparse_moe.experts.e.w2
    mlp.gate.weight                the same                                    block_sparse_moe.gate.weight

The first column is what an adapter's paths name. An expert's gate_up_proj is its gate's rows, and below them its up's.

A tensor for all is (E, out, in) here. Some models, such as gpt-oss, have (E, in, out), and the shape of a square weight
shows no difference; but that of gate_up_proj beside that of down_proj always does, with d -> 2 m beside m -> d.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...checks import FileRefused, short
from ..tensors import TensorFile

PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The weights of one expert that an array has, the first above the second."""
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""Their names in a Mixtral's files."""
MIXTRAL_MLP = "block_sparse_moe"


@dataclass(frozen=True)
class ExpertTensor:
    """A tensor of the checkpoint with weights of an array: those rows of some experts, one expert after the other."""

    name: str
    experts: tuple[int, ...]
    rows: slice  # of each expert's matrix (out, in)
    shape: tuple[int, ...]  # that it must have


def expert_tensors(
    path: str, experts: int, out: int, width: int, holder: Mapping[str, TensorFile], where: Path
) -> list[ExpertTensor]:
    """Return the tensors that an array's weights stand in.

    Parameters
    ----------
    path : str
        The array's, such as ``model.layers.0.mlp.experts.gate_up_proj``.
    experts, out, width : int
        E, and the shape of each expert's matrix, as an adapter has them.
    holder : mapping of str to TensorFile
        The file of each tensor of the checkpoint.
    where : Path
        The checkpoint, for messages.

    Raises
    ------
    FileRefused
        If the tensors are not those of E experts of these shapes, or may lie the other way round.
    """
    own = next((name for name in _spellings(path) if name in holder), None)
    if own is not None:
        shape = holder[own].tensors[own].shape
        whole = ExpertTensor(own, tuple(range(experts)), slice(0, out), (experts, out, width))
        if experts == 1 and len(shape) == 2:
            whole = ExpertTensor(own, (0,), slice(0, out), (out, width))
        else:
            _check_way_round(own, path, holder)
        tensors = [whole]
    else:
        tensors = list(_apart(path, experts, out, width, holder, where))
    for tensor in tensors:
        file = holder[tensor.name]
        if (shape := file.tensors[tensor.name].shape) != tensor.shape:
            raise FileRefused(
                file.path,
                f"{short(tensor.name)} has shape {list(shape)}, the adapter is for {list(tensor.shape)} "
                f"(of {experts} experts, {out} x {width} each)",
            )
    return tensors


def _spellings(path: str) -> Iterator[str]:
    """Yield the names that an array, or its owner, may have in a file: as they are, and a Mixtral's."""
    yield path
    before, mlp, after = path.rpartition(".mlp.")
    if mlp:
        yield f"{before}.{MIXTRAL_MLP}.{after}"


def _apart(
    path: str, experts: int, out: int, width: int, holder: Mapping[str, TensorFile], where: Path
) -> Iterator[ExpertTensor]:
    """Yield the tensors of each expert; refuse one that is missing, and one too many."""
    name = path.rpartition(".")[2]
    parts = PARTS.get(name, ())
    for spelled in _spellings(path):
        start = spelled.removesuffix(name)
        for names in (dict(zip(parts, parts, strict=True)), MIXTRAL):
            if not parts or f"{start}0.{names[parts[0]]}.weight" not in holder:
                continue
            tensor_of = [[f"{start}{e}.{names[part]}.weight" for part in parts] for e in range(experts + 1)]
            if more := next((tensor for tensor in tensor_of[experts] if tensor in holder), None):
                raise FileRefused(where, f"there is {short(more)}, and the adapter is for {experts} experts")
            rows = out // len(parts)
            for e, tensors in enumerate(tensor_of[:experts]):
                for i, tensor in enumerate(tensors):
                    if tensor not in holder:
                        raise FileRefused(where, f"there is no {short(tensor)}, which the adapter changes")
                    height = rows if i + 1 < len(parts) else out - i * rows
                    yield ExpertTensor(tensor, (e,), slice(i * rows, i * rows + height), (height, width))
            return
    each = (f"{path.removesuffix(name)}0.{part}.weight" for part in parts[:1])
    such = "".join(f", and no tensor for each expert, such as {short(tensor)}" for tensor in each)
    raise FileRefused(where, f"there is no {short(path)}, which the adapter changes{such}")


def _check_way_round(own: str, path: str, holder: Mapping[str, TensorFile]) -> None:
    """Refuse an array whose experts' weights lie (in, out), and a square one where nothing shows how they lie."""
    module, _, name = own.rpartition(".")
    file = holder[own]
    shapes = {
        other: holder[f"{module}.{other}"].tensors[f"{module}.{other}"].shape
        for other in PARTS
        if f"{module}.{other}" in holder
    }
    if len(shapes) == len(PARTS) and all(len(shape) == 3 for shape in shapes.values()):
        (_, a, b), (_, c, d) = (shapes[other] for other in PARTS)
        if a == d and b == 2 * c:
            raise FileRefused(
                file.path,
                f"{short(own)} is stored (E, in, out), as its shape beside that of {short(_other(name))} shows: "
                "(E, out, in) alone is supported",
            )
        if (a, b) == (2 * d, c):
            return
    shape = file.tensors[own].shape
    if len(shape) == 3 and shape[1] == shape[2]:
        raise FileRefused(
            file.path,
            f"{short(own)} is square, and nothing shows whether it is stored (E, out, in): the shape of "
            f"{short(_other(name))} beside it would",
        )


def _other(name: str) -> str:
    return next((other for other in PARTS if other != name), name)
