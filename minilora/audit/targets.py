"""Which modules of the model a configuration names, which of them the file has, and how many there are of each kind.

PEFT adapts what `target_modules` names and passes over tensors of anything else, without a word. So both are told: the
tensors that it would not load, and the modules that it names and the file lacks. A kind is the last part of a path,
"q_proj"; those of a mixture's experts, of its shared expert, and of the part that sees are counted apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import FileRefused, reading, short
from ..checks import named as under
from ..files.patterns import are_named, first_matches, layer_numbers, within_time
from .adapterfile import AdapterFile
from .findings import NOTE, SUSPICIOUS, WRONG, Finding, counted, listed
from .landing import BODY, Landing, renamed
from .modelheaders import ModelHeaders
from .spellings import SIGHT

EXPERT = re.compile(r"\.experts\.(?:\d+\.)?")
EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "wpe",
    "word_embeddings",
    "position_embeddings",
    "token_type_embeddings",
    "lm_head",
)


@dataclass(frozen=True)
class Kind:
    """How many modules of one kind the model has, and how many of them the adapter changes."""

    name: str
    adapted: int
    total: int


def kind_of(path: str) -> str:
    """Return what a module is counted as."""
    last = path.rpartition(".")[2]
    if EXPERT.search(path):
        return f"experts' {last}"
    if "shared_expert" in path:
        return f"shared expert's {last}"
    return f"vision's {last}" if SIGHT.search(path) else last


def coverage(adapter: AdapterFile, model: ModelHeaders | None, landing: Landing | None) -> list[Kind]:
    """Return for each kind of module how many the adapter has, of how many: those that it has none of stand last.

    An expert's weights count once for each layer, whether a tensor has one expert or all.
    """
    if model is None or landing is None:
        counts: dict[str, set[str]] = {}
        for path in adapter.modules:
            counts.setdefault(kind_of(path), set()).add(_once(path))
        return [Kind(name, len(paths), 0) for name, paths in counts.items()]
    total: dict[str, set[str]] = {}
    for path in [*model.modules, *model.arrays]:
        if BODY.search(path) or path.rpartition(".")[2] in EMBEDDINGS:
            total.setdefault(kind_of(path), set()).add(_once(path))
    adapted: dict[str, set[str]] = {}
    for own, path in landing.places.items():
        for kind in _kinds(path, total) if own not in landing.misnamed else ():
            adapted.setdefault(kind, set()).add(_once(path))
    kinds = [
        Kind(name, len(adapted.get(name, ())), len(total.get(name, adapted.get(name, ()))))
        for name in {**total, **adapted}
    ]
    return sorted(kinds, key=lambda kind: kind.adapted == 0)


def _kinds(path: str, total: Mapping[str, Any]) -> list[str]:
    """Return the kinds of the model's that a module of the adapter changes: gate_up_proj may be stored as two."""
    kind = kind_of(path)
    if kind in total:
        return [kind]
    parts = {"experts' gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"), "experts' down_proj": ("down_proj", "w2")}
    return [name for part in parts.get(kind, ()) if (name := f"experts' {part}") in total] or [kind]


def _once(path: str) -> str:
    """Return a name that all experts of a layer share."""
    return EXPERT.sub(".experts.", path.rpartition(".")[0] + ".")


def target_findings(adapter: AdapterFile, model: ModelHeaders | None, landing: Landing | None) -> Iterator[Finding]:
    """Yield what is wrong between the modules that the configuration names and those that the file has."""
    config = adapter.config
    if config is None:
        yield from _gaps(adapter, model, landing)
        return
    if "MLX" in adapter.format:
        yield from _mlx(adapter, model, landing)
        return
    assert adapter.config_path is not None
    try:
        with reading(adapter.config_path), within_time():
            findings = list(_peft(adapter, model, landing, config))
    except FileRefused as error:
        findings = [Finding(WRONG, "targets-not-read", str(error))]
    yield from findings


