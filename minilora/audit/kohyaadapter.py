"""An adapter as kohya's scripts and LyCORIS name it, and as diffusers named it first: lora_down, lora_up, alpha.

    lora_unet_PATH_WITH_UNDERSCORES.lora_down.weight (r, in)    .lora_up.weight (out, r)    .alpha    s = alpha / r

Each module has an alpha of its own; without one the programs take the rank, so that s = 1. Which dots of a path became
underscores the file does not say: the model's names do. LoHa, LoKr and their like are no two factors, and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..checks import FileRefused, short
from ..files.peft import natural
from .adapterfile import AdapterFile, Module
from .findings import NOTE, SUSPICIOUS, WRONG, Finding, counted, listed
from .tensors import Tensors

KEY = re.compile(
    r"(?P<module>.+?)[._](?:lora[._])?(?P<part>lora_down|lora_up|down|up|lora_mid|alpha|dora_scale)(?:\.(?P<end>weight))?",
    re.DOTALL,
)
PARTS = {"lora_down": "A", "down": "A", "lora_up": "B", "up": "B", "alpha": "alpha", "dora_scale": "magnitude"}
OTHER_KINDS = {
    "hada_": "LoHa", "lokr_": "LoKr", "oft_blocks": "OFT", "oft_diag": "OFT", "boft_": "BOFT", "lora_mid": "LoCon in "
    "three factors", "a1.weight": "GLoRA", "on_input": "IA3", "glora_": "GLoRA",
}  # fmt: skip


def refuse_other_kinds(path: Path, names: Iterable[str]) -> None:
    """Refuse what is an adapter and no LoRA, by its name."""
    for name in names:
        last = name.rpartition(".")[2] if not name.endswith(".weight") else ".".join(name.split(".")[-2:])
        kind = next((kind for start, kind in OTHER_KINDS.items() if last.startswith(start)), None)
        if kind is not None:
            raise FileRefused(path, f"{short(name)} is of {kind}, which is no LoRA of two factors: it is not looked at")


def read_kohya(path: Path, tensors: Tensors) -> AdapterFile:
    """Return the adapter in a file with kohya's names."""
    findings: list[Finding] = []
    parts: dict[str, dict[str, str]] = {}
    unknown = []
    for key in tensors.shapes:
        match = KEY.fullmatch(key)
        if match is None:
            unknown.append(key)
        else:
            parts.setdefault(match["module"], {})[PARTS[match["part"]]] = key
    if unknown:
        text = f"{counted(len(unknown), 'tensor')} that no reader of LoRA knows: {listed(unknown, 'tensor')}"
        findings.append(Finding(SUSPICIOUS, "unknown-tensors", text, tuple(unknown)))
    modules, without, zero = {}, [], []
    for name in sorted(parts, key=natural):
        module = _module(name, parts[name], tensors)
        if module.alpha is None:
            without.append(name)
        elif module.alpha == 0:
            zero.append(name)
        modules[name] = module
    if without:
        text = (
            f"there is no alpha of {listed(without)}: most programs take the rank for it, a scaling of 1, and not all"
        )
        has_place = not all(".lora." in key for key in tensors.shapes)  # which the first files of diffusers have not
        findings.append(Finding(SUSPICIOUS if has_place else NOTE, "alpha-missing", text, tuple(without)))
    if zero:
        text = f"alpha is 0, so the adapter of {listed(zero)} does nothing"
        findings.append(Finding(WRONG, "alpha-zero", text, tuple(zero)))
    return AdapterFile(path, "a file with kohya's names", tensors, modules, findings=tuple(findings))


def _module(name: str, parts: dict[str, str], tensors: Tensors) -> Module:
    axes = max((len(tensors.shapes[key]) for part, key in parts.items() if part in "AB"), default=2)
    bare = Module(name, {part: key for part, key in parts.items() if part != "alpha"}, "conv" if axes > 2 else "linear")
    alpha = None
    if "alpha" in parts:
        numbers = np.ravel(tensors.read(parts["alpha"]))
        alpha = float(numbers[0]) if numbers.size == 1 else None
    rank = bare.rank_in_file(tensors)
    s = None if rank is None or not rank else 1.0 if alpha is None else alpha / rank
    return replace(bare, alpha=alpha, scaling=s)
