"""The formats of adapters: which one a file has, what the names of its tensors mean, and what the scaling is.

    format   the names of A, B                                           the scaling s
    PEFT     base_model.model.PATH.lora_A.weight (r, in), .lora_B        alpha / r, or alpha / sqrt(r) with use_rslora
    MLX      PATH.lora_a (in, r), .lora_b: transposed                    scale
    kohya    lora_unet_PATH_WITH_UNDERSCORES.lora_down.weight, .lora_up  alpha / r, an alpha for each module
    GGUF     blk.0.attn_q.weight.lora_a (r, in), .lora_b                 adapter.lora.alpha / r

A reader takes what it can, and says what is wrong with the rest: unlike `minilora.load_adapter`, which refuses the
whole. A name that PEFT would pass over is read all the same, and said to be wrong: PEFT itself reports it to nobody.

Of kohya's, the model's names tell which dots of a path became underscores. LoHa, LoKr and their like are no two
factors, and are refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..files.disk import read_json
from ..files.expert_adapters import B_LAYOUTS, WRAPPED, modules_with_arrays, nested_paths
from ..files.patterns import within_time
from ..files.peft import CONFIG_NAME, PREFIX, WEIGHTS_NAME, by_pattern, natural
from ..language.files.gguf import from_gguf
from ..texts import FileRefused, hub_hint, reading, short
from ..variants.scaling import scaling
from .findings import NOTE, SUSPICIOUS, WRONG, Finding, found
from .headers import AdapterFile, Module, Tensors, open_tensors

MLX_NAME = "adapters.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NO_PICKLE = "a pickle, which can run code when it is read: save it as safetensors"
MOST_LETTERS, MOST_NAMES = 1000, 1000
"""Letters of a tensor's name, and entries of a list of names in a configuration that are looked up one by one."""
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps a configuration, in the header of the tensors' file."""


def open_adapter(path: Path) -> AdapterFile:
    """Return an adapter, of which the headers alone have been read; what is damaged, or no LoRA, is refused."""
    file = _file(path) if os.path.isdir(path) else path
    if file.suffix in PICKLES:
        raise FileRefused(file, NO_PICKLE)
    tensors = open_tensors(file)
    if (longest := max(tensors.shapes, key=len, default="")) and len(longest) > MOST_LETTERS:
        raise FileRefused(file, f"the name {short(longest)} has {len(longest):,} letters: no module has such a path")
    if tensors.weights is None:
        return _read_gguf(file, tensors)
    _refuse_other_kinds(file, tensors.shapes)
    config_path: Path = file.parent / CONFIG_NAME
    config = read_json(config_path) if os.path.exists(config_path) else None
    for opened in tensors.weights.files:
        opened.file.check_unchanged(opened.path)  # so the two files are of one save
    config, findings = (None, []) if config is None else _typed(config_path, config)
    ends = {name.rpartition(".")[2] for name in tensors.shapes}
    if ends & {"lora_a", "lora_b"} or (file.name == MLX_NAME and (config or {}).get("fine_tune_type")):
        adapter = _read_mlx(path, tensors, config, config_path)
    elif any("lora_down" in name or "lora_up" in name or ".lora.down" in name for name in tensors.shapes):
        return _read_kohya(path, tensors)
    else:
        if config is None and (config := _in_metadata(tensors.notes)) is not None:
            config_path, (config, findings) = file, _typed(file, config)
        elif config is not None and config.get("peft_type") not in (None, "LORA"):
            what = f"peft_type is {short(config['peft_type'])}, which is no LoRA: it is not looked at"
            raise FileRefused(config_path, what)
        adapter = _read_peft(path, tensors, config, config_path)
    return replace(adapter, findings=(*adapter.findings, *findings))


