"""An adapter as llama.cpp reads it: a .gguf file with one alpha for all, and the rank in the factors' shapes.

    blk.0.attn_q.weight.lora_a (r, in)    blk.0.attn_q.weight.lora_b (out, r)    s = adapter.lora.alpha / r

Where the alpha is 0 or missing, llama.cpp takes s = 1. An embedding's lora_a lies transposed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..checks import FileRefused, short
from ..files.peft import natural
from ..language.gguf import from_gguf
from .adapterfile import AdapterFile, Module
from .findings import SUSPICIOUS, Finding, counted, listed
from .tensors import Tensors

ALPHA = "adapter.lora.alpha"
PARTS = {"lora_a": "A", "lora_b": "B"}


def read_gguf_adapter(path: Path, tensors: Tensors) -> AdapterFile:
    """Return the adapter in a .gguf file."""
    kind = tensors.notes.get("general.type")
    if kind != "adapter":
        raise FileRefused(path, f"general.type is {short(kind)}, expected 'adapter': it is a model, or no adapter")
    if (how := tensors.notes.get("adapter.type")) != "lora":
        raise FileRefused(path, f"adapter.type is {short(how)}, expected 'lora'")
    findings: list[Finding] = []
    alpha = tensors.notes.get(ALPHA)
    alpha = float(alpha) if isinstance(alpha, int | float) else None
    if alpha is None or alpha == 0:
        text = f"{ALPHA} is {short(alpha)}: llama.cpp takes a scaling of 1 then, and other readers take 0"
        findings.append(Finding(SUSPICIOUS, "alpha-missing" if alpha is None else "alpha-zero", text))
    parts: dict[str, dict[str, str]] = {}
    unknown = []
    for key in tensors.shapes:
        weight, _, last = key.rpartition(".")
        if last not in PARTS or not weight.endswith(".weight"):
            unknown.append(key)
            continue
        parts.setdefault(from_gguf(weight).removesuffix(".weight"), {})[PARTS[last]] = key
    if unknown:
        text = (
            f"{counted(len(unknown), 'tensor')} that llama.cpp refuses or passes over in an adapter: "
            f"{listed(unknown, 'tensor')}"
        )
        findings.append(Finding(SUSPICIOUS, "unknown-tensors", text, tuple(unknown)))
    modules = {}
    for module in sorted(parts, key=natural):
        new = _module(module, parts[module], tensors)
        rank = new.rank_in_file(tensors)
        s = None if rank is None else alpha / rank if alpha else 1.0
        modules[module] = replace(new, alpha=alpha, scaling=s)
    return AdapterFile(path, "a GGUF adapter", tensors, modules, findings=tuple(findings))


def _module(path: str, parts: dict[str, str], tensors: Tensors) -> Module:
    axes = {len(tensors.shapes[name]) for name in parts.values()}
    if axes == {3}:
        E = max(tensors.shapes[name][0] for name in parts.values())
        return Module(path, parts, "experts", experts=E)
    embedding = path in ("model.embed_tokens", "token_embd")
    return Module(path, parts, "embedding", "A") if embedding else Module(path, parts)
