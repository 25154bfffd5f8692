"""Readers of each adapter format: they map tensor names to modules and factors, with their scaling.

    format   names of A and B                                            the scaling s
    PEFT     base_model.model.PATH.lora_A.weight (r, in), .lora_B        alpha / r, or alpha / sqrt(r) with use_rslora
    MLX      PATH.lora_a (in, r), .lora_b: transposed                    scale
    kohya    lora_unet_PATH_WITH_UNDERSCORES.lora_down.weight, .lora_up  alpha / r, an alpha for each module
    GGUF     blk.0.attn_q.weight.lora_a (r, in), .lora_b                 adapter.lora.alpha / r

A reader loads what it can and reports what is wrong with the rest, unlike `minilora.load_adapter`, which refuses the
whole file. It also reads tensors that PEFT would silently ignore, and reports them as wrong.

For kohya's names, the model's own names show which underscores of a path were dots. LoHa, LoKr and similar methods do
not consist of two factors, and are refused.
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
from .findings import NOTE, SUSPICIOUS, WRONG, Finding, about
from .headers import AdapterFile, Module, Tensors, open_tensors

MLX_NAME = "adapters.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NO_PICKLE = "a pickle, which can run code when it is loaded: save it as safetensors"
MAX_LENGTH, MAX_ENTRIES = 1000, 1000
"""The longest name of a tensor, and the longest list in a configuration, that is accepted."""
METADATA_KEY = "lora_adapter_metadata"
"""The key under which diffusers stores a configuration in a safetensors file's metadata."""


def open_adapter(path: Path) -> AdapterFile:
    """Open an adapter, reading only headers; refuse a file that is damaged or not a LoRA."""
    file = _file(path) if os.path.isdir(path) else path
    if file.suffix in PICKLES:
        raise FileRefused(file, NO_PICKLE)
    tensors = open_tensors(file)
    if (longest := max(tensors.shapes, key=len, default="")) and len(longest) > MAX_LENGTH:
        raise FileRefused(file, f"{short(longest)} has {len(longest):,} characters, expected at most {MAX_LENGTH:,}")
    if tensors.weights is None:
        return _read_gguf(file, tensors)
    _refuse_other_methods(file, tensors.shapes)
    config_path: Path = file.parent / CONFIG_NAME
    config = read_json(config_path) if os.path.exists(config_path) else None
    for opened in tensors.weights.files:
        opened.file.check_unchanged(in_place=True)  # so the two files are of one save
    config, findings = (None, []) if config is None else _typed(config_path, config)
    ends = {name.rpartition(".")[2] for name in tensors.shapes}
    if ends & {"lora_a", "lora_b"} or (file.name == MLX_NAME and (config or {}).get("fine_tune_type")):
        adapter = _read_mlx(path, tensors, config, config_path)
    elif any("lora_down" in name or "lora_up" in name or ".lora.down" in name for name in tensors.shapes):
        return _read_kohya(path, tensors)
    else:
        if config is None and (config := _in_metadata(tensors.metadata)) is not None:
            config_path, (config, findings) = file, _typed(file, config)
        elif config is not None and config.get("peft_type") not in (None, "LORA"):
            raise FileRefused(config_path, f"peft_type is {short(config['peft_type'])}, expected 'LORA'")
        adapter = _read_peft(path, tensors, config, config_path)
    return replace(adapter, findings=(*adapter.findings, *findings))


def _file(folder: Path) -> Path:
    """Return the file in a folder that contains the adapter's tensors."""
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
        names += f", but there is one in its folder {', '.join(map(short, below))}"
    expected = f"expected {WEIGHTS_NAME}, {MLX_NAME}, or one .safetensors or .gguf file"
    raise FileRefused(folder, f"{expected}: it has {names}{hub_hint(folder)}")


# --- a configuration ---

KEY_TYPES: dict[str, dict[type, Any]] = {
    "target_modules": {list: str, str: ""}, "exclude_modules": {list: str, str: ""},
    "layers_pattern": {list: str, str: ""}, "target_parameters": {list: str}, "modules_to_save": {list: str},
    "layers_to_transform": {list: int, int: ""}, "rank_pattern": {dict: ""}, "alpha_pattern": {dict: ""},
    "lora_parameters": {dict: ""},
}  # fmt: skip
"""The accepted types of each list, string or table in a configuration; for a list, the type of its entries."""
TYPE_NAMES = {list: "a list", str: "a string", int: "a number", dict: "an object"}


