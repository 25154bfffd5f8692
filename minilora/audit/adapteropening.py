"""Which format an adapter has: a folder's files tell it, or the names in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checks import FileRefused, hub_hint, short
from ..files.disk import read_json
from ..files.peft import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from .adapterfile import AdapterFile
from .findings import SUSPICIOUS, WRONG, Finding
from .ggufadapter import read_gguf_adapter
from .kohyaadapter import read_kohya, refuse_other_kinds
from .mlxadapter import read_mlx
from .peftadapter import read_peft
from .tensors import open_tensors

MLX_NAME = "adapters.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TYPES: dict[str, tuple[type, ...]] = {
    "target_modules": (list, str), "exclude_modules": (list, str), "layers_pattern": (list, str),
    "target_parameters": (list,), "modules_to_save": (list,), "layers_to_transform": (list, int),
    "rank_pattern": (dict,), "alpha_pattern": (dict,), "lora_parameters": (dict,),
}  # fmt: skip
"""The types of what a configuration has beside numbers and flags."""
ENTRIES: dict[str, tuple[type, ...]] = {"layers_to_transform": (int,)}
"""The types of lists' entries that are no texts."""
WORDS = {list: "a list", str: "a text", int: "a number", dict: "an object"}
MOST_LETTERS, MOST_NAMES = 1000, 1000
"""Letters of a tensor's name, and entries of a list of names in a configuration that are looked up one by one."""
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps a configuration, in the header of the tensors' file."""


def open_adapter(path: Path) -> AdapterFile:
    """Return an adapter, of which the headers alone have been read.

    Raises
    ------
    FileRefused
        If it is damaged, or no LoRA: a pickle, a model, LoHa and its like, or nothing at all.
    """
    file = _file(path) if os.path.isdir(path) else path
    if file.suffix in PICKLES:
        raise FileRefused(file, "a pickle, which can run code when it is read: save it as safetensors")
    if file.suffix == ".npz":
        raise FileRefused(file, "expected safetensors: older versions of mlx-lm wrote .npz")
    tensors = open_tensors(file)
    if (longest := max(tensors.shapes, key=len, default="")) and len(longest) > MOST_LETTERS:
        raise FileRefused(file, f"the name {short(longest)} has {len(longest):,} letters: no module has such a path")
    if tensors.base is None:
        return read_gguf_adapter(file, tensors)
    refuse_other_kinds(file, tensors.shapes)
    config_path = file.parent / CONFIG_NAME
    config: dict[str, Any] | None = None
    findings: list[Finding] = []
    if os.path.exists(config_path):
        config = read_json(config_path)
        _check_lists(config_path, config)
        config, findings = _typed(config)
    ends = {name.rpartition(".")[2] for name in tensors.shapes}
    if ends & {"lora_a", "lora_b"} or (file.name == MLX_NAME and (config or {}).get("fine_tune_type")):
        _check_mlx_kind(config_path, config)
        return _with(read_mlx(path, tensors, config, config_path), findings)
    if any("lora_down" in name or "lora_up" in name or ".lora.down" in name for name in tensors.shapes):
        return read_kohya(path, tensors)
    if config is None:
        config, config_path = _in_metadata(tensors.notes), file
        config, findings = (None, []) if config is None else _typed(config)
    else:
        _check_kind(config_path, config)
    adapter = read_peft(path, tensors, config, config_path)
    return _with_more(_with(adapter, findings), file, no_config=config is None)


def _file(folder: Path) -> Path:
    """Return the file of a folder that holds the adapter's tensors."""
    for name in (WEIGHTS_NAME, f"{WEIGHTS_NAME}.index.json", MLX_NAME):
        if os.path.exists(folder / name):
            return folder / name
    pickles = [name for name in ("adapter_model.bin", "pytorch_lora_weights.bin") if os.path.exists(folder / name)]
    if pickles:
        raise FileRefused(folder / pickles[0], "a pickle, which can run code when it is read: save it as safetensors")
    if os.path.exists(folder / "adapters.npz"):
        raise FileRefused(
            folder / "adapters.npz", "an archive of NumPy's, as old versions of mlx-lm wrote: it is not read"
        )
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")])
    if len(files) == 1:
        return files[0]
    expected = f"expected {WEIGHTS_NAME}, {MLX_NAME}, or one .safetensors or .gguf file"
    names = ", ".join(short(file.name) for file in files[:5]) or "none of these"
    if below := [config.parent.name for config in sorted(folder.glob(f"*/{CONFIG_NAME}"))[:5]]:
        names += f", and its folder {', '.join(map(short, below))} holds one"
    raise FileRefused(folder, f"{expected}: it has {names}{hub_hint(folder)}")