def _file(folder: Path) -> Path:
    """Return the file of a folder that holds the adapter's tensors."""
    for name in (WEIGHTS_NAME, f"{WEIGHTS_NAME}.index.json", MLX_NAME):
        if os.path.exists(folder / name):
            return folder / name
    for name in ("adapter_model.bin", "pytorch_lora_weights.bin"):
        if os.path.exists(folder / name):
            raise FileRefused(folder / name, NO_PICKLE)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")])
    if len(files) == 1:
        return files[0]
    names = ", ".join(short(file.name) for file in files[:5]) or "none of these"
    if below := [config.parent.name for config in sorted(folder.glob(f"*/{CONFIG_NAME}"))[:5]]:
        names += f", and its folder {', '.join(map(short, below))} holds one"
    expected = f"expected {WEIGHTS_NAME}, {MLX_NAME}, or one .safetensors or .gguf file"
    raise FileRefused(folder, f"{expected}: it has {names}{hub_hint(folder)}")


# --- a configuration ---

TYPES: dict[str, dict[type, Any]] = {
    "target_modules": {list: str, str: ""}, "exclude_modules": {list: str, str: ""},
    "layers_pattern": {list: str, str: ""}, "target_parameters": {list: str}, "modules_to_save": {list: str},
    "layers_to_transform": {list: int, int: ""}, "rank_pattern": {dict: ""}, "alpha_pattern": {dict: ""},
    "lora_parameters": {dict: ""},
}  # fmt: skip
"""The types of what a configuration has beside numbers and flags; of a list the type of its entries."""
WORDS = {list: "a list", str: "a text", int: "a number", dict: "an object"}


