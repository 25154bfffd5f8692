"""A mixture's experts in files: how an adapter's folder names their factors, and a model's files their weights.

An array of a mixture, ``….experts.gate_up_proj`` or ``….down_proj``, has a matrix W_e (out, in) for each expert.

**In an adapter's folder** an adapter of ``….experts.down_proj`` lies under the name of its module,
``….experts.lora_A.weight``: the key alone does not say of which array it is, ``target_parameters`` does. Where two
arrays of a module are adapted, PEFT puts one layer into another, in the order in which the module has them, the first
one innermost:

    gate_up_proj     ….experts.base_layer.lora_A.weight
    down_proj        ….experts.lora_A.weight

The two matrices are those of `minilora.variants.stackedlora`, A (E r, in) and B (out, r E). Others were written before:

* Up to version 0.19.0, PEFT took each weight W_e (out, in) for (in, out), and exchanged the factors: its A is
  (E r, out), its B (in, r E). ``peft_version`` says which it is. Without it the shapes may, see `are_exchanged`.
* Some programs wrote B with the expert as the slow index. ``lora_B_layout`` says ``grouped_by_expert`` then.

Both are refused, and so is a packing that nothing decides. The message says what to do.

**In a model's files** the matrices of an array lie in one of three ways:

    a tensor for all               for each, most folders                      for each, a Mixtral's
    mlp.experts.gate_up_proj       mlp.experts.e.gate_proj.weight, .up_proj    block_sparse_moe.experts.e.w1, .w3
    mlp.experts.down_proj          mlp.experts.e.down_proj.weight              block_sparse_moe.experts.e.w2
    mlp.gate.weight                the same                                    block_sparse_moe.gate.weight

The first column is what an adapter's paths name. An expert's gate_up_proj is its gate's rows, and below them its up's.
A tensor for all is (E, out, in) here. Some models, such as gpt-oss, have (E, in, out): `are_exchanged` again.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..texts import FileRefused, short
from .tensors import Weights

PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The arrays of a module of experts, in its order, and the weights of one expert that each has, one above the other."""
ORDER = tuple(PARTS)


