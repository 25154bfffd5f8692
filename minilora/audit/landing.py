"""Which weight of the model each module of an adapter changes, and which modules land on none.

A path is looked up as it is, then under the names that the same module has in other files of the model, and then as a
mistake makes it: see `.spellings`. So what is wrong gets a name, and the shapes can be compared all the same.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from ..checks import short
from ..files.modelfolder import EMBEDDING, HEAD
from ..language.gguf import ARCHITECTURES
from .adapterfile import AdapterFile
from .findings import NOTE, WRONG, Finding, counted, listed
from .modelheaders import ModelHeaders
from .spellings import KOHYA_PREFIXES, Fault, Spellings

ARCHITECTURE = "general.architecture"
BODY = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
"""The number of a layer in a path."""
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Modules that some models keep in one matrix."""


@dataclass
class Landing:
    """Where the modules of an adapter land in a model."""

    places: dict[str, str] = field(default_factory=dict)  # the model's path of each module that lands
    lost: list[str] = field(default_factory=list)  # the modules that land nowhere
    misnamed: set[str] = field(default_factory=set)  # those that would land, and under their own names do not
    turned: set[str] = field(default_factory=set)  # the modules whose weight is stored (in, out)
    fitting: set[str] = field(default_factory=set)  # the modules whose shapes were compared, and fit
    packed: set[str] = field(default_factory=set)  # the modules whose weight's shape cannot be seen
    findings: list[Finding] = field(default_factory=list)


def land(adapter: AdapterFile, model: ModelHeaders) -> Landing:
    """Look up each module of an adapter in a model."""
    landing = Landing()
    spellings = Spellings(adapter, model)
    faults: dict[Fault, list[str]] = {}
    tied = []
    for path, module in adapter.modules.items():
        last = path.rpartition(".")[2]
        if model.tied and last in (EMBEDDING, HEAD, "wte"):
            tied.append(path)
        place, fault = spellings.place(_original(path, adapter), module)
        if place is None:
            landing.lost.append(path)
            continue
        landing.places[path] = place
        if fault is not None:
            faults.setdefault(fault, []).append(path)
    for (level, code, text), paths in faults.items():
        landing.findings.append(Finding(level, code, f"{text}: {listed(paths)}", tuple(paths)))
        landing.misnamed |= {*paths} if level == WRONG else set()
    if "kohya" in adapter.format and landing.places:
        here = {_part_of(path) for path in landing.places}
        if elsewhere := [path for path in landing.lost if _part_of(path) not in here]:
            text = f"{counted(len(elsewhere), 'module')} of another part than this model: {listed(elsewhere)}"
            landing.findings.append(Finding(NOTE, "another-part", text, tuple(elsewhere)))
            landing.lost = [path for path in landing.lost if path not in {*elsewhere}]
    if landing.lost:
        landing.findings.append(_lost(adapter, model, landing))
    if (kinds := _architectures(adapter, model)) is not None:
        text = (
            f"general.architecture is {kinds[0]!r} in the adapter and {kinds[1]!r} in the model: llama.cpp refuses it"
        )
        landing.findings.append(Finding(WRONG, "architecture-differs", text))
    if tied:
        text = (
            f"the head is the embedding in this model, and the adapter changes {listed(tied)}: the one it changes and "
            "not the other; some engines change both, and GGUF adapters cannot hold it"
        )
        landing.findings.append(Finding(NOTE, "tied-head", text, tuple(tied)))
    return landing


def _original(path: str, adapter: AdapterFile) -> str:
    """Return the path in the base of a module of a model in which `layer_replication` has layers several times."""
    ranges = (adapter.config or {}).get("layer_replication")
    layer = BODY.search(path)
    if layer is None or not isinstance(ranges, list):
        return path
    wanted = int(layer[1])
    for pair in ranges:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)):
            return path
        first, end = pair
        if wanted < end - first:
            return f"{path[: layer.start(1)]}{first + wanted}{path[layer.end(1) :]}"
        wanted -= max(end - first, 0)
    return path