def _typed(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """Return a configuration whose lists are lists and whose tables are tables, and what was not."""
    settings = config.get("lora_parameters")
    lists = {name: config.get(name) for name in ("modules_to_save", "target_parameters", "layers_to_transform")}
    lists["lora_parameters.keys"] = settings.get("keys") if isinstance(settings, dict) else None
    for name, names in lists.items():
        if isinstance(names, list) and len(names) > MOST_NAMES:  # which would take for ever to look up
            raise FileRefused(path, f"{name} has {len(names):,} entries, expected at most {MOST_NAMES:,}")
    typed, wrong = dict(config), []
    for name, kinds in TYPES.items():
        value = config.get(name)
        if value is not None and not isinstance(value, (*kinds,)):
            typed[name] = None
            wrong.append(f"{name} is {short(value)}, expected {' or '.join(WORDS[kind] for kind in kinds)}")
        elif isinstance(value, list):
            typed[name] = [entry for entry in value if isinstance(entry, kinds[list])]
            wrong += [f"{name} has the entry {short(x)}" for x in value if not isinstance(x, kinds[list])][:1]
    return typed, [Finding(WRONG, "config-type", text) for text in wrong]


def _in_metadata(notes: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the configuration that stands in a header; None where there is none that can be read."""
    try:
        config = json.loads(notes.get(METADATA, "null"))
    except (ValueError, TypeError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


# --- the names of tensors ---


@dataclass(frozen=True)
class Names:
    """How a format names the tensors of a module."""

    key: re.Pattern[str]  # with the groups `path` and `part`
    parts: Mapping[str, str]  # ours by theirs
    others: str  # what is said of tensors with other names


MLX = Names(
    re.compile(r"(?P<path>.+)\.(?P<part>lora_a|lora_b|m)", re.S),
    {"lora_a": "A", "lora_b": "B", "m": "magnitude"},
    "{count} that mlx-lm has no place for: {names}",
)
KOHYA = Names(
    re.compile(
        r"(?P<path>.+?)[._](?:lora[._])?(?P<part>lora_down|lora_up|down|up|alpha|dora_scale)(?:\.weight)?", re.S
    ),
    {"lora_down": "A", "down": "A", "lora_up": "B", "up": "B", "alpha": "alpha", "dora_scale": "magnitude"},
    "{count} that no reader of LoRA knows: {names}",
)
GGUF = Names(
    re.compile(r"(?P<path>.*)\.weight\.(?P<part>lora_a|lora_b)", re.S),
    {"lora_a": "A", "lora_b": "B"},
    "{count} that llama.cpp refuses or passes over in an adapter: {names}",
)


def _collected(names: Names, tensors: Tensors) -> tuple[dict[str, dict[str, str]], list[Finding]]:
    """Return the tensors of each module by the part that they are, in the order of layers, and what others are."""
    parts: dict[str, dict[str, str]] = {}
    others = []
    for key in tensors.shapes:
        if (match := names.key.fullmatch(key)) is None:
            others.append(key)
        else:
            parts.setdefault(match["path"], {})[names.parts[match["part"]]] = key
    findings = [*found(SUSPICIOUS, "unknown-tensors", names.others, others, "tensor")]
    return {path: parts[path] for path in sorted(parts, key=natural)}, findings


def _axes(tensors: Tensors, parts: Mapping[str, str]) -> list[int]:
    """Return how many axes each factor has."""
    return [len(tensors.shapes[name]) for part, name in parts.items() if part in "AB"]


def _experts(tensors: Tensors, parts: Mapping[str, str]) -> int:
    """Return E of a mixture's factors, (E, r, in) and (E, out, r); 0 of others."""
    stacked = {*_axes(tensors, parts)} == {3}
    return max(tensors.shapes[name][0] for part, name in parts.items() if part in "AB") if stacked else 0


# --- MLX ---


def _read_mlx(path: Path, tensors: Tensors, config: Mapping[str, Any] | None, config_path: Path) -> AdapterFile:
    """Return the adapter in a file with mlx-lm's names."""
    kind = (config or {}).get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise FileRefused(config_path, f"fine_tune_type is {short(kind)}, which is no LoRA: it is not looked at")
    parts, findings = _collected(MLX, tensors)
    settings = (config or {}).get("lora_parameters") or {}
    rank, scale = settings.get("rank"), settings.get("scale")
    if scale is None and isinstance(settings.get("alpha"), int | float) and isinstance(rank, int) and rank:
        scale = settings["alpha"] / rank  # of older versions
    if config is None:
        text = f"there is no {CONFIG_NAME} beside it: nothing says the scale, which mlx-lm multiplies the update by"
        findings.append(Finding(SUSPICIOUS, "alpha-missing", text))
    elif scale is None:
        text = "lora_parameters has no scale: mlx-lm takes its default of its version, 20 today"
        findings.append(Finding(SUSPICIOUS, "alpha-missing", text))
    elif type(scale) not in (int, float) or scale == 0:
        text = f"scale is {short(scale)}, so the adapter does nothing or does not load: expected a number above 0"
        findings.append(Finding(WRONG, "alpha-zero", text))
    s, r = _number(scale, None), _count(rank, None)
    alpha = None if s is None or r is None else s * r
    modules = {}
    for module, of_it in parts.items():
        E = _experts(tensors, of_it)
        # An embedding's lora_a is (V, r) and its lora_b (r, dim): transposed too, of a matrix (dim, V).
        kind = "experts" if E else "embedding" if module.rpartition(".")[2] in ("embed_tokens", "wte") else "linear"
        bare = Module(module, tensors, of_it, kind, "" if E else "AB", experts=E or 1)
        modules[module] = replace(bare, rank=r, alpha=alpha, scaling=s)
    return AdapterFile(path, "an MLX adapter", tensors, modules, config, config_path, findings=tuple(findings))


# --- kohya ---

OTHER_KINDS = {
    "hada_": "LoHa", "lokr_": "LoKr", "oft_blocks": "OFT", "oft_diag": "OFT", "boft_": "BOFT", "lora_mid": "LoCon in "
    "three factors", "a1.weight": "GLoRA", "on_input": "IA3", "glora_": "GLoRA",
}  # fmt: skip


def _refuse_other_kinds(path: Path, names: Iterable[str]) -> None:
    """Require that no tensor has the name of another kind of adapter than a LoRA of two factors."""
    for name in names:
        last = name.rpartition(".")[2] if not name.endswith(".weight") else ".".join(name.split(".")[-2:])
        kind = next((kind for start, kind in OTHER_KINDS.items() if last.startswith(start)), None)
        if kind is not None:
            raise FileRefused(path, f"{short(name)} is of {kind}, which is no LoRA of two factors: it is not looked at")


def _read_kohya(path: Path, tensors: Tensors) -> AdapterFile:
    """Return the adapter in a file with kohya's names. Without an alpha a module has the rank for it: s is 1."""
    parts, findings = _collected(KOHYA, tensors)
    modules = {}
    for name, of_it in parts.items():
        key = of_it.pop("alpha", None)
        numbers = np.ravel(tensors.read(key)) if key is not None else np.empty(0)
        alpha = float(numbers[0]) if numbers.size == 1 else None
        module = Module(name, tensors, of_it, "conv" if max(_axes(tensors, of_it), default=2) > 2 else "linear")
        r = module.rank_in_file
        modules[name] = replace(module, alpha=alpha, scaling=None if r is None else 1.0 if alpha is None else alpha / r)
    text = "there is no alpha of {names}: most programs take the rank for it, a scaling of 1, and not all"
    has_place = not all(".lora." in key for key in tensors.shapes)  # which the first files of diffusers have not
    without = [name for name, module in modules.items() if module.alpha is None]
    findings += found(SUSPICIOUS if has_place else NOTE, "alpha-missing", text, without)
    findings += _zero_alphas(modules)
    return AdapterFile(path, "a file with kohya's names", tensors, modules, findings=tuple(findings))


def _zero_alphas(modules: Mapping[str, Module]) -> Iterator[Finding]:
    zero = [name for name, module in modules.items() if module.alpha == 0]
    return found(WRONG, "alpha-zero", "alpha is 0, so the adapter of {names} does nothing", zero)


# --- GGUF ---


def _read_gguf(path: Path, tensors: Tensors) -> AdapterFile:
    """Return the adapter in a .gguf file. Where its alpha is 0 or missing, llama.cpp takes s = 1."""
    kind, how, alpha = (tensors.notes.get(k) for k in ("general.type", "adapter.type", "adapter.lora.alpha"))
    if kind != "adapter":
        raise FileRefused(path, f"general.type is {short(kind)}, expected 'adapter': it is a model, or no adapter")
    if how != "lora":
        raise FileRefused(path, f"adapter.type is {short(how)}, expected 'lora'")
    parts, findings = _collected(GGUF, tensors)
    alpha = float(alpha) if isinstance(alpha, int | float) else None
    if not alpha:
        text = f"adapter.lora.alpha is {short(alpha)}: llama.cpp takes a scaling of 1 then, and other readers take 0"
        findings.insert(0, Finding(SUSPICIOUS, "alpha-missing" if alpha is None else "alpha-zero", text))
    modules = {}
    for weight, of_it in parts.items():
        name, E = from_gguf(f"{weight}.weight").removesuffix(".weight"), _experts(tensors, of_it)
        embedding = name in ("model.embed_tokens", "token_embd")  # whose lora_a lies transposed
        kind = "experts" if E else "embedding" if embedding else "linear"
        module = Module(name, tensors, of_it, kind, "A" if kind == "embedding" else "", experts=E or 1, alpha=alpha)
        r = module.rank_in_file
        modules[name] = replace(module, scaling=None if r is None else alpha / r if alpha else 1.0)
    modules = {name: modules[name] for name in sorted(modules, key=natural)}
    return AdapterFile(path, "a GGUF adapter", tensors, modules, findings=tuple(findings))


# --- PEFT ---

KEY = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<name>(?!weight$|bias$)[^.]+))?(?:\.(?P<end>weight|bias))?",
    re.S,
)
PARTS = {
    "lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B", "lora_magnitude_vector": "magnitude"
}  # fmt: skip
SAVED = re.compile(r"(?P<path>.+?)(?:\.modules_to_save(?:\.(?!weight$|bias$)[^.]+)?)?\.(?P<end>weight|bias)", re.S)
TOKENS = "trainable_tokens"
DEFAULT_RANK, DEFAULT_ALPHA = 8, 8.0
"""PEFT's own, where the configuration has none."""
PREFIXES = re.compile(rf"^(?:{re.escape(PREFIX)})*")
MISNAMED: tuple[tuple[str, Callable[[str, re.Match[str] | None], Any], str], ...] = (
    ("prefix-missing", lambda key, _: not key.startswith(PREFIX),
     "{count} without the prefix {prefix!r}, which PEFT passes over without an error{wrapped}: {names}"),
    ("prefix-doubled", lambda key, _: key.startswith(2 * PREFIX),
     "the prefix {prefix!r} stands twice, so the modules are not found: {names}"),
    ("adapter-name-in-keys", lambda _, match: match and match["name"],
     "the names still have the adapter's own name in them, as in a model's state and not as PEFT saves it; PEFT passes "
     "over them: {names}"),
    ("weight-missing", lambda _, match: match and match["part"] in ("lora_A", "lora_B") and not match["end"],
     "the names do not end with '.weight', so PEFT passes over them: {names}"),
)  # fmt: skip
"""Tensors that PEFT passes over: the code, which they are, by the name and what `KEY` says of it, and the text."""
WITH_CONFIG = ("prefix-missing", "weight-missing")
"""Those that are right where there is no configuration, as in files of diffusers."""


