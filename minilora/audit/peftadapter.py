"""An adapter as PEFT names it: ``base_model.model.PATH.lora_A.weight``, beside an adapter_config.json or alone.

    scaling = alpha / r, or alpha / sqrt(r) with use_rslora       r and alpha by rank_pattern and alpha_pattern

A name that PEFT would pass over is read all the same, and said to be wrong: PEFT itself reports it to nobody.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checks import FileRefused, named, reading, short
from ..files.experts import B_LAYOUTS, WRAPPED, modules_with_arrays, nested_paths
from ..files.patterns import first_matches, within_time
from ..files.peft import PREFIX, natural
from ..variants.scaling import scaling
from .adapterfile import AdapterFile, Module
from .findings import NOTE, SUSPICIOUS, WRONG, Finding, counted, have, listed
from .tensors import Tensors

KEY = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<name>(?!weight$|bias$)[^.]+))?(?:\.(?P<end>weight|bias))?",
    re.DOTALL,
)
SAVED = re.compile(r"(?P<path>.+?)(?:\.modules_to_save(?:\.(?!weight$|bias$)[^.]+)?)?\.(?P<end>weight|bias)", re.DOTALL)
TOKENS = "trainable_tokens"
DEFAULT_RANK, DEFAULT_ALPHA = 8, 8.0
"""PEFT's own, where the configuration has none."""


@dataclass(frozen=True)
class _Names:
    """What the names of a file's tensors say."""

    parts: dict[str, dict[str, str]]  # of each module
    embeddings: set[str]  # the modules with an embedding's factors
    saved: dict[str, str]
    base_copies: dict[str, str]
    findings: list[Finding]


def read_peft(path: Path, tensors: Tensors, config: Mapping[str, Any] | None, config_path: Path | None) -> AdapterFile:
    """Return the adapter in a file with PEFT's names."""
    names = _names(tensors, strict=config is not None)
    findings, modules = names.findings, {}
    places, more = _places(config or {}, names.parts)
    findings += more
    for place, parts in names.parts.items():
        module, is_parameter = places.get(place, (place, False))
        modules[module] = Module(module, parts, _kind(tensors, parts, place in names.embeddings, is_parameter))
    if config is not None and config_path is not None:
        modules = _configured(config, config_path, modules, findings)
        modules = {p: _with_experts(m, tensors, config, findings) for p, m in modules.items()}
    modules = {module: modules[module] for module in sorted(modules, key=natural)}
    format = "a file with PEFT's names and no configuration" if config is None else "a PEFT folder"
    return AdapterFile(
        path, format, tensors, modules, config, config_path, names.saved, names.base_copies, tuple(findings)
    )


def _names(tensors: Tensors, *, strict: bool) -> _Names:
    """Sort the tensors by what their names say."""
    parts: dict[str, dict[str, str]] = {}
    names = _Names(parts, set(), {}, {}, [])
    without_prefix, with_name, without_end, twice, unknown, double = [], [], [], [], [], []
    for key in tensors.shapes:
        bare = key.removeprefix(PREFIX)
        if bare == key:
            without_prefix.append(key)
        while bare.startswith(PREFIX):
            double.append(key)
            bare = bare.removeprefix(PREFIX)
        match = KEY.fullmatch(bare)
        if match is None:
            if not _sort_saved(bare, key, names):
                unknown.append(key)
            continue
        if match["name"]:
            with_name.append(key)
        if match["part"] in ("lora_A", "lora_B") and match["end"] is None:
            without_end.append(key)
        part = match["part"].removeprefix("lora_").removeprefix("embedding_")
        part = {"magnitude_vector": "magnitude"}.get(part, "bias" if match["end"] == "bias" else part)
        if "embedding" in match["part"]:
            names.embeddings.add(match["path"])
        if part in parts.setdefault(match["path"], {}):
            twice.append(key)
        parts[match["path"]][part] = key
    n = names.findings
    first = next((word for word in ("module.", "_orig_mod.") if all(k.startswith(word) for k in without_prefix)), "")
    wrapped = f" ({first!r} of a wrapped model stands before it)" if first else ""
    if without_prefix and strict:
        n.append(
            Finding(
                WRONG, "prefix-missing",
                f"{counted(len(without_prefix), 'tensor')} without the prefix {PREFIX!r}, which PEFT passes over "
                f"without an error{wrapped}: {listed(without_prefix, 'tensor')}", tuple(without_prefix),
            )
        )  # fmt: skip
    if double:
        n.append(
            Finding(
                WRONG, "prefix-doubled",
                f"the prefix {PREFIX!r} stands twice, so the modules are not found: {listed(double, 'tensor')}",
                tuple(double),
            )
        )  # fmt: skip
    if with_name:
        n.append(
            Finding(
                WRONG, "adapter-name-in-keys",
                "the names still have the adapter's own name in them, as in a model's state and not as PEFT saves it; "
                f"PEFT passes over them: {listed(with_name, 'tensor')}", tuple(with_name),
            )
        )  # fmt: skip
    if without_end and strict:
        text = f"the names do not end with '.weight', so PEFT passes over them: {listed(without_end, 'tensor')}"
        n.append(Finding(WRONG, "weight-missing", text, tuple(without_end)))
    if twice:
        n.append(Finding(WRONG, "part-twice", f"the same part of a module stands twice: {listed(twice, 'tensor')}"))
    if unknown:
        n.append(
            Finding(
                SUSPICIOUS, "unknown-tensors",
                f"{counted(len(unknown), 'tensor')} that no reader of LoRA knows: {listed(unknown, 'tensor')}",
                tuple(unknown),
            )
        )  # fmt: skip
    return names