def _architectures(adapter: AdapterFile, model: ModelHeaders) -> tuple[str, str] | None:
    """Return llama.cpp's names for the adapter's kind of model and for the model's, where they differ."""
    ours, theirs = adapter.tensors.notes.get(ARCHITECTURE), model.config.get(ARCHITECTURE)
    if not model.is_gguf:
        theirs = ARCHITECTURES.get(str(model.config.get("model_type")))
    if adapter.tensors.base is not None or not isinstance(ours, str) or not isinstance(theirs, str):
        return None
    return (ours, theirs) if ours != theirs else None


def _lost(adapter: AdapterFile, model: ModelHeaders, landing: Landing) -> Finding:
    """Say which modules land nowhere, and what the model has in their place."""
    lost = landing.lost
    deepest = max((int(n) for path in model.modules for n in BODY.findall(path)), default=None)
    beyond = [p for p in lost if deepest is not None and any(int(n) > deepest for n in BODY.findall(p))]
    first = lost[0]
    like = next((p for p in model.modules if p.rpartition(".")[2] == first.rpartition(".")[2]), None)
    like = like or max(model.modules, key=lambda path: _shared(path, first), default="nothing")
    text = f"{counted(len(lost), 'module')} of {len(adapter.modules)} that the model has not: {listed(lost)}"
    if len(beyond) == len(lost):
        text += f"; the model has layers up to {deepest}: the adapter is of a deeper one"
    else:
        text += _in_one(first, model) or f"; the model has such as {short(like)}"
    level = WRONG
    if _untranslated(adapter, model, lost):
        level, text = NOTE, f"{listed(lost)}: llama.cpp's names do not tell all, so whether they land is not known"
    return Finding(level, "module-unknown", text, tuple(lost))


def _in_one(path: str, model: ModelHeaders) -> str:
    """Say that the model keeps several modules in one matrix and the adapter each by itself, or the other way round."""
    module, _, name = path.rpartition(".")
    for whole, parts in FUSED.items():
        if name in parts and f"{module}.{whole}" in model.modules:
            return f"; the model has {', '.join(parts)} in one matrix, {short(f'{module}.{whole}')}"
        if name == whole and all(f"{module}.{part}" in model.modules for part in parts):
            return f"; the model has {', '.join(parts)} apart, and the adapter has them in one matrix"
    return ""


def _shared(path: str, other: str) -> int:
    """Return how many parts two paths begin with in common."""
    pairs = zip(path.split("."), other.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _untranslated(adapter: AdapterFile, model: ModelHeaders, lost: list[str]) -> bool:
    """Return whether llama.cpp has names, in one of the two files, that are not known in transformers' words."""
    if model.is_gguf:
        return "GGUF" not in adapter.format and any(path.startswith("blk.") for path in model.modules)
    return "GGUF" in adapter.format and all(path.startswith("blk.") for path in lost)


def _part_of(path: str) -> str:
    """Return the prefix by which kohya's names tell the parts of an image model apart."""
    return next(prefix for prefix in KOHYA_PREFIXES if path.startswith(prefix))


def renamed(landing: Landing) -> Callable[[str], str]:
    """Return a function from the model's paths to the adapter's, by the beginnings in which most of them differ."""
    pairs: Counter[tuple[str, str]] = Counter()
    for ours, theirs in landing.places.items():
        a, b = ours.split("."), theirs.split(".")
        while a and b and a[-1] == b[-1]:
            a.pop()
            b.pop()
        pairs[".".join([*b, ""]) if b else "", ".".join([*a, ""]) if a else ""] += 1
    (theirs, ours), _ = pairs.most_common(1)[0] if pairs else (("", ""), 0)
    return lambda path: ours + path.removeprefix(theirs) if path.startswith(theirs) else path