def _read_peft(path: Path, tensors: Tensors, config: Mapping[str, Any] | None, config_path: Path) -> AdapterFile:
    """Return the adapter in a file with PEFT's names."""
    matches = {key: KEY.fullmatch(PREFIXES.sub("", key)) for key in tensors.shapes}
    parts: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    copies: dict[str, str] = {}
    twice, others = [], []
    for key, match in matches.items():
        if match is None:
            others += [] if _is_whole(key, saved, copies) else [key]
            continue
        part = PARTS[match["part"]]
        part = "bias" if match["end"] == "bias" and part in "AB" else part
        if part in parts.setdefault(match["path"], {}):
            twice.append(key)
        parts[match["path"]][part] = key
    strangers = [key for key in matches if not key.startswith(PREFIX)]
    first = next((word for word in ("module.", "_orig_mod.") if all(key.startswith(word) for key in strangers)), "")
    wrapped = f" ({first!r} of a wrapped model stands before it)" if first else ""
    findings: list[Finding] = []
    for code, is_so, text in MISNAMED:
        keys = [key for key, match in matches.items() if is_so(key, match)]
        if config is not None or code not in WITH_CONFIG:
            findings += found(WRONG, code, text, keys, "tensor", prefix=PREFIX, wrapped=wrapped)
    findings += found(WRONG, "part-twice", "the same part of a module stands twice: {names}", twice, "tensor")
    findings += found(SUSPICIOUS, "unknown-tensors", KOHYA.others, others, "tensor")
    arrays = _arrays(config or {}, parts, findings)
    modules = {}
    for place, of_it in parts.items():
        embedding = any(".lora_embedding_" in key for key in of_it.values())
        conv = max(_axes(tensors, of_it), default=2) > 2
        kind = "experts" if place in arrays else "embedding" if embedding else "conv" if conv else "linear"
        module = arrays.get(place, place)
        modules[module] = Module(module, tensors, of_it, kind)
    modules = {module: modules[module] for module in sorted(modules, key=natural)}
    if config is not None:
        modules = _configured(config, config_path, modules, findings)
    format = "a file with PEFT's names and no configuration" if config is None else "a PEFT folder"
    return AdapterFile(path, format, tensors, modules, config, config_path, saved, copies, tuple(findings))