def _sort_saved(bare: str, key: str, names: _Names) -> bool:
    """Put a tensor that is no factor where it belongs; return whether it belongs anywhere."""
    if TOKENS in bare or bare.endswith("token_adapter.base_layer.weight"):
        names.saved[bare] = key
        return True
    match = SAVED.fullmatch(bare)
    if match is None or ".lora_" in bare:
        return False
    module = match["path"]
    if module.endswith(WRAPPED) and match["end"] == "weight":
        names.base_copies[module.removesuffix(WRAPPED)] = key
    else:
        names.saved[f"{module.removesuffix(WRAPPED)}.{match['end']}"] = key
    return True


def _kind(tensors: Tensors, parts: Mapping[str, str], embedding: bool, is_parameter: bool) -> str:
    if is_parameter:
        return "experts"
    axes = max((len(tensors.shapes[name]) for part, name in parts.items() if part in "AB"), default=2)
    return "embedding" if embedding else "conv" if axes > 2 else "linear"


def _places(config: Mapping[str, Any], parts: Mapping[str, Any]) -> tuple[dict[str, tuple[str, bool]], list[Finding]]:
    """Return the array whose adapter stands at a place, for the arrays that target_parameters names.

    Of two arrays of a module the first one's adapter lies one layer deeper: see `minilora.files.experts`.
    """
    targets = config.get("target_parameters") or []
    paths: dict[str, tuple[str, bool]] = {}
    unclear = []
    for module, arrays, depths in modules_with_arrays(parts, targets):
        if sorted(depths) != list(range(len(arrays))):
            unclear.append(module)
            continue
        paths |= {place: (f"{module}.{name}", True) for name, place in nested_paths(module, arrays).items()}
    if not unclear:
        return paths, []
    text = (
        f"the factors of {listed(unclear)} are not those of the arrays that target_parameters names there: "
        f"{short(targets)}"
    )
    return paths, [Finding(WRONG, "target-parameters", text, tuple(unclear))]


