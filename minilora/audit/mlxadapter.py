"""An adapter as mlx-lm writes it: adapters.safetensors, with the factors transposed, and a scale in place of alpha / r.

lora_a (in, r)    lora_b (r, out)    scale          y = x W^T + scale x lora_a lora_b
of a mixture lora_a (E, r, in) and lora_b (E, out, r); of DoRA also m (out,)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checks import short
from ..files.peft import natural
from .adapterfile import AdapterFile, Module
from .findings import SUSPICIOUS, WRONG, Finding, counted, listed
from .tensors import Tensors

PARTS = {"lora_a": "A", "lora_b": "B", "m": "magnitude"}


def read_mlx(path: Path, tensors: Tensors, config: Mapping[str, Any] | None, config_path: Path | None) -> AdapterFile:
    """Return the adapter in a file with mlx-lm's names."""
    findings: list[Finding] = []
    parts: dict[str, dict[str, str]] = {}
    unknown = []
    for key in tensors.shapes:
        module, _, last = key.rpartition(".")
        if last in PARTS and module:
            parts.setdefault(module, {})[PARTS[last]] = key
        else:
            unknown.append(key)
    if unknown:
        text = f"{counted(len(unknown), 'tensor')} that mlx-lm has no place for: {listed(unknown, 'tensor')}"
        findings.append(Finding(SUSPICIOUS, "unknown-tensors", text, tuple(unknown)))
    settings = config.get("lora_parameters") if config is not None else None
    settings = settings if isinstance(settings, dict) else {}
    rank, scale = settings.get("rank"), settings.get("scale")
    if scale is None and isinstance(settings.get("alpha"), int | float) and isinstance(rank, int) and rank:
        scale = settings["alpha"] / rank  # of older versions
    if config is not None and scale is None:
        text = "lora_parameters has no scale: mlx-lm takes its default of its version, 20 today"
        findings.append(Finding(SUSPICIOUS, "alpha-missing", text))
    if config is None:
        text = (
            "there is no adapter_config.json beside it: nothing says the scale, which mlx-lm multiplies the update by"
        )
        findings.append(Finding(SUSPICIOUS, "alpha-missing", text))
    if scale is not None and (type(scale) not in (int, float) or scale == 0):
        text = f"scale is {short(scale)}, so the adapter does nothing or does not load: expected a number above 0"
        findings.append(Finding(WRONG, "alpha-zero", text))
    s = float(scale) if isinstance(scale, int | float) and not isinstance(scale, bool) else None
    r = rank if type(rank) is int and rank > 0 else None
    modules = {module: _module(module, parts[module], tensors, r, s) for module in sorted(parts, key=natural)}
    if config is not None:
        dora = config.get("fine_tune_type") == "dora"
        lacking = [module for module, of_it in parts.items() if "magnitude" not in of_it]
        having = [module for module, of_it in parts.items() if "magnitude" in of_it]
        if dora and lacking:
            text = f"fine_tune_type is 'dora', and there is no m of {listed(lacking)}"
            findings.append(Finding(WRONG, "magnitude-missing", text, tuple(lacking)))
        if having and config.get("fine_tune_type") == "lora":
            text = f"fine_tune_type is 'lora', and there is an m of {listed(having)}, which mlx-lm passes over then"
            findings.append(Finding(WRONG, "magnitude-ignored", text, tuple(having)))
    return AdapterFile(path, "an MLX adapter", tensors, modules, config, config_path, findings=tuple(findings))


def _module(path: str, parts: Mapping[str, str], tensors: Tensors, rank: int | None, scale: float | None) -> Module:
    axes = [len(tensors.shapes[name]) for part, name in parts.items() if part in "AB"]
    alpha = None if scale is None or rank is None else scale * rank
    if axes and set(axes) == {3}:  # of a mixture: one pair an expert
        E = max(tensors.shapes[name][0] for part, name in parts.items() if part in "AB")
        return Module(path, parts, "experts", experts=E, rank=rank, alpha=alpha, scaling=scale)
    embedding = path.rpartition(".")[2] in ("embed_tokens", "wte")
    # An embedding's lora_a is (V, r) and its lora_b (r, dim): transposed too, of a matrix (dim, V).
    return Module(path, parts, "embedding" if embedding else "linear", "AB", rank=rank, alpha=alpha, scaling=scale)