def _is_whole(key: str, saved: dict[str, str], copies: dict[str, str]) -> bool:
    """Put a tensor that is no factor where it belongs; return whether it belongs anywhere."""
    bare = PREFIXES.sub("", key)
    if TOKENS in bare or bare.endswith("token_adapter.base_layer.weight"):
        saved[bare] = key
        return True
    match = SAVED.fullmatch(bare)
    if match is None or ".lora_" in bare:
        return False
    module = match["path"]
    if module.endswith(WRAPPED) and match["end"] == "weight":
        copies[module.removesuffix(WRAPPED)] = key
    else:
        saved[f"{module.removesuffix(WRAPPED)}.{match['end']}"] = key
    return True


def _arrays(config: Mapping[str, Any], parts: Mapping[str, Any], findings: list[Finding]) -> dict[str, str]:
    """Return the array whose adapter stands at a place, of those that target_parameters names: `expert_adapters`."""
    targets = config.get("target_parameters") or []
    arrays: dict[str, str] = {}
    unclear = []
    for module, names, depths in modules_with_arrays(parts, targets):
        if sorted(depths) == list(range(len(names))):
            arrays |= {place: f"{module}.{name}" for name, place in nested_paths(module, names).items()}
        else:
            unclear.append(module)
    text = "other factors than those of the arrays that target_parameters names ({targets}): {names}"
    findings += found(WRONG, "target-parameters", text, unclear, targets=short(targets))
    return arrays