def _peft(
    adapter: AdapterFile,
    model: ModelHeaders | None,
    landing: Landing | None,
    config: Mapping[str, Any],
) -> Iterator[Finding]:
    own = [path for path, module in adapter.modules.items() if module.kind != "experts"]
    targets = config.get("target_modules")
    if not targets and not config.get("target_parameters"):
        if own:
            yield Finding(
                SUSPICIOUS, "targets-missing", "there is no target_modules: PEFT takes its default of the kind of model"
            )
        return
    strangers = [p for p, named in zip(own, _named(config, own), strict=True) if not named]
    if strangers:
        text = (
            f"target_modules ({short(targets, 80)}) does not name {listed(strangers)}, of which the file has "
            "tensors: PEFT passes over them without an error"
        )
        if isinstance(targets, str) and "," in targets:
            text += "; a string is one regular expression, and no list"
        yield Finding(WRONG, "not-a-target", text, tuple(strangers))
    yield from _patterns(adapter, config)
    if model is not None and landing is not None:
        yield from _missing(adapter, model, landing, config)
        yield from _parameters(adapter, model, config)
        biased = [path for path in landing.places.values() if model.bias(path) is not None]
        trained = config.get("bias") in ("all", "lora_only")
        if trained and biased and not any(path.endswith(".bias") for path in adapter.saved):
            text = f"bias is {config['bias']!r}, and the file has none of {listed(biased)}: what was trained is lost"
            yield Finding(WRONG, "trained-bias-missing", text, tuple(biased))


def _named(config: Mapping[str, Any], paths: list[str]) -> list[bool]:
    """Return of each path whether PEFT would put an adapter there."""
    targets, excludes = config.get("target_modules"), config.get("exclude_modules")
    if targets == "all-linear":
        named = [path.rpartition(".")[2] not in EMBEDDINGS for path in paths]
    else:
        named = _matches("target_modules", targets, paths)
    if excludes:
        excluded = _matches("exclude_modules", excludes, paths)
        named = [a and not b for a, b in zip(named, excluded, strict=True)]
    layers = config.get("layers_to_transform")
    if layers is not None and isinstance(targets, list):
        wanted = layers if isinstance(layers, list) else [layers]
        pattern = config.get("layers_pattern") or []
        pattern = [pattern] if isinstance(pattern, str) else pattern
        with under("layers_pattern"):
            numbers = layer_numbers(pattern, paths)
        whole = {*targets}
        named = [
            a and (path in whole or number in wanted) for a, path, number in zip(named, paths, numbers, strict=True)
        ]
    return named


def _matches(key: str, names: Any, paths: list[str]) -> list[bool]:
    with under(key):
        return are_named(names or [], paths)