def are_exchanged(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool | None:
    """Return whether shapes (out, in) of gate_up_proj and down_proj are transposed; None where they do not show it."""
    (out, width), (d, m) = gate_up, down
    if (out, width) == (2 * m, d):
        return False
    return True if (out, width) == (m, 2 * d) else None


# --- in an adapter's folder ---

WRAPPED = ".base_layer"
EXPERTS = "experts"
"""What a module with the arrays of a mixture is called."""
EXCHANGED_UNTIL = (0, 19, 0)
"""The last version of PEFT that took a weight (out, in) for (in, out)."""
WRITTEN_AS = "0.19.1"
"""The first version that packs them as `save_adapter` does: what it notes as ``peft_version``."""
B_LAYOUTS = {"rank_major": False, "grouped_by_expert": True}
"""The values of lora_B_layout, a key of unsloth's, and whether the expert is B's slow index."""


def layer_paths(paths: Iterable[str]) -> dict[str, str]:
    """Return for each array's path the path of the layer that has its adapter in PEFT."""
    of_module: dict[str, list[str]] = {}
    for path in paths:
        module, _, name = path.rpartition(".")
        of_module.setdefault(module, []).append(name)
    return {
        f"{module}.{name}": place
        for module, names in of_module.items()
        for name, place in nested_paths(module, sorted(names, key=_order)).items()
    }


def nested_paths(module: str, names: Sequence[str]) -> dict[str, str]:
    """Return the path of each array's adapter, by the array's name. The last array's is the module's own path."""
    return {name: module + depth * WRAPPED for depth, name in enumerate(reversed(names))}


def adapted_arrays(adapted: Iterable[str], targets: Collection[str]) -> dict[str, str]:
    """Return each array's place among the adapted paths, by its path; each that `targets` name must be there once."""
    found: dict[str, str] = {}
    for module, names, depths in modules_with_arrays(adapted, targets):
        if sorted(depths) != list(range(len(names))):
            raise ValueError(
                f"there are {len(depths)} pairs of factors for arrays of {short(module)}, and target_parameters names "
                f"{short(names)} of it"
            )
        if len(names) > 1 and not set(names) <= set(ORDER):
            raise ValueError(
                f"target_parameters names {short(names)} of {short(module)}: which key is whose is not known"
            )
        found |= {f"{module}.{name}": place for name, place in nested_paths(module, names).items()}
    return found


def modules_with_arrays(adapted: Iterable[str], targets: Collection[str]) -> Iterator[tuple[str, list[str], list[int]]]:
    """Yield each module with adapters of arrays: its path, the arrays that `targets` name, and their depths."""
    by_module: dict[str, list[int]] = {}
    for place in adapted:
        stop = len(place)
        while place.endswith(WRAPPED, 0, stop):
            stop -= len(WRAPPED)
        by_module.setdefault(place[:stop], []).append((len(place) - stop) // len(WRAPPED))  # layers below the module
    for module, depths in by_module.items():
        of_arrays = module.rpartition(".")[2] == EXPERTS or depths != [0]
        names = {_array_named(target, module, of_arrays=of_arrays) for target in targets} - {""}
        if names or depths != [0]:  # else it is an adapter of a module
            yield module, sorted(sorted(names), key=_order), depths


def _array_named(target: str, module: str, *, of_arrays: bool) -> str:
    """Return the array of a module that a target means, or nothing; a name alone is any module's with arrays."""
    owner, _, name = target.rpartition(".")
    if not owner:
        return name if of_arrays else ""
    return name if module == owner or module.endswith(f".{owner}") else ""


def _order(name: str) -> int:
    """Return where an array stands in its module."""
    return ORDER.index(name) if name in ORDER else len(ORDER)


# --- packings ---


def check_packing(peft_version: str | None, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Require factors that are packed as PEFT does since 0.19.1; `shapes` has each array's (out, in) by its path."""
    says = "there is no peft_version" if peft_version is None else f"peft_version is {short(peft_version)}"
    version = version_of(peft_version)
    for path in shapes:
        by_shape = _exchanged_by_shape(path.rpartition(".")[0], shapes)
        exchanged = by_shape if version is None else version <= EXCHANGED_UNTIL
        if exchanged is None:
            raise ValueError(
                f"{says}, and nothing else tells which factor of {short(path)} reads the input: PEFT has exchanged the "
                'two after 0.19.0. Add "peft_version": "0.19.1" where lora_A is as wide as the input; where it is as '
                "wide as the output, merge the adapter with the PEFT that wrote it, or train it again"
            )
        if exchanged:
            raise ValueError(
                f"{says}: the factors of {short(path)} are exchanged, as PEFT packed them up to 0.19.0, which is not "
                "supported. Merge the adapter with the PEFT that wrote it, or train it again"
            )
        if by_shape:
            raise ValueError(
                f"{says}, and the shapes of gate_up_proj's and down_proj's factors are those of versions up to 0.19.0"
            )


def _exchanged_by_shape(module: str, shapes: Mapping[str, tuple[int, int]]) -> bool | None:
    """Return whether both arrays of a module have adapters of exchanged shapes; None where the shapes say nothing."""
    gate_up, down = (shapes.get(f"{module}.{name}") for name in ORDER)
    return are_exchanged(gate_up, down) if gate_up and down else None


def version_of(text: str | None) -> tuple[int, ...] | None:
    """Return PEFT's version as numbers; None where there is none, or it is one between two versions."""
    match = re.fullmatch(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})", text or "")
    return tuple(map(int, match.groups())) if match else None


# --- in a model's files ---

MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""Their names in a Mixtral's files."""
MIXTRAL_MLP = "block_sparse_moe"


@dataclass(frozen=True)
class ExpertTensor:
    """A tensor with weights of an array: those rows of some experts, one expert after the other."""

    name: str
    experts: tuple[int, ...]
    rows: slice  # of each expert's matrix (out, in)
    shape: tuple[int, ...]  # that it must have


def expert_tensors(path: str, experts: int, out: int, width: int, weights: Weights) -> list[ExpertTensor]:
    """Return the tensors that hold an array's E matrices (out, in); require that they have these shapes."""
    tensors = _for_all(path, experts, out, width, weights) or _for_each(path, experts, out, width, weights)
    for tensor in tensors:
        if (shape := weights.spec(tensor.name).shape) != tensor.shape:
            raise FileRefused(
                weights.holder[tensor.name].path,
                f"{short(tensor.name)} has shape {list(shape)}, expected {list(tensor.shape)} "
                f"(of {experts} experts, {out} x {width} each)",
            )
    return tensors


def _spellings(path: str) -> list[str]:
    """Return the names that an array may have in a file: the path, and a Mixtral's name."""
    before, mlp, after = path.rpartition(".mlp.")
    return [path, f"{before}.{MIXTRAL_MLP}.{after}"] if mlp else [path]


def _for_all(path: str, experts: int, out: int, width: int, weights: Weights) -> list[ExpertTensor]:
    """Return the one tensor of all experts, where there is one."""
    for name in _spellings(path):
        if name not in weights.holder:
            continue
        if experts == 1 and len(weights.spec(name).shape) == 2:
            return [ExpertTensor(name, (0,), slice(out), (out, width))]
        _check_way_round(name, weights)
        return [ExpertTensor(name, tuple(range(experts)), slice(out), (experts, out, width))]
    return []


def _check_way_round(name: str, weights: Weights) -> None:
    """Require that a tensor of all experts is (E, out, in), as its shape and the other array's show together."""
    both = [f"{name.rpartition('.')[0]}.{array}" for array in ORDER]
    shapes = [weights.spec(array).shape for array in both if array in weights.holder]
    known = len(shapes) == 2 and all(len(shape) == 3 for shape in shapes)
    exchanged = are_exchanged(shapes[0][1:], shapes[1][1:]) if known else None
    _, *matrix = weights.spec(name).shape
    if exchanged:
        what = "is stored (E, in, out), as the shapes of the two arrays show together: (E, out, in) alone is supported"
    elif exchanged is None and len(matrix) == 2 and len({*matrix}) == 1:
        what = "is square, and nothing shows whether it is stored (E, out, in): with the other array its shape would"
    else:
        return
    raise FileRefused(weights.holder[name].path, f"{short(name)} {what}")


def _for_each(path: str, experts: int, out: int, width: int, weights: Weights) -> list[ExpertTensor]:
    """Return the tensors of each expert; require that all are there, and no more."""
    name = path.rpartition(".")[2]
    parts = PARTS.get(name, ())
    edges = [0, *(out // len(parts) for _ in parts[1:]), out]  # of the parts' rows
    for spelled in _spellings(path):
        for names in ({part: part for part in parts}, MIXTRAL):
            start, last = spelled.removesuffix(name), [f"{names[part]}.weight" for part in parts]
            if not parts or f"{start}0.{last[0]}" not in weights.holder:
                continue
            for more in (f"{start}{experts}.{end}" for end in last):
                if more in weights.holder:
                    raise FileRefused(weights.path, f"there is {short(more)}, expected {experts} experts")
            tensors = [
                ExpertTensor(f"{start}{e}.{end}", (e,), slice(top, bottom), (bottom - top, width))
                for e in range(experts)
                for end, top, bottom in zip(last, edges, edges[1:], strict=False)
            ]
            for tensor in tensors:
                if tensor.name not in weights.holder:
                    raise FileRefused(weights.path, f"there is no {short(tensor.name)}, of one of {experts} experts")
            return tensors
    each = [short(f"{path.removesuffix(name)}0.{part}.weight") for part in parts[:1]]
    such = "".join(f", and no tensor for each expert, such as {tensor}" for tensor in each)
    raise FileRefused(weights.path, f"there is no {short(path)}{such}")
