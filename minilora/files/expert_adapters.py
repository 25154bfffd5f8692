"""The factors of a mixture's experts in an adapter's folder.

An array of a mixture, ``….experts.gate_up_proj`` or ``….down_proj``, has a matrix W_e (out, in) for each expert.

The keys of an adapter of ``….experts.down_proj`` contain only its module's path, as in ``….experts.lora_A.weight``;
``target_parameters`` tells which array they belong to. If two arrays of a module are adapted, PEFT nests their layers
in the order of the arrays in the module, the first one innermost:

    gate_up_proj     ….experts.base_layer.lora_A.weight
    down_proj        ….experts.lora_A.weight

The two matrices are those of `minilora.variants.stackedlora`, A (E r, in) and B (out, r E). Older files differ:

* Up to version 0.19.0, PEFT mistook each weight W_e (out, in) for one of (in, out), and so exchanged the factors: its A
  is (E r, out), its B (in, r E). ``peft_version`` shows this; without it the shapes may: `experts.are_exchanged`.
* Some programs wrote B with the expert as the slow index. Then ``lora_B_layout`` is ``grouped_by_expert``.

Both are refused, and so is an ambiguous packing. The message tells the user what to do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from ..texts import short
from .experts import EXPERT_ORDER, are_exchanged

WRAPPED = ".base_layer"
EXPERTS_MODULE = "experts"
"""The name of a module that contains a mixture's arrays."""
EXCHANGED_UNTIL = (0, 19, 0)
"""The last version of PEFT that mistook a weight (out, in) for one of (in, out)."""
WRITTEN_AS = "0.19.1"
"""The first version of PEFT that packs the factors like `save_adapter`, which writes it as ``peft_version``."""
B_LAYOUTS = {"rank_major": False, "grouped_by_expert": True}
"""The values of unsloth's key lora_B_layout; True if the expert is B's slow index."""


def layer_paths(paths: Iterable[str]) -> dict[str, str]:
    """Return, for each array's path, the path of the layer that has its adapter in PEFT."""
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
    """Return the path of each array's adapter by the array's name. The last array's is the module's own path."""
    return {name: module + depth * WRAPPED for depth, name in enumerate(reversed(names))}


def adapted_arrays(adapted: Iterable[str], targets: Collection[str]) -> dict[str, str]:
    """Return the path of each array's adapter, by the array's path; require exactly one adapter for each target."""
    found: dict[str, str] = {}
    for module, names, depths in modules_with_arrays(adapted, targets):
        if sorted(depths) != list(range(len(names))):
            raise ValueError(
                f"there are {len(depths)} pairs of factors for arrays of {short(module)}, but target_parameters names "
                f"{short(names)} there"
            )
        if len(names) > 1 and not set(names) <= set(EXPERT_ORDER):
            raise ValueError(f"target_parameters names {short(names)} of {short(module)}: their order is unknown")
        found |= {f"{module}.{name}": place for name, place in nested_paths(module, names).items()}
    return found


def modules_with_arrays(adapted: Iterable[str], targets: Collection[str]) -> Iterator[tuple[str, list[str], list[int]]]:
    """Yield each module whose arrays have adapters: its path, the targeted arrays, and the adapters' depths."""
    by_module: dict[str, list[int]] = {}
    for place in adapted:
        stop = len(place)
        while place.endswith(WRAPPED, 0, stop):
            stop -= len(WRAPPED)
        by_module.setdefault(place[:stop], []).append((len(place) - stop) // len(WRAPPED))  # nested layers
    for module, depths in by_module.items():
        of_arrays = module.rpartition(".")[2] == EXPERTS_MODULE or depths != [0]
        names = {_array_named(target, module, of_arrays=of_arrays) for target in targets} - {""}
        if names or depths != [0]:  # otherwise it is an adapter of a module
            yield module, sorted(sorted(names), key=_order), depths


def _array_named(target: str, module: str, *, of_arrays: bool) -> str:
    """Return the array of a module that a target names, or ""; a bare name matches every module with arrays."""
    owner, _, name = target.rpartition(".")
    if not owner:
        return name if of_arrays else ""
    return name if module == owner or module.endswith(f".{owner}") else ""


def _order(name: str) -> int:
    """Return an array's position in its module."""
    return EXPERT_ORDER.index(name) if name in EXPERT_ORDER else len(EXPERT_ORDER)


# --- packings ---


def check_packing(peft_version: str | None, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Require the packing that PEFT uses since 0.19.1; `shapes` contains each array's (out, in) by path."""
    says = "there is no peft_version" if peft_version is None else f"peft_version is {short(peft_version)}"
    version = version_of(peft_version)
    for path in shapes:
        by_shape = _exchanged_by_shape(path.rpartition(".")[0], shapes)
        exchanged = by_shape if version is None else version <= EXCHANGED_UNTIL
        if exchanged is None:
            raise ValueError(
                f"{says}, and nothing else shows which factor of {short(path)} reads the input: PEFT exchanged the two "
                'after 0.19.0. Add "peft_version": "0.19.1" if lora_A is as wide as the input; if it is as wide as the '
                "output, merge the adapter with the version of PEFT that wrote it, or train it again"
            )
        if exchanged:
            raise ValueError(
                f"{says}: the factors of {short(path)} are exchanged, as PEFT packed them up to 0.19.0, which is not "
                "supported. Merge the adapter with the version of PEFT that wrote it, or train it again"
            )
        if by_shape:
            raise ValueError(
                f"{says}, but the shapes of gate_up_proj's and down_proj's factors are those of versions up to 0.19.0"
            )


def _exchanged_by_shape(module: str, shapes: Mapping[str, tuple[int, int]]) -> bool | None:
    """Return whether the adapters of a module's two arrays have exchanged shapes; None if they are ambiguous."""
    gate_up, down = (shapes.get(f"{module}.{name}") for name in EXPERT_ORDER)
    return are_exchanged(gate_up, down) if gate_up and down else None


def version_of(text: str | None) -> tuple[int, ...] | None:
    """Return PEFT's version as numbers; None if it is missing or a development version."""
    match = re.fullmatch(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})", text or "")
    return tuple(map(int, match.groups())) if match else None
