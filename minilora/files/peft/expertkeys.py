"""How PEFT names and packs the adapters of a mixture's arrays, its ``target_parameters``; and how others packed them.

An adapter of the array ``….experts.down_proj`` lies under the name of its module, ``….experts.lora_A.weight``: the key
alone does not say of which array it is. `target_parameters` says it. Where two arrays of a module are adapted, PEFT
puts one layer into another, in the order in which the module has them, the first one innermost:

    gate_up_proj     ….experts.base_layer.lora_A.weight
    down_proj        ….experts.lora_A.weight

The two matrices are those of `minilora.variants.stackedlora`, A (E r, in) and B (out, r E). Two things vary:

* Up to version 0.19.0, PEFT took each weight W_e (out, in) for (in, out). Its A is (E r, out), its B (in, r E), and the
  change of W_e is (B_e A_e)^T: see `straightened`. ``peft_version`` says which it is. Without it the shapes may, where
  both arrays of the experts are adapted: gate_up_proj is d -> 2 m, and down_proj m -> d.
* Some programs wrote B with the expert as the slow index. ``lora_B_layout`` says ``grouped_by_expert`` then.

What nothing decides is refused, with what to add.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...checks import FileRefused, short
from ...variants.stackedlora import packed_B, stacked_A, stacked_B
from ..tensors import TensorFile
from .adapterconfig import B_LAYOUTS, LayerConfig, PeftConfig
from .adapterkeys import FACTORS, PREFIX, Form

WRAPPED = ".base_layer"
EXPERTS = "experts"
"""What a module with the arrays of a mixture is called."""
ORDER = ("gate_up_proj", "down_proj")
"""The arrays of a module of experts, as it has them."""
TURNED_UNTIL = (0, 19, 0)
"""The last version of PEFT that took a weight (out, in) for (in, out)."""
WRITTEN_AS = "0.19.1"
"""The first version that packs them as `save_adapter` does: what it notes as ``peft_version``."""


@dataclass(frozen=True)
class ExpertForm(Form):
    """How the adapter of one array lies in a file."""

    kind: str = "parameter"
    place: str = ""  # the path of the layer that has it in PEFT
    experts: int = 1  # E
    turned: bool = False  # whether the factors are those of the transposed weights
    grouped: bool = False  # whether the expert is B's slow index

    def keys(self, module: str) -> tuple[str, ...]:
        """Return the names of A and B."""
        return tuple(f"{PREFIX}{self.place}.{part}" for part in FACTORS)

    def matrices(self, arrays: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        """Return A (E r, in) and B (out, r E), packed as PEFT packs them today, from arrays as the file has them."""
        A, B = arrays
        if self.grouped:
            B = packed_B(B.reshape(len(B), self.experts, -1).swapaxes(0, 1))
        return list(straightened(A, B, self.experts)) if self.turned else [A, B]

    def __str__(self) -> str:
        return f"{self.experts} experts" if self.experts > 1 else "parameter"


def straightened(A: np.ndarray, B: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return A (E r, in), B (out, r E) of factors (E r, out), (in, r E): (B_e A_e)^T = A_e^T B_e^T."""
    new_A = stacked_B(B, experts).swapaxes(1, 2).reshape(A.shape[0], len(B))
    return np.ascontiguousarray(new_A), packed_B(stacked_A(A, experts).swapaxes(1, 2))


def places(paths: Iterable[str]) -> dict[str, str]:
    """Return for each array's path the path of the layer that has its adapter in PEFT."""
    of_module: dict[str, list[str]] = {}
    for path in paths:
        module, _, name = path.rpartition(".")
        of_module.setdefault(module, []).append(name)
    paths_in_peft: dict[str, str] = {}
    for module, names in of_module.items():
        by_name = places_of(module, sorted(names, key=_rank))
        paths_in_peft |= {f"{module}.{name}": place for name, place in by_name.items()}
    return paths_in_peft