def _check_lists(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse lists that would take for ever to look up."""
    settings = config.get("lora_parameters")
    lists = {name: config.get(name) for name in ("modules_to_save", "target_parameters", "layers_to_transform")}
    lists["lora_parameters.keys"] = settings.get("keys") if isinstance(settings, dict) else None
    for name, names in lists.items():
        if isinstance(names, list) and len(names) > MOST_NAMES:
            raise FileRefused(path, f"{name} has {len(names):,} entries, expected at most {MOST_NAMES:,}")


def _typed(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """Return a configuration whose lists are lists and whose tables are tables, and what was not."""
    typed, findings = dict(config), []
    for name, kinds in TYPES.items():
        value, entries = config.get(name), ENTRIES.get(name, (str,))
        if value is not None and not isinstance(value, kinds):
            typed[name] = None
            text = f"{name} is {short(value)}, expected {' or '.join(WORDS[kind] for kind in kinds)}"
            findings.append(Finding(WRONG, "config-type", text))
        elif isinstance(value, list) and (strange := [entry for entry in value if not isinstance(entry, entries)]):
            typed[name] = [entry for entry in value if isinstance(entry, entries)]
            findings.append(Finding(WRONG, "config-type", f"{name} has the entry {short(strange[0])}"))
    return typed, findings


def _check_kind(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse an adapter of PEFT's that is no LoRA."""
    kind = config.get("peft_type")
    if kind is not None and kind != "LORA":
        raise FileRefused(path, f"peft_type is {short(kind)}, which is no LoRA: it is not looked at")


def _check_mlx_kind(path: Path, config: Mapping[str, Any] | None) -> None:
    kind = (config or {}).get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise FileRefused(path, f"fine_tune_type is {short(kind)}, which is no LoRA: it is not looked at")


def _in_metadata(notes: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the configuration that stands in a header; None where there is none that can be read."""
    try:
        config = json.loads(notes.get(METADATA, "null"))
    except (ValueError, TypeError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _with_more(adapter: AdapterFile, file: Path, *, no_config: bool) -> AdapterFile:
    """Return the adapter with what is said of the whole: nothing in it, or no configuration beside it."""
    more = []
    trained_in_full = not no_config and (adapter.config or {}).get("modules_to_save")
    if not adapter.modules and not (adapter.saved and trained_in_full):
        what = "there are no tensors in it" if not adapter.tensors.shapes else "no tensor of it is a LoRA's"
        empty = Finding(WRONG, "empty", f"{what}: an engine that loads it answers as the base")
        adapter = replace(adapter, findings=(empty, *adapter.findings))
    if no_config and adapter.modules:
        of_peft = file.name == WEIGHTS_NAME or any(name.startswith(PREFIX) for name in adapter.tensors.shapes)
        text = f"there is no {CONFIG_NAME} beside it: nothing says rank and alpha, and so nothing says the scaling"
        level, code = (WRONG, "config-missing") if file.name == WEIGHTS_NAME else (SUSPICIOUS, "config-missing")
        if of_peft or not _is_of_diffusers(adapter):
            more.append(Finding(level, code, text))
    return _with(adapter, more)


def _with(adapter: AdapterFile, findings: list[Finding]) -> AdapterFile:
    """Return the adapter with more that was found."""
    return replace(adapter, findings=(*adapter.findings, *findings))


def _is_of_diffusers(adapter: AdapterFile) -> bool:
    """Return whether all modules are of parts of an image model, whose files have no alpha: the scaling is 1 there."""
    starts = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
    return all(module.startswith(starts) and ".h." not in module for module in adapter.modules)
