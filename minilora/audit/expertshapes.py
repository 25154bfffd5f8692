"""Whether the factors of a mixture's array fit the experts' weights, and whether something says how they are packed.

A model has one tensor for all experts, (E, out, in) or (E, in, out), or one or two for each. Up to version 0.19.0 PEFT
took the one way of storing for the other, and exchanged the factors: see `minilora.files.experts`.
"""

from __future__ import annotations

import itertools

from ..checks import short
from ..files.experts import EXCHANGED_UNTIL, MIXTRAL, MIXTRAL_MLP, PARTS, version_of
from .adapterfile import AdapterFile
from .findings import NOTE, SUSPICIOUS, WRONG, Finding
from .landing import Landing
from .modelheaders import ModelHeaders


def expert_weights(model: ModelHeaders, place: str) -> list[str]:
    """Return where the weights of a mixture's array are: one tensor, or for each expert one or two, in their order."""
    for spelled in (place, place.replace(".mlp.", f".{MIXTRAL_MLP}.")):
        if spelled in model.arrays or spelled in model.modules:
            return [spelled]
        module, _, name = spelled.rpartition(".")
        parts = PARTS.get(name, (name,))
        for names in (parts, tuple(MIXTRAL.get(part, part) for part in parts)):
            weights: list[str] = []
            for e in itertools.count():
                of_it = [f"{module}.{e}.{part}" for part in names]
                if not all(weight in model.modules for weight in of_it):
                    break
                weights += of_it
            if weights:
                return weights
    return []


def _expert_shape(model: ModelHeaders, place: str) -> tuple[int, int, int] | None:
    """Return E, and the two sides of each expert's weight as stored; None where its files do not show them."""
    weights = expert_weights(model, place)
    shapes = [model.arrays.get(name) or model.modules.get(name) for name in weights]
    first = shapes[0] if shapes else None
    if first is None:
        return None
    if len(first) == 3:
        return first[0], first[1], first[2]
    parts = len(PARTS.get(place.rpartition(".")[2], ("",))) if len(weights) > 1 else 1
    return len(weights) // parts, first[0] * parts, first[1]


def compare_experts(
    adapter: AdapterFile, model: ModelHeaders, path: str, place: str, landing: Landing
) -> tuple[str, str, str] | None:
    """Return what is wrong with the packing of a mixture's array, None where it fits and something decides it."""
    module, weight = adapter.modules[path], _expert_shape(model, place)
    if weight is None:
        landing.packed.add(path)
        return None
    E, rows, columns = weight
    if module.experts != E:
        return WRONG, "experts-differ", f"the adapter is for {module.experts} experts, and the model has {E}"
    out, width = module.widths(adapter.tensors) or (0, 0)
    sides = f"lora_A reads {width} numbers and lora_B writes {out}, and each expert's weight is {rows} x {columns}"
    if sorted((out, width)) != sorted((rows, columns)):
        return WRONG, "shape-differs", sides
    in_out = _stored_in_out(model, place)
    version = version_of(str((adapter.config or {}).get("peft_version")))
    if rows == columns:
        if version is None and adapter.config is not None and "PEFT" in adapter.format:
            text = (
                f"{sides}: square, and without a peft_version nothing says which factor reads the input: PEFT "
                "exchanged the two after 0.19.0"
            )
            return SUSPICIOUS, "packing-undecided", text
        return None
    if in_out is None:
        return None  # both ways round fit some way of storing it
    reads_input = (out, width) == ((columns, rows) if in_out else (rows, columns))
    if reads_input or in_out or version is None:
        if not reads_input and version is None:
            return (
                SUSPICIOUS,
                "packing-undecided",
                f"{sides}: exchanged, as PEFT wrote them up to 0.19.0, and no peft_version says so",
            )
        if version is not None and version <= EXCHANGED_UNTIL and not in_out:
            text = f"{sides}: as PEFT packs them after 0.19.0, and peft_version is {'.'.join(map(str, version))}"
            return SUSPICIOUS, "packing-contradicted", text
        return None
    if version > EXCHANGED_UNTIL:
        text = f"{sides}: exchanged, as PEFT wrote them up to 0.19.0, and peft_version is {'.'.join(map(str, version))}"
        return WRONG, "packing-exchanged", text
    text = f"{sides}: exchanged, as PEFT wrote them up to 0.19.0; today's readers must exchange them back"
    landing.findings.append(Finding(NOTE, "packing-of-old-peft", f"{short(path)}: {text}", (path,)))
    return None


def _stored_in_out(model: ModelHeaders, place: str) -> bool | None:
    """Return whether the experts' weights are stored (E, in, out); gate_up_proj beside down_proj shows it."""
    module = place.rpartition(".")[0]
    shapes = [_expert_shape(model, f"{module}.{name}") for name in ("gate_up_proj", "down_proj")]
    if None in shapes:
        return None
    (_, a, b), (_, c, d) = shapes  # type: ignore[misc]
    if (a, b) == (2 * d, c):
        return False
    return True if (a == d and b == 2 * c) else None
