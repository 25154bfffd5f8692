"""Rules that compare a file's tensors with its configuration: modules, magnitudes, biases, fully trained weights.

PEFT adapts what `target_modules` names and silently ignores the tensors of any other module. So the rules report both
directions: tensors that PEFT would not load, and modules that the configuration names but the file lacks.

A kind of module is the last part of its path, such as "q_proj". The kinds of a mixture's experts, of its shared expert,
and of a vision encoder are counted separately.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..files.patterns import compiled, exclusions, first_matches, within_time
from ..files.placement import MULTIMODAL
from ..texts import FileRefused, named, reading, short
from .findings import NOTE, SUSPICIOUS, WRONG, Finding, about, counted, listed
from .formats import TRAINABLE_TOKENS
from .headers import AdapterFile, ModelHeaders
from .landing import BODY, CONVERTED, EXPERT, Landing, to_adapter

Rule = Callable[[AdapterFile, Landing | None], Iterator[Finding]]
EMBEDDINGS = (
    "embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "token_type_embeddings", "lm_head",
)  # fmt: skip


# --- how many of each kind ---


@dataclass(frozen=True)
class Coverage:
    """The number of modules of one kind that the model has, and of those that the adapter changes."""

    name: str
    adapted: int
    total: int


def module_kind(path: str) -> str:
    """Return the kind that a module is counted under."""
    last = path.rpartition(".")[2]
    if EXPERT.search(path):
        return f"experts' {last}"
    if "shared_expert" in path:
        return f"shared expert's {last}"
    return f"vision's {last}" if MULTIMODAL.search(path) else last


def coverage(adapter: AdapterFile, landing: Landing | None) -> list[Coverage]:
    """Return the coverage of each kind of module; all experts of a layer count as one."""
    adapted: dict[str, set[str]] = {}
    if landing is None:
        for path in adapter.modules:
            adapted.setdefault(module_kind(path), set()).add(_layer_of(path))
        return [Coverage(name, len(paths), 0) for name, paths in adapted.items()]
    total: dict[str, set[str]] = {}
    for path in landing.model.paths:
        if BODY.search(path) or path.rpartition(".")[2] in EMBEDDINGS:
            total.setdefault(module_kind(path), set()).add(_layer_of(path))
    wrong = {path for path, (level, *_) in landing.misnamed.items() if level == WRONG}
    for own, path in landing.places.items():
        for kind in _kinds(path, total) if own not in wrong else ():
            adapted.setdefault(kind, set()).add(_layer_of(path))
    kinds = [
        Coverage(name, len(adapted.get(name, ())), len(total.get(name, adapted.get(name, ()))))
        for name in {**total, **adapted}
    ]
    return sorted(kinds, key=lambda kind: kind.adapted == 0)


def _kinds(path: str, total: Mapping[str, Any]) -> list[str]:
    """Return the model's kinds that a module changes: the model may store gate_up_proj as two modules."""
    kind = module_kind(path)
    if kind in total:
        return [kind]
    parts = {"experts' gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"), "experts' down_proj": ("down_proj", "w2")}
    return [name for part in parts.get(kind, ()) if (name := f"experts' {part}") in total] or [kind]


def _layer_of(path: str) -> str:
    """Return a path without the expert's number, which all experts of a layer share."""
    return EXPERT.sub(".experts.", path.rpartition(".")[0] + ".")


# --- magnitudes and biases of the adapter ---


def magnitudes(adapter: AdapterFile, landing: Landing | None) -> Iterator[Finding]:
    """Find magnitudes that the configuration does not announce, and magnitudes that are missing."""
    dora, modules = adapter.get("use_dora") is True, adapter.modules.values()
    lacking = [m.path for m in modules if "magnitude" not in m.parts and m.kind != "experts"]
    having = [m.path for m in modules if "magnitude" in m.parts]
    text = "use_dora is true, but the file has no lora_magnitude_vector for {names}"
    yield from about(WRONG, "magnitude-missing", text, lacking if dora else ())
    text = "use_dora is not true, so PEFT ignores the lora_magnitude_vector of {names}"
    yield from about(WRONG, "magnitude-ignored", text, having if not dora else ())