def _configured(
    config: Mapping[str, Any], path: Path, modules: Mapping[str, Module], findings: list[Finding]
) -> dict[str, Module]:
    """Return the modules with rank, alpha and scaling as the configuration has them; of a mixture also E."""
    if config.get("lora_alpha") is None:
        text = "there is no lora_alpha: PEFT takes its default, 8, and other readers take 0, 1, 16 or the rank"
        findings.append(Finding(SUSPICIOUS, "alpha-missing", text))
    if config.get("r") is None:
        findings.append(Finding(SUSPICIOUS, "rank-missing", "there is no r: PEFT takes its default, 8"))
    paths, tables = list(modules), ("rank_pattern", "alpha_pattern")
    try:
        with reading(path), within_time():
            ranks, alphas = (by_pattern(name, config.get(name) or {}, paths, None) for name in tables)
    except FileRefused as error:
        findings.append(Finding(WRONG, "pattern-not-read", str(error)))
        ranks, alphas = [None] * len(paths), [None] * len(paths)
    configured = {}
    for module, own_rank, own_alpha in zip(modules.values(), ranks, alphas, strict=True):
        rank = _count(own_rank, _count(config.get("r"), DEFAULT_RANK))
        alpha = _number(own_alpha, _number(config.get("lora_alpha"), DEFAULT_ALPHA))
        root = config.get("use_rslora") is True
        s = None if rank is None or alpha is None else scaling(alpha, rank, use_rslora=root)
        A, _ = module.factors
        E, grouped = 1, False
        if module.kind == "experts" and rank is not None and A is not None and len(A) == 2 and A[0] % rank == 0:
            E, grouped = A[0] // rank, B_LAYOUTS.get(str(config.get("lora_B_layout")), False)
        configured[module.path] = replace(module, rank=rank, alpha=alpha, scaling=s, experts=E, grouped=grouped)
    findings += _zero_alphas(configured)
    return configured


def _count(value: Any, default: int | None) -> int | None:
    """Return a number of ranks, the default of null, and None of anything else."""
    return value if type(value) is int and value > 0 else default if value is None else None


def _number(value: Any, default: float | None) -> float | None:
    return float(value) if type(value) in (int, float) else default if value is None else None


# --- what is said of the whole ---


def empty(adapter: AdapterFile) -> Iterator[Finding]:
    """Find an adapter in which nothing is: no factors, and nothing that was trained in full."""
    if not adapter.modules and not (adapter.saved and adapter.get("modules_to_save")):
        what = "there are no tensors in it" if not adapter.tensors.shapes else "no tensor of it is a LoRA's"
        yield Finding(WRONG, "empty", f"{what}: an engine that loads it answers as the base")


def without_config(adapter: AdapterFile) -> Iterator[Finding]:
    """Find factors with PEFT's names and no configuration. Image models need none: the scaling is 1 there."""
    if "PEFT" not in adapter.format or adapter.config is not None or not adapter.modules:
        return
    starts = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
    of_diffusers = all(module.startswith(starts) and ".h." not in module for module in adapter.modules)
    of_folder = adapter.tensors.path.name == WEIGHTS_NAME
    if of_folder or not of_diffusers or any(name.startswith(PREFIX) for name in adapter.tensors.shapes):
        text = f"there is no {CONFIG_NAME} beside it: nothing says rank and alpha, and so nothing says the scaling"
        yield Finding(WRONG if of_folder else SUSPICIOUS, "config-missing", text)