def _typed(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """Return a configuration without values of the wrong type, and a finding for each of those."""
    settings = config.get("lora_parameters")
    lists = {name: config.get(name) for name in ("modules_to_save", "target_parameters", "layers_to_transform")}
    lists["lora_parameters.keys"] = settings.get("keys") if isinstance(settings, dict) else None
    for name, names in lists.items():
        if isinstance(names, list) and len(names) > MAX_ENTRIES:  # each entry is looked up in every path
            raise FileRefused(path, f"{name} has {len(names):,} entries, expected at most {MAX_ENTRIES:,}")
    typed, wrong = dict(config), []
    for name, kinds in KEY_TYPES.items():
        value = config.get(name)
        if value is not None and not isinstance(value, (*kinds,)):
            typed[name] = None
            wrong.append(f"{name} is {short(value)}, expected {' or '.join(TYPE_NAMES[kind] for kind in kinds)}")
        elif isinstance(value, list):
            typed[name] = [entry for entry in value if isinstance(entry, kinds[list])]
            wrong += [f"{name} has the entry {short(x)}" for x in value if not isinstance(x, kinds[list])][:1]
    return typed, [Finding(WRONG, "config-type", text) for text in wrong]


def _in_metadata(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the configuration in a file's metadata; None if there is none or it is invalid."""
    try:
        config = json.loads(metadata.get(METADATA_KEY, "null"))
    except (ValueError, TypeError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


# --- the names of tensors ---


@dataclass(frozen=True)
class Names:
    """The scheme by which a format names a module's tensors."""

    key: re.Pattern[str]  # with the groups `path` and `part`
    parts: Mapping[str, str]  # our name of each part, by the format's
    others: str  # the text of a finding about any other tensors


MLX = Names(
    re.compile(r"(?P<path>.+)\.(?P<part>lora_a|lora_b|m)", re.S),
    {"lora_a": "A", "lora_b": "B", "m": "magnitude"},
    "{count} that mlx-lm does not know: {names}",
)
KOHYA = Names(
    re.compile(r"(?P<path>.+?)[._](?:lora[._])?(?P<part>(?:lora_)?(?:down|up)|alpha|dora_scale)(?:\.weight)?", re.S),
    {"lora_down": "A", "down": "A", "lora_up": "B", "up": "B", "alpha": "alpha", "dora_scale": "magnitude"},
    "{count} that no LoRA reader knows: {names}",
)
GGUF = Names(
    re.compile(r"(?P<path>.*)\.weight\.(?P<part>lora_a|lora_b)", re.S),
    {"lora_a": "A", "lora_b": "B"},
    "{count} that llama.cpp refuses or ignores in an adapter: {names}",
)


def _collected(names: Names, tensors: Tensors) -> tuple[dict[str, dict[str, str]], list[Finding]]:
    """Return each module's tensors by part, in layer order, and findings about any other tensors."""
    parts: dict[str, dict[str, str]] = {}
    others = []
    for key in tensors.shapes:
        if (match := names.key.fullmatch(key)) is None:
            others.append(key)
        else:
            parts.setdefault(match["path"], {})[names.parts[match["part"]]] = key
    findings = [*about(SUSPICIOUS, "unknown-tensors", names.others, others, "tensor")]
    return {path: parts[path] for path in sorted(parts, key=natural)}, findings


def _axes(tensors: Tensors, parts: Mapping[str, str]) -> list[int]:
    """Return the number of axes of each factor."""
    return [len(tensors.shapes[name]) for part, name in parts.items() if part in "AB"]


def _experts(tensors: Tensors, parts: Mapping[str, str]) -> int:
    """Return E for a mixture's factors, (E, r, in) and (E, out, r), and 0 for any others."""
    stacked = {*_axes(tensors, parts)} == {3}
    return max(tensors.shapes[name][0] for part, name in parts.items() if part in "AB") if stacked else 0


# --- MLX ---


def _read_mlx(path: Path, tensors: Tensors, config: Mapping[str, Any] | None, config_path: Path) -> AdapterFile:
    """Read an adapter from a file with mlx-lm's names."""
    kind = (config or {}).get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise FileRefused(config_path, f"fine_tune_type is {short(kind)}, expected 'lora' or 'dora'")
    parts, findings = _collected(MLX, tensors)
    settings = (config or {}).get("lora_parameters") or {}
    rank, scale = settings.get("rank"), settings.get("scale")
    if scale is None and isinstance(settings.get("alpha"), int | float) and isinstance(rank, int) and rank:
        scale = settings["alpha"] / rank  # as in older versions
    if config is None:
        text = f"{CONFIG_NAME} is missing, and with it the scale by which mlx-lm multiplies the update"
        findings.append(Finding(SUSPICIOUS, "alpha-missing", text))
    elif scale is None:
        text = "lora_parameters has no scale: mlx-lm uses the default of its version, currently 20"
        findings.append(Finding(SUSPICIOUS, "alpha-missing", text))
    elif type(scale) not in (int, float) or scale == 0:
        text = f"scale is {short(scale)}, expected a number above 0: the adapter does nothing or does not load"
        findings.append(Finding(WRONG, "alpha-zero", text))
    s, r = _number(scale, None), _count(rank, None)
    alpha = None if s is None or r is None else s * r
    modules = {}
    for module, keys in parts.items():
        E = _experts(tensors, keys)
        # An embedding's lora_a is (V, r) and its lora_b (r, dim): both are transposed, as for a matrix (dim, V).
        kind = "experts" if E else "embedding" if module.rpartition(".")[2] in ("embed_tokens", "wte") else "linear"
        bare = Module(module, tensors, keys, kind, "" if E else "AB", experts=E or 1)
        modules[module] = replace(bare, rank=r, alpha=alpha, scaling=s)
    return AdapterFile(path, "an MLX adapter", tensors, modules, config, config_path, findings=tuple(findings))


# --- kohya ---

OTHER_METHODS = {
    "hada_": "LoHa", "lokr_": "LoKr", "oft_blocks": "OFT", "oft_diag": "OFT", "boft_": "BOFT", "lora_mid": "LoCon in "
    "three factors", "a1.weight": "GLoRA", "on_input": "IA3", "glora_": "GLoRA",
}  # fmt: skip


def _refuse_other_methods(path: Path, names: Iterable[str]) -> None:
    """Refuse tensors whose names belong to a method other than LoRA with two factors."""
    for name in names:
        last = name.rpartition(".")[2] if not name.endswith(".weight") else ".".join(name.split(".")[-2:])
        kind = next((kind for start, kind in OTHER_METHODS.items() if last.startswith(start)), None)
        if kind is not None:
            raise FileRefused(path, f"{short(name)} belongs to {kind}, expected a LoRA of two factors")


def _read_kohya(path: Path, tensors: Tensors) -> AdapterFile:
    """Read an adapter from a file with kohya's names. A module without an alpha has alpha = r, so s is 1."""
    parts, findings = _collected(KOHYA, tensors)
    modules = {}
    for name, keys in parts.items():
        key = keys.pop("alpha", None)
        numbers = np.ravel(tensors.read(key)) if key is not None else np.empty(0)
        alpha = float(numbers[0]) if numbers.size == 1 else None
        module = Module(name, tensors, keys, "conv" if max(_axes(tensors, keys), default=2) > 2 else "linear")
        r = module.rank_in_file
        modules[name] = replace(module, alpha=alpha, scaling=None if r is None else 1.0 if alpha is None else alpha / r)
    text = "alpha is missing for {names}: most programs, but not all, use the rank instead, so a scaling of 1"
    has_place = not all(".lora." in key for key in tensors.shapes)  # diffusers' early files have no alphas
    without = [name for name, module in modules.items() if module.alpha is None]
    findings += about(SUSPICIOUS if has_place else NOTE, "alpha-missing", text, without)
    findings += _zero_alphas(modules)
    return AdapterFile(path, "a file with kohya's names", tensors, modules, findings=tuple(findings))


def _zero_alphas(modules: Mapping[str, Module]) -> Iterator[Finding]:
    zero = [name for name, module in modules.items() if module.alpha == 0]
    return about(WRONG, "alpha-zero", "alpha is 0, so the adapter of {names} does nothing", zero)


# --- GGUF ---


def _read_gguf(path: Path, tensors: Tensors) -> AdapterFile:
    """Read an adapter from a .gguf file. If its alpha is 0 or missing, llama.cpp uses s = 1."""
    kind, how, alpha = (tensors.metadata.get(k) for k in ("general.type", "adapter.type", "adapter.lora.alpha"))
    if kind != "adapter":
        raise FileRefused(path, f"general.type is {short(kind)}, expected 'adapter': the file is not an adapter")
    if how != "lora":
        raise FileRefused(path, f"adapter.type is {short(how)}, expected 'lora'")
    parts, findings = _collected(GGUF, tensors)
    alpha = float(alpha) if isinstance(alpha, int | float) else None
    if not alpha:
        text = f"adapter.lora.alpha is {short(alpha)}: llama.cpp then uses a scaling of 1, and other readers use 0"
        findings.insert(0, Finding(SUSPICIOUS, "alpha-missing" if alpha is None else "alpha-zero", text))
    modules = {}
    for weight, keys in parts.items():
        name, E = from_gguf(f"{weight}.weight").removesuffix(".weight"), _experts(tensors, keys)
        embedding = name in ("model.embed_tokens", "token_embd")  # its lora_a is transposed
        kind = "experts" if E else "embedding" if embedding else "linear"
        module = Module(name, tensors, keys, kind, "A" if kind == "embedding" else "", experts=E or 1, alpha=alpha)
        r = module.rank_in_file
        modules[name] = replace(module, scaling=None if r is None else alpha / r if alpha else 1.0)
    modules = {name: modules[name] for name in sorted(modules, key=natural)}
    return AdapterFile(path, "a GGUF adapter", tensors, modules, findings=tuple(findings))


# --- PEFT ---

TENSOR_NAME = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<name>(?!weight$|bias$)[^.]+))?(?:\.(?P<end>weight|bias))?",
    re.S,
)
TENSOR_PARTS = {
    "lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B", "lora_magnitude_vector": "magnitude"
}  # fmt: skip
SAVED_MODULE = re.compile(
    r"(?P<path>.+?)(?:\.modules_to_save(?:\.(?!weight$|bias$)[^.]+)?)?\.(?P<end>weight|bias)", re.S
)
TRAINABLE_TOKENS = "trainable_tokens"
DEFAULT_RANK, DEFAULT_ALPHA = 8, 8.0
"""PEFT's defaults, used if the configuration gives no rank or alpha."""
PEFT_PREFIXES = re.compile(rf"^(?:{re.escape(PREFIX)})*")
MISNAMED: tuple[tuple[str, Callable[[str, re.Match[str] | None], Any], str], ...] = (
    ("prefix-missing", lambda key, _: not key.startswith(PREFIX),
     "{count} without the prefix {prefix!r}, which PEFT silently ignores{wrapped}: {names}"),
    ("prefix-doubled", lambda key, _: key.startswith(2 * PREFIX),
     "the prefix {prefix!r} is repeated, so the modules are not found: {names}"),
    ("adapter-name-in-keys", lambda _, match: match and match["name"],
     "the names contain the adapter's own name, as in a model's state dict; PEFT saves names without it, and ignores "
     "these: {names}"),
    ("weight-missing", lambda _, match: match and match["part"] in ("lora_A", "lora_B") and not match["end"],
     "the names do not end with '.weight', so PEFT ignores them: {names}"),
)  # fmt: skip
"""Tensors that PEFT ignores: the finding's code, a test of the name and its match of `TENSOR_NAME`, and the text."""
WITH_CONFIG = ("prefix-missing", "weight-missing")
"""Codes that apply only if there is a configuration: diffusers' files, without one, have such names."""