def adapter_biases(adapter: AdapterFile, landing: Landing | None) -> Iterator[Finding]:
    """Find biases of lora_B that the configuration does not announce, and biases that are missing."""
    setting = adapter.get("lora_bias") is True
    linear = [m.path for m in adapter.modules.values() if m.kind == "linear" and "bias" not in m.parts]
    having = [m.path for m in adapter.modules.values() if "bias" in m.parts]
    text = "lora_bias is true, but the file has no lora_B.bias for {names}"
    yield from about(WRONG, "bias-missing", text, linear if setting else ())
    text = "lora_bias is not true, so PEFT ignores the lora_B.bias of {names}"
    yield from about(WRONG, "bias-ignored", text, having if not setting else ())


# --- fully trained weights ---


def saved(adapter: AdapterFile, landing: Landing | None) -> Iterator[Finding]:
    """Find modules that modules_to_save names but the file lacks, and full weights that are in the file."""
    wanted = adapter.get("modules_to_save", [])
    in_model = landing.model.modules if landing is not None else ()
    missing = [name for name in wanted if not any(_belongs_to(path, name) for path in adapter.saved)]
    # PEFT names both heads that a classifier may have, "classifier" and "score"; each model has only one of them.
    lost = [n for n in missing if len(missing) == len(wanted) or any(_belongs_to(f"{p}.", n) for p in in_model)]
    text = "modules_to_save names {names}, but the file has no tensor for it: that training is lost"
    yield from about(WRONG, "saved-missing", text, lost)
    weights = [path for path in adapter.saved if path.endswith(".weight") and not _is_token(path)]
    others = [path.removesuffix(".weight") for path in weights if not any(_belongs_to(path, name) for name in wanted)]
    ends = ("embed_tokens", "lm_head", "wte", "score")
    text = (
        "the file has the full weight of {names}, which PEFT saves if the vocabulary was resized or an embedding "
        "adapted: a reader must use it instead of the base's"
    )
    yield from about(NOTE, "embeddings-beside", text, [p for p in others if p.rpartition(".")[2] in ends])
    if there := [name for name in wanted if name not in missing]:
        text = f"fully trained (modules_to_save): {listed(there)}; a reader that loads only the factors drops it"
        yield Finding(NOTE, "modules-to-save", text, tuple(wanted))
    text = "modules_to_save does not name {names}, whose full weight is in the file: PEFT ignores it"
    yield from about(WRONG, "saved-ignored", text, [p for p in others if p.rpartition(".")[2] not in ends])


def tokens(adapter: AdapterFile, landing: Landing | None) -> Iterator[Finding]:
    """Find fully trained rows of an embedding."""
    there = [path for path in adapter.saved if _is_token(path)]
    text = "trained rows of an embedding (trainable_token_indices): {names}; few readers support them"
    yield from about(NOTE, "token-rows", text, there)
    if adapter.get("trainable_token_indices") and not there:
        text = "trainable_token_indices names rows of an embedding, but the file has none: that training is lost"
        yield Finding(WRONG, "token-rows-missing", text)


def biases(adapter: AdapterFile, landing: Landing | None) -> Iterator[Finding]:
    """Find trained biases of the base that the configuration does not announce, and biases that are missing."""
    wanted, setting = adapter.get("modules_to_save", []), adapter.get("bias", "none")
    having = [path for path in adapter.saved if path.endswith(".bias")]
    if setting == "none":
        strange = [path for path in having if not any(_belongs_to(path, name) for name in wanted)]
        text = 'bias is "none", so PEFT ignores the trained biases in the file: {names}'
        yield from about(WRONG, "trained-bias-ignored", text, strange, "tensor")
    if setting in ("all", "lora_only") and landing is not None and not having:
        lost = [path for path in landing.places.values() if landing.model.bias(path) is not None]
        text = "bias is {setting!r}, but the file has no bias for {names}: that training is lost"
        yield from about(WRONG, "trained-bias-missing", text, lost, setting=setting)