def _patterns(adapter: AdapterFile, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield the keys of patterns that match no module."""
    paths = list(adapter.modules)
    for name in ("rank_pattern", "alpha_pattern"):
        table = config.get(name) or {}
        with under(name):
            used = {*first_matches(table, paths)}
            unused = [key for number, key in enumerate(table) if number not in used and key not in paths]
            idle = [key for key in unused if first_matches([key], paths) == [None] * len(paths)]
        if idle:
            text = f"{name}: {listed(idle, 'key')} matches no module of the adapter, so it says nothing"
            level = SUSPICIOUS if len(idle) == len(table) else NOTE  # a list for many models may have keys of others
            yield Finding(level, f"{name.replace('_', '-')}-idle", text)


def _missing(
    adapter: AdapterFile, model: ModelHeaders, landing: Landing, config: Mapping[str, Any]
) -> Iterator[Finding]:
    """Yield the modules of the model that target_modules names and the file lacks."""
    rename = renamed(landing)
    in_model = [path for path in model.modules if _can_have_adapter(path, adapter, model)]
    own = [rename(path) for path in in_model]
    named = _named(config, own)
    places = {*landing.places.values()}
    lacking = [path for path, is_named in zip(in_model, named, strict=True) if is_named and path not in places]
    if config.get("target_modules") == "all-linear":  # of the rest it is not known what is a linear layer
        kinds = {kind_of(path) for path in places}
        lacking = [path for path in lacking if kind_of(path) in kinds]
    if not lacking or not landing.places:
        return
    seeing = [path for path in lacking if SIGHT.search(path)]
    if len(seeing) == len(lacking) and not any(SIGHT.search(path) for path in places):
        text = (
            f"target_modules also names {counted(len(seeing), 'module')} of the part that sees, which have no adapter"
        )
        yield Finding(NOTE, "target-missing-in-vision", text, tuple(seeing))
        return
    text = (
        f"target_modules names {counted(len(lacking), 'module')} of the model of which the file has no tensors "
        f"({_by_kind(lacking)}): {listed(lacking)}"
    )
    yield Finding(SUSPICIOUS, "target-missing", text, tuple(lacking))


def _can_have_adapter(path: str, adapter: AdapterFile, model: ModelHeaders) -> bool:
    """Return whether a module is one that PEFT would see: experts are arrays there, and some layers are not built."""
    if EXPERT.search(path) and not any(re.search(r"\.experts\.\d+\.", own) for own in adapter.modules):
        return False
    if path.startswith("mtp.") or path.rpartition(".")[2] in ("gate", "router"):
        return any(own.endswith(path.rpartition(".")[2]) for own in adapter.modules)
    sizes = [model.config, model.config.get("text_config")]
    depth = next(
        (s["num_hidden_layers"] for s in sizes if isinstance(s, dict) and type(s.get("num_hidden_layers")) is int), None
    )
    number = BODY.search(path)
    return SIGHT.search(path) is not None or depth is None or number is None or int(number[1]) < depth


def _by_kind(paths: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for path in paths:
        counts[kind_of(path)] = counts.get(kind_of(path), 0) + 1
    return ", ".join(f"{kind} in {count}" for kind, count in counts.items())


def _parameters(adapter: AdapterFile, model: ModelHeaders, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield the arrays that target_parameters names and the file lacks."""
    names = config.get("target_parameters") or []
    having = [path for path, module in adapter.modules.items() if module.kind == "experts"]
    idle = [name for name in names if not any(path == name or path.endswith(f".{name}") for path in having)]
    if idle:
        text = (
            f"target_parameters names {listed(idle, 'array')}, and the file has no tensors of it: the experts are "
            f"not adapted"
        )
        yield Finding(WRONG, "target-parameters-missing", text, tuple(idle))
    mixtures = any(EXPERT.search(path) for path in [*model.modules, *model.arrays])
    if mixtures and not names and not any(EXPERT.search(path) for path in adapter.modules):
        shared = any("shared_expert" in path for path in adapter.modules)
        text = "the model has experts, and the adapter changes none of them" + (
            ": of the MLPs the shared expert alone" if shared else ""
        )
        yield Finding(NOTE, "experts-untouched", text)


def _mlx(adapter: AdapterFile, model: ModelHeaders | None, landing: Landing | None) -> Iterator[Finding]:
    """Yield what mlx-lm's configuration names and the file lacks: the last `num_layers` layers have adapters."""
    config = adapter.config or {}
    settings = config.get("lora_parameters")
    keys = settings.get("keys") if isinstance(settings, dict) else None
    layers = sorted({int(n) for path in adapter.modules for n in BODY.findall(path)})
    wanted = config.get("num_layers")
    if isinstance(keys, list) and layers:
        expected = [f"layers.{n}.{key}" for n in layers for key in keys if isinstance(key, str)]
        having = {path[path.find("layers.") :] for path in adapter.modules}
        lacking = [name for name in expected if name not in having]
        if lacking:
            text = (
                f"lora_parameters.keys names {counted(len(lacking), 'module')} of which there are no tensors: "
                f"{listed(lacking)}"
            )
            yield Finding(SUSPICIOUS, "target-missing", text, tuple(lacking))
    if model is not None and type(wanted) is int and wanted > 0 and layers:
        depth = 1 + max((int(n) for path in model.modules for n in BODY.findall(path)), default=-1)
        if len(layers) < min(wanted, depth):
            text = f"num_layers is {wanted}, and there are adapters in {counted(len(layers), 'layer')}"
            yield Finding(SUSPICIOUS, "layers-missing", text)
        elif len(layers) > wanted:
            text = f"num_layers is {wanted}, and there are adapters in {len(layers)}: mlx-lm passes over the others"
            yield Finding(SUSPICIOUS, "layers-ignored", text)
    yield from _gaps(adapter, model, landing)


def _gaps(adapter: AdapterFile, model: ModelHeaders | None, landing: Landing | None) -> Iterator[Finding]:
    """Yield kinds of modules of which a layer between two others is missing, where no configuration explains it."""
    if model is None or landing is None:
        return
    order: dict[str, list[str]] = {}
    for path in model.modules:
        if BODY.search(path):
            order.setdefault(kind_of(path), []).append(path)
    places, lacking = {*landing.places.values()}, []
    for paths in order.values():
        paths.sort(key=lambda path: [int(n) for n in BODY.findall(path)])
        present = [i for i, path in enumerate(paths) if path in places]
        if len(present) * 2 > len(paths):
            lacking += [path for path in paths[present[0] : present[-1]] if path not in places]
    if lacking:
        text = f"{counted(len(lacking), 'module')} between others of its kind without tensors: {listed(lacking)}"
        yield Finding(SUSPICIOUS, "target-missing", text, tuple(lacking))