def _read_peft(path: Path, tensors: Tensors, config: Mapping[str, Any] | None, config_path: Path) -> AdapterFile:
    """Read an adapter from a file with PEFT's names."""
    matches = {key: TENSOR_NAME.fullmatch(PEFT_PREFIXES.sub("", key)) for key in tensors.shapes}
    parts: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    copies: dict[str, str] = {}
    twice, others = [], []
    for key, match in matches.items():
        if match is None:
            others += [] if _is_whole(key, saved, copies) else [key]
            continue
        part = TENSOR_PARTS[match["part"]]
        part = "bias" if match["end"] == "bias" and part in "AB" else part
        if part in parts.setdefault(match["path"], {}):
            twice.append(key)
        parts[match["path"]][part] = key
    strangers = [key for key in matches if not key.startswith(PREFIX)]
    first = next((word for word in ("module.", "_orig_mod.") if all(key.startswith(word) for key in strangers)), "")
    wrapped = f" ({first!r} of a wrapped model comes before it)" if first else ""
    findings: list[Finding] = []
    for code, is_so, text in MISNAMED:
        names = [key for key, match in matches.items() if is_so(key, match)]
        if config is not None or code not in WITH_CONFIG:
            findings += about(WRONG, code, text, names, "tensor", prefix=PREFIX, wrapped=wrapped)
    findings += about(WRONG, "part-twice", "the same part of a module is stored twice: {names}", twice, "tensor")
    findings += about(SUSPICIOUS, "unknown-tensors", KOHYA.others, others, "tensor")
    arrays = _arrays(config or {}, parts, findings)
    modules = {}
    for place, keys in parts.items():
        embedding = any(".lora_embedding_" in key for key in keys.values())
        conv = max(_axes(tensors, keys), default=2) > 2
        kind = "experts" if place in arrays else "embedding" if embedding else "conv" if conv else "linear"
        module = arrays.get(place, place)
        modules[module] = Module(module, tensors, keys, kind)
    modules = {module: modules[module] for module in sorted(modules, key=natural)}
    if config is not None:
        modules = _configured(config, config_path, modules, findings)
    format = "a file with PEFT's names and no configuration" if config is None else "a PEFT folder"
    return AdapterFile(path, format, tensors, modules, config, config_path, saved, copies, tuple(findings))