def _belongs_to(tensor: str, name: str) -> bool:
    """Return whether a name in modules_to_save covers a tensor: PEFT accepts it anywhere in the path."""
    return f"{name}." in tensor


def _is_token(path: str) -> bool:
    return TRAINABLE_TOKENS in path or "token_adapter" in path


# --- targets ---


def are_targets(config: Mapping[str, Any], paths: list[str]) -> list[bool]:
    """Return for each path whether PEFT would adapt that module, by the rules of its `check_target_module_exists`."""
    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    targets, excludes, layers, pattern = (config.get(key) for key in keys)
    linear = [path.rpartition(".")[2] not in EMBEDDINGS for path in paths]
    layers = [] if layers is None else layers
    out = {path for _, path in exclusions(paths, linear, targets or [], excludes or [], layers, pattern or [])}
    with named("modules_to_save"):
        whole = _are_whole(config.get("modules_to_save") or [], paths)
    return [path not in out and not is_whole for path, is_whole in zip(paths, whole, strict=True)]


def _are_whole(names: Iterable[str], paths: list[str]) -> list[bool]:
    """Return for each path whether `modules_to_save` names the module or one that contains it."""
    words = {name for name in names if name.isidentifier()}  # most names need no pattern, and a set is fast
    patterns = [compiled(rf"(^|.*\.){name}($|\..*)", name) for name in names if name not in words]
    return [not words.isdisjoint(path.split(".")) or any(p.match(path) for p in patterns) for path in paths]


def by_targets(adapter: AdapterFile, landing: Landing | None) -> Iterator[Finding]:
    """Apply the rules in `TARGET_RULES`; report expressions that are invalid or run for too long."""
    assert adapter.config is not None
    assert adapter.config_path is not None
    if not adapter.get("target_modules") and not adapter.get("target_parameters"):
        text = "target_modules is missing: PEFT uses its default for the architecture"
        yield from about(SUSPICIOUS, "targets-missing", text, adapter.modules)
        return
    try:
        with reading(adapter.config_path), within_time():
            findings = [finding for rule in TARGET_RULES for finding in rule(adapter, adapter.config, landing)]
    except FileRefused as error:
        findings = [Finding(WRONG, "targets-not-read", str(error))]
    yield from findings


def no_targets(adapter: AdapterFile, config: Mapping[str, Any], landing: Landing | None) -> Iterator[Finding]:
    """Find modules that have tensors but are not targets."""
    own = [path for path, module in adapter.modules.items() if module.kind != "experts"]
    targets = config.get("target_modules")
    strangers = [path for path, is_target in zip(own, are_targets(config, own), strict=True) if not is_target]
    why = ""
    if isinstance(targets, str) and "," in targets:
        why = ", since a string is a regular expression, not a list"
    elif any(_are_whole(config.get("modules_to_save") or [], strangers)):
        why = ", since a module in modules_to_save is not a target"
    text = "PEFT ignores tensors that target_modules ({targets}) does not name{why}: {names}"
    yield from about(WRONG, "not-a-target", text, strangers, targets=short(targets, 80), why=why)


def idle_patterns(adapter: AdapterFile, config: Mapping[str, Any], landing: Landing | None) -> Iterator[Finding]:
    """Find keys of rank_pattern and alpha_pattern that match no module."""
    paths = list(adapter.modules)
    for name in ("rank_pattern", "alpha_pattern"):
        table = config.get(name) or {}
        with named(name):
            idle = [key for key in table if key not in paths and not any(n == 0 for n in first_matches([key], paths))]
        level = SUSPICIOUS if len(idle) == len(table) else NOTE  # a table for several models may have keys of others
        text = f"{name}: no module of the adapter matches {{names}}"
        yield from about(level, f"{name.replace('_', '-')}-idle", text, idle, "key")