def _configured(
    config: Mapping[str, Any], path: Path, modules: Mapping[str, Module], findings: list[Finding]
) -> dict[str, Module]:
    """Return the modules with rank, alpha and scaling as the configuration has them."""
    r, alpha = config.get("r"), config.get("lora_alpha")
    if alpha is None:
        text = "there is no lora_alpha: PEFT takes its default, 8, and other readers take 0, 1, 16 or the rank"
        findings.append(Finding(SUSPICIOUS, "alpha-missing", text))
    if r is None:
        findings.append(Finding(SUSPICIOUS, "rank-missing", "there is no r: PEFT takes its default, 8"))
    tables: dict[str, dict[str, Any]] = {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    root = config.get("use_rslora") is True
    paths = list(modules)
    values: dict[str, list[Any]] = {}
    try:
        with reading(path), within_time():
            for name, table in tables.items():
                with named(name):
                    numbers, entries = first_matches(table, paths), list(table.values())
                values[name] = [
                    table.get(p) if number is None else entries[number]
                    for p, number in zip(paths, numbers, strict=True)
                ]
    except FileRefused as error:
        findings.append(Finding(WRONG, "pattern-not-read", str(error)))
        values = {name: [None] * len(paths) for name in tables}
    configured = {}
    wrong: set[str] = set()
    for i, module in enumerate(paths):
        rank = _integer(values["rank_pattern"][i], _integer(r, DEFAULT_RANK if r is None else None))
        a = _number(values["alpha_pattern"][i], _number(alpha, DEFAULT_ALPHA if alpha is None else None))
        s = None
        if rank is not None and a is not None:
            s = scaling(a, rank, use_rslora=root)
        if a == 0:
            wrong.add(module)
        configured[module] = replace(modules[module], rank=rank, alpha=a, scaling=s)
    if wrong:
        text = f"alpha is 0, so the adapter of {listed(sorted(wrong))} does nothing"
        findings.append(Finding(WRONG, "alpha-zero", text, tuple(sorted(wrong))))
    return configured


def _integer(value: Any, default: int | None) -> int | None:
    return value if type(value) is int and value > 0 else default if value is None else None


def _number(value: Any, default: float | None) -> float | None:
    return float(value) if type(value) in (int, float) else default if value is None else None


def _with_experts(module: Module, tensors: Tensors, config: Mapping[str, Any], findings: list[Finding]) -> Module:
    """Return a mixture's array with the number of its experts, which the rows of A say beside the rank."""
    if module.kind != "experts":
        return module
    A, _ = module.shapes(tensors)
    grouped = B_LAYOUTS.get(str(config.get("lora_B_layout")), False)
    if A is None or module.rank is None or len(A) != 2 or A[0] % module.rank:
        if A is not None and module.rank is not None:
            text = (
                f"lora_A of {short(module.path)} has {A[0]} rows, expected as many for each expert: r is {module.rank}"
            )
            findings.append(Finding(WRONG, "rank-differs", text, (module.path,)))
        return module
    return replace(module, experts=A[0] // module.rank, grouped=grouped)


def own_findings(file: AdapterFile, in_model: Collection[str]) -> Iterator[Finding]:
    """Yield what a configuration contradicts in its own file; `in_model` are the paths of the model's modules."""
    config = file.config or {}
    dora = config.get("use_dora") is True
    lacking = [m.path for m in file.modules.values() if "magnitude" not in m.parts and m.kind != "experts"]
    having = [m.path for m in file.modules.values() if "magnitude" in m.parts]
    if dora and lacking:
        text = f"use_dora is true, and there is no lora_magnitude_vector of {listed(lacking)}"
        yield Finding(WRONG, "magnitude-missing", text, tuple(lacking))
    if having and not dora:
        they = f"{listed(having)} {have(having)}"
        text = f"use_dora is not true, and {they} a lora_magnitude_vector, which PEFT passes over then"
        yield Finding(WRONG, "magnitude-ignored", text, tuple(having))
    biased = [m.path for m in file.modules.values() if "bias" in m.parts]
    unbiased = [m.path for m in file.modules.values() if "bias" not in m.parts and m.kind == "linear"]
    if config.get("lora_bias") is True and unbiased:
        text = f"lora_bias is true, and there is no lora_B.bias of {listed(unbiased)}"
        yield Finding(WRONG, "bias-missing", text, tuple(unbiased))
    if biased and config.get("lora_bias") is not True:
        text = f"lora_bias is not true, and {listed(biased)} {have(biased)} a lora_B.bias, which PEFT passes over then"
        yield Finding(WRONG, "bias-ignored", text, tuple(biased))
    yield from _saved_findings(file, config, in_model)


def _saved_findings(file: AdapterFile, config: Mapping[str, Any], in_model: Collection[str]) -> Iterator[Finding]:
    """Yield what is said of modules trained in full and trained biases, and not so in the file."""
    wanted = config.get("modules_to_save") or []
    weights = [path.removesuffix(".weight") for path in file.saved if path.endswith(".weight")]
    missing = [name for name in wanted if not any(_is_of(path, name) for path in file.saved)]
    # PEFT names the heads that any classifier may have, "classifier" and "score"; each model has one of them.
    lost = [n for n in missing if len(missing) == len(wanted) or any(_is_of(f"{p}.", n) for p in in_model)]
    if lost:
        text = f"modules_to_save names {listed(lost)}, and the file has no tensor of it: what was trained is lost"
        yield Finding(WRONG, "saved-missing", text, tuple(lost))
    strangers = [path for path in weights if not any(_is_of(f"{path}.weight", name) for name in wanted)]
    embeddings = [path for path in strangers if path.rpartition(".")[2] in ("embed_tokens", "lm_head", "wte", "score")]
    tokens = [path for path in file.saved if TOKENS in path or "token_adapter" in path]
    others = [path for path in strangers if path not in embeddings and f"{path}.weight" not in tokens]
    if embeddings:
        text = (
            f"{listed(embeddings)} stands beside the adapter as a whole, as PEFT saves it where the vocabulary was "
            "resized or an embedding adapted: a reader must take it in the place of the base's"
        )
        yield Finding(NOTE, "embeddings-beside", text, tuple(embeddings))
    if wanted and len(missing) < len(wanted):
        text = (
            f"trained in full (modules_to_save): {listed([n for n in wanted if n not in missing])}; a reader of "
            f"factors alone leaves it out"
        )
        yield Finding(NOTE, "modules-to-save", text, tuple(wanted))
    if tokens:
        text = f"trained rows of an embedding (trainable_token_indices): {listed(tokens)}; few readers take them"
        yield Finding(NOTE, "token-rows", text, tuple(tokens))
    if config.get("trainable_token_indices") and not tokens:
        text = "trainable_token_indices names rows of an embedding, and the file has none: what was trained is lost"
        yield Finding(WRONG, "token-rows-missing", text)
    if others:
        text = f"modules_to_save does not name {listed(others)}, whose whole weight is in the file: PEFT passes over it"
        yield Finding(WRONG, "saved-ignored", text, tuple(others))
    biases = [path for path in file.saved if path.endswith(".bias")]
    biases = [path for path in biases if not any(_is_of(path, name) for name in wanted)]
    if biases and config.get("bias") in (None, "none"):
        text = f'bias is "none", and the file has {listed(biases, "bias")}: PEFT passes over trained biases then'
        yield Finding(WRONG, "trained-bias-ignored", text, tuple(biases))


def _is_of(tensor: str, name: str) -> bool:
    """Return whether a tensor is of a module that modules_to_save names: itself, or something inside it.

    A name is the end of a path, so "norm" names post_attention_layernorm as well: PEFT asks ``path.endswith(name)``.
    """
    return f"{name}." in tensor