def _is_whole(key: str, saved: dict[str, str], copies: dict[str, str]) -> bool:
    """Add a tensor that is not a factor to `saved` or `copies`; return whether it belongs to either."""
    bare = PEFT_PREFIXES.sub("", key)
    if TRAINABLE_TOKENS in bare or bare.endswith("token_adapter.base_layer.weight"):
        saved[bare] = key
        return True
    match = SAVED_MODULE.fullmatch(bare)
    if match is None or ".lora_" in bare:
        return False
    module = match["path"]
    if module.endswith(WRAPPED) and match["end"] == "weight":
        copies[module.removesuffix(WRAPPED)] = key
    else:
        saved[f"{module.removesuffix(WRAPPED)}.{match['end']}"] = key
    return True


def _arrays(config: Mapping[str, Any], parts: Mapping[str, Any], findings: list[Finding]) -> dict[str, str]:
    """Return the array of target_parameters that is adapted at each path, as PEFT nests them; see `expert_adapters`."""
    targets = config.get("target_parameters") or []
    arrays: dict[str, str] = {}
    unclear = []
    for module, names, depths in modules_with_arrays(parts, targets):
        if sorted(depths) == list(range(len(names))):
            arrays |= {place: f"{module}.{name}" for name, place in nested_paths(module, names).items()}
        else:
            unclear.append(module)
    text = "the factors are not those of the arrays that target_parameters names ({targets}): {names}"
    findings += about(WRONG, "target-parameters", text, unclear, targets=short(targets))
    return arrays