def missing_targets(adapter: AdapterFile, config: Mapping[str, Any], landing: Landing | None) -> Iterator[Finding]:
    """Find modules of the model that target_modules names but the file lacks."""
    if landing is None or not landing.places:
        return
    in_model = [path for path in landing.model.modules if _can_have_adapter(path, adapter, landing.model)]
    are = are_targets(config, [*map(to_adapter(landing), in_model)])
    places = {*landing.places.values()}
    lacking = [path for path, is_target in zip(in_model, are, strict=True) if is_target and path not in places]
    if config.get("target_modules") == "all-linear":  # the files do not tell which other modules are linear layers
        kinds = {module_kind(path) for path in places}
        lacking = [path for path in lacking if module_kind(path) in kinds]
    if all(MULTIMODAL.search(path) for path in lacking) and not any(MULTIMODAL.search(path) for path in places):
        text = "target_modules also names {count} of the vision encoder without tensors in the file"
        yield from about(NOTE, "target-missing-in-vision", text, lacking)
        return
    shown_kinds = ", ".join(f"{kind} in {count}" for kind, count in Counter(map(module_kind, lacking)).items())
    text = "target_modules names {count} of the model without tensors in the file ({kinds}): {names}"
    yield from about(SUSPICIOUS, "target-missing", text, lacking, kinds=shown_kinds)


def _can_have_adapter(path: str, adapter: AdapterFile, model: ModelHeaders) -> bool:
    """Return whether PEFT would find this module: in transformers experts are arrays, and some layers are not built."""
    if EXPERT.search(path) and not any(re.search(r"\.experts\.\d+\.", own) for own in adapter.modules):
        return False
    if path.startswith("mtp."):  # transformers does not build these
        return False
    if (last := path.rpartition(".")[2]) in ("gate", "router"):
        return any(own.rpartition(".")[2] == last for own in adapter.modules)
    sizes = [model.config, model.config.get("text_config")]
    depths = [s["num_hidden_layers"] for s in sizes if isinstance(s, dict) and type(s.get("num_hidden_layers")) is int]
    number = BODY.search(path)
    return MULTIMODAL.search(path) is not None or not depths or number is None or int(number[1]) < depths[0]


def missing_arrays(adapter: AdapterFile, config: Mapping[str, Any], landing: Landing | None) -> Iterator[Finding]:
    """Find arrays that target_parameters names but the file lacks, and mixtures whose experts are not adapted."""
    if landing is None:
        return
    names = config.get("target_parameters") or []
    having = [path for path, module in adapter.modules.items() if module.kind == "experts"]
    idle = [name for name in names if not any(path == name or path.endswith(f".{name}") for path in having)]
    text = "the experts are not adapted: target_parameters names {names}, but the file has no tensors for it"
    yield from about(WRONG, "target-parameters-missing", text, idle, "array")
    mixtures = any(EXPERT.search(path) for path in landing.model.paths)
    if mixtures and not names and not any(EXPERT.search(path) for path in adapter.modules):
        shared = any("shared_expert" in path for path in adapter.modules)
        only = ", only the shared expert" if shared else ""
        text = f"the model has experts, but the adapter changes none of them{only}"
        yield Finding(NOTE, "experts-untouched", text)


def taken_for_experts(adapter: AdapterFile, config: Mapping[str, Any], landing: Landing | None) -> Iterator[Finding]:
    """Find layers of dense MLPs and shared experts that PEFT loses because it mistakes them for experts' layers."""
    kind = landing.model.config.get("model_type") if landing is not None else None
    if kind not in CONVERTED:
        return
    modules = [path for path, module in adapter.modules.items() if module.kind != "experts" and _is_of_mlp(path)]
    lost = [path for path, is_target in zip(modules, are_targets(config, modules), strict=True) if is_target]
    text = (
        "PEFT 0.21.2 with transformers 5 mistakes gate_proj, up_proj and down_proj of a {kind} for the experts', and "
        "loses the update of {names}, or refuses gate_proj without up_proj: to have it read, name {weight} and so on "
        "in target_parameters instead of target_modules"
    )
    weight = short(f"{lost[0]}.weight") if lost else ""
    yield from about(WRONG, "dense-taken-for-experts", text, lost, kind=kind, weight=weight)