def expert_forms(
    config: PeftConfig, file: TensorFile, forms: Mapping[str, Form]
) -> tuple[dict[str, ExpertForm], dict[str, LayerConfig]]:
    """Return the form of each array's adapter and what the configuration says of it, by the array's path.

    Raises
    ------
    FileRefused
        If the keys are not those of the arrays that `target_parameters` names, or nothing says how factors lie.
    """
    sites = _paths(config, forms)
    layers = config.settings(list(sites))
    by_path: dict[str, ExpertForm] = {}
    for path, place in sites.items():
        form, rank = ExpertForm(place=place), layers[path].rank
        A, _ = (file.tensors[key] for key in form.keys(path))
        if len(A.shape) != 2 or A.shape[0] % rank or not A.shape[0]:
            raise FileRefused(
                file.path,
                f"{short(form.keys(path)[0])} has shape {list(A.shape)}, expected as many rows for each expert: the "
                f"rank is {rank}",
            )
        turned = _turned(config, file, {other: sites[other] for other in _beside(path, sites)}, path)
        grouped = B_LAYOUTS[config.lora_B_layout] if config.lora_B_layout else False
        by_path[path] = ExpertForm(place=place, experts=A.shape[0] // rank, turned=turned, grouped=grouped)
    return by_path, layers


def _paths(config: PeftConfig, forms: Mapping[str, Form]) -> dict[str, str]:
    """Return the place of each array's adapter, by the array's path; refuse what is more or less than is named."""
    paths: dict[str, str] = {}
    for module, names, depths in modules_with_arrays(forms, config.target_parameters):
        if sorted(depths) != list(range(len(names))):
            raise FileRefused(
                config.path,
                f"there are {len(depths)} pairs of factors for arrays of {short(module)}, and target_parameters "
                f"names {short(names)} of it",
            )
        if len(names) > 1 and not set(names) <= set(ORDER):
            raise FileRefused(
                config.path,
                f"target_parameters names {short(names)} of {short(module)}: which key is whose is not known",
            )
        paths |= {f"{module}.{name}": place for name, place in places_of(module, names).items()}
    return paths


def modules_with_arrays(places: Iterable[str], targets: Collection[str]) -> Iterator[tuple[str, list[str], list[int]]]:
    """Yield each module with adapters of arrays at these places: its path, the arrays in order, the adapters' depths.

    The arrays are those that `targets`, the list ``target_parameters``, names of it. A name without its module's,
    "gate_up_proj", as PEFT writes for all-linear, is of modules that have arrays alone. An adapter of depth n lies n
    layers below the module.
    """
    by_module: dict[str, list[int]] = {}
    for place in places:
        stop = len(place)
        while place.endswith(WRAPPED, 0, stop):
            stop -= len(WRAPPED)
        by_module.setdefault(place[:stop], []).append((len(place) - stop) // len(WRAPPED))
    for module, depths in by_module.items():
        of_arrays = module.rpartition(".")[2] == EXPERTS or depths != [0]
        names = {_named(target, module, of_arrays=of_arrays) for target in targets} - {""}
        if names or depths != [0]:  # else it is an adapter of a module
            yield module, sorted(sorted(names), key=_rank), depths


def places_of(module: str, names: Sequence[str]) -> dict[str, str]:
    """Return where the adapter of each of a module's arrays lies, by its name: the last one's at the module itself."""
    return {name: module + depth * WRAPPED for depth, name in enumerate(reversed(names))}


def _named(target: str, module: str, *, of_arrays: bool) -> str:
    """Return the array of a module that a name in `target_parameters` means, or nothing."""
    owner, _, name = target.rpartition(".")
    if not owner:
        return name if of_arrays else ""
    return name if module == owner or module.endswith(f".{owner}") else ""


def _rank(name: str) -> int:
    """Return where an array stands in its module."""
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _beside(path: str, sites: Mapping[str, str]) -> list[str]:
    """Return the arrays of the same module."""
    module = path.rpartition(".")[0]
    return [other for other in sites if other.rpartition(".")[0] == module]


def _turned(config: PeftConfig, file: TensorFile, sites: Mapping[str, str], path: str) -> bool:
    """Return whether an array's factors are those of transposed weights; refuse what contradicts or says nothing."""
    name, version = path.rpartition(".")[2], version_of(config.peft_version)
    by_shape = _by_shape(file, sites)
    if name not in ORDER:  # a matrix, which older versions were not tried with
        if version is not None and version > TURNED_UNTIL:
            return False
        raise FileRefused(
            config.path,
            f"{_says(config)}: it is not known how {short(path)} lies in versions of PEFT up to 0.19.0. Add "
            '"peft_version": "0.19.1" where lora_A is as wide as the input',
        )
    if version is None:
        if by_shape is None:
            raise FileRefused(
                config.path,
                f"{_says(config)}, and nothing else tells which factor of {short(path)} reads the input: PEFT has "
                'exchanged the two after 0.19.0. Add "peft_version": "0.19.1" where lora_A is as wide as the input, '
                'or "0.19.0" where it is as wide as the output',
            )
        return by_shape
    turned = version <= TURNED_UNTIL
    if by_shape is not None and by_shape != turned:
        raise FileRefused(
            config.path,
            f"{_says(config)}, and the shapes of gate_up_proj's and down_proj's factors are those of "
            f"{'later versions' if turned else 'versions up to 0.19.0'}",
        )
    return turned


def _says(config: PeftConfig) -> str:
    version = config.peft_version
    return "there is no peft_version" if version is None else f"peft_version is {short(version)}"


def _by_shape(file: TensorFile, sites: Mapping[str, str]) -> bool | None:
    """Return whether both arrays' factors have the shapes of transposed weights; None where they may be both."""
    shapes = {}
    for path, place in sites.items():
        A, B = (file.tensors[key].shape for key in ExpertForm(place=place).keys(path))
        shapes[path.rpartition(".")[2]] = (A[-1], B[0])
    if set(shapes) != set(ORDER):
        return None
    (a, b), (c, d) = (shapes[name] for name in ORDER)
    straight, turned = (b == 2 * c and a == d), (a == 2 * d and b == c)
    return turned if straight != turned else None


def version_of(text: str | None) -> tuple[int, ...] | None:
    """Return PEFT's version as numbers; None where there is none, or it is one between two versions."""
    match = re.fullmatch(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})", text or "")
    return tuple(map(int, match.groups())) if match else None