def _configured(
    config: Mapping[str, Any], path: Path, modules: Mapping[str, Module], findings: list[Finding]
) -> dict[str, Module]:
    """Return the modules with the rank, alpha and scaling of the configuration, and E for a mixture."""
    if config.get("lora_alpha") is None:
        text = "lora_alpha is missing: PEFT uses its default, 8, and other readers use 0, 1, 16 or the rank"
        findings.append(Finding(SUSPICIOUS, "alpha-missing", text))
    if config.get("r") is None:
        findings.append(Finding(SUSPICIOUS, "rank-missing", "r is missing: PEFT uses its default, 8"))
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
    """Return a positive integer as it is, the default instead of null, and None for anything else."""
    return value if type(value) is int and value > 0 else default if value is None else None


def _number(value: Any, default: float | None) -> float | None:
    return float(value) if type(value) in (int, float) else default if value is None else None


# --- the whole file ---


def empty(adapter: AdapterFile) -> Iterator[Finding]:
    """Find an adapter without factors and without fully trained weights."""
    if not adapter.modules and not (adapter.saved and adapter.get("modules_to_save")):
        what = "the file has no tensors" if not adapter.tensors.shapes else "the file has no tensor of a LoRA"
        yield Finding(WRONG, "empty", f"{what}: an engine that loads it answers like the base")


def without_config(adapter: AdapterFile) -> Iterator[Finding]:
    """Find factors with PEFT's names but no configuration. Image models need none: their scaling is 1."""
    if "PEFT" not in adapter.format or adapter.config is not None or not adapter.modules:
        return
    starts = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
    of_diffusers = all(module.startswith(starts) and ".h." not in module for module in adapter.modules)
    of_folder = adapter.tensors.path.name == WEIGHTS_NAME
    if of_folder or not of_diffusers or any(name.startswith(PREFIX) for name in adapter.tensors.shapes):
        text = f"{CONFIG_NAME} is missing, and with it rank and alpha, so the scaling is unknown"
        yield Finding(WRONG if of_folder else SUSPICIOUS, "config-missing", text)