def _is_of_mlp(path: str) -> bool:
    """Return whether a module is named like an expert's layer but is none."""
    return path.rpartition(".")[2] in ("gate_proj", "up_proj", "down_proj") and not EXPERT.search(path)


TARGET_RULES = (no_targets, idle_patterns, missing_targets, missing_arrays, taken_for_experts)


# --- formats other than PEFT's ---


def mlx_magnitudes(adapter: AdapterFile, landing: Landing | None) -> Iterator[Finding]:
    """Find magnitudes that mlx-lm's configuration does not announce, and magnitudes that are missing."""
    kind, modules = adapter.get("fine_tune_type"), adapter.modules.values()
    lacking = [m.path for m in modules if "magnitude" not in m.parts]
    having = [m.path for m in modules if "magnitude" in m.parts]
    text = "fine_tune_type is 'dora', but the file has no m for {names}"
    yield from about(WRONG, "magnitude-missing", text, lacking if kind == "dora" else ())
    text = "fine_tune_type is 'lora', so mlx-lm ignores the m of {names}"
    yield from about(WRONG, "magnitude-ignored", text, having if kind == "lora" else ())


def missing_keys(adapter: AdapterFile, landing: Landing | None) -> Iterator[Finding]:
    """Find modules that mlx-lm's `keys` name, in layers that have adapters, but the file lacks."""
    keys = adapter.get("lora_parameters", {}).get("keys")
    keys = [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []
    expected = [f"layers.{n}.{key}" for n in _layers(adapter) for key in keys]
    having = {path[path.find("layers.") :] for path in adapter.modules}
    text = "lora_parameters.keys names {count} without tensors in the file: {names}"
    yield from about(SUSPICIOUS, "target-missing", text, [name for name in expected if name not in having])


def number_of_layers(adapter: AdapterFile, landing: Landing | None) -> Iterator[Finding]:
    """Find adapters in more or fewer layers than mlx-lm's `num_layers`, which counts from the last layer."""
    wanted, layers = adapter.get("num_layers"), _layers(adapter)
    if landing is None or type(wanted) is not int or wanted <= 0 or not layers:
        return
    depth = 1 + max((int(n) for path in landing.model.modules for n in BODY.findall(path)), default=-1)
    start = f"num_layers is {wanted}, but the file has adapters in"
    if len(layers) < min(wanted, depth):
        yield Finding(SUSPICIOUS, "layers-missing", f"{start} {counted(len(layers), 'layer')}")
    elif len(layers) > wanted:
        yield Finding(SUSPICIOUS, "layers-ignored", f"{start} {len(layers)} layers: mlx-lm ignores the others")


def _layers(adapter: AdapterFile) -> list[int]:
    """Return the indices of the layers that have adapters, in order."""
    return sorted({int(n) for path in adapter.modules for n in BODY.findall(path)})


def gaps(adapter: AdapterFile, landing: Landing | None) -> Iterator[Finding]:
    """Find modules without tensors between two layers that have tensors for the same kind."""
    if landing is None:
        return
    order: dict[str, list[str]] = {}
    for path in landing.model.modules:
        if BODY.search(path):
            order.setdefault(module_kind(path), []).append(path)
    places, lacking = {*landing.places.values()}, []
    for paths in order.values():
        paths.sort(key=lambda path: [int(n) for n in BODY.findall(path)])
        present = [i for i, path in enumerate(paths) if path in places]
        if len(present) * 2 > len(paths):
            lacking += [path for path in paths[present[0] : present[-1]] if path not in places]
    text = "{count} without tensors between adapted layers: {names}"
    yield from about(SUSPICIOUS, "target-missing", text, lacking)


PEFT_RULES = (magnitudes, adapter_biases, saved, tokens, biases, by_targets)
MLX_RULES = (mlx_magnitudes, missing_keys, number_of_layers, gaps)
OTHER_RULES = (gaps,)


def rules_of(adapter: AdapterFile) -> tuple[Rule, ...]:
    """Return the rules for an adapter's format."""
    return PEFT_RULES if adapter.is_peft else MLX_RULES if "MLX" in adapter.format else OTHER_RULES
