"""The adapters of the cases: random numbers, written as PEFT's files, intact or damaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...files.dtypes import FLOATS, cast
from ...files.expert_adapters import WRITTEN_AS, layer_paths
from ...files.peft import BASE_WEIGHT, EMBEDDING_FACTORS, FACTOR_TENSORS, PREFIX
from .bases import EMBEDDING_PATH, EXPERT_COUNT, HEAD_PATH, LAYER, Base, to_bfloat16
from .exact import product, sums
from .reading import AdapterData, AdapterModule, NamedArrays, is_turned, scale, setting, target_array

SIZE = 1.3
"""The size of an update, relative to the weight that it changes."""
PLACES = {f"{name}_proj": f"self_attn.{name}_proj" for name in "qkvo"}
PLACES |= {f"{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")}


@dataclass(frozen=True)
class AdapterCase:
    """An adapter as `cases.toml` specifies it: what to draw, and what its adapter_config.json says."""

    modules: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)  # r, lora_alpha, and all that differs from PEFT's defaults
    layers: Sequence[int] = (0,)  # the layers that the modules are in
    each_expert: Sequence[str] = ()  # modules that every expert has
    weight: float = 1.0  # its weight, if the case has several adapters
    pissa: str = ""  # "raw" or "converted" if it started from PiSSA
    with_base: bool = False  # whether the file also has the base's own weight of an embedding or a head
    saved: Sequence[str] = ()  # the paths of modules that were trained in full
    targets: str = ""  # target_modules, if it is a regular expression
    tokens: Sequence[int] = ()  # the tokens whose embedding rows were trained: start, stop, step
    zero: bool = False  # whether lora_B is zero, as before the first step

    @property
    def paths(self) -> list[str]:
        """The paths of all modules, in the order in which they are drawn."""
        names = [name.format(e) for e in range(EXPERT_COUNT) for name in self.each_expert]
        names += [PLACES.get(name, name) for name in self.modules if name not in ("embed_tokens", HEAD_PATH)]
        inside = [f"model.layers.{i}.{name}" for i in self.layers for name in names]
        return [
            *([EMBEDDING_PATH] if "embed_tokens" in self.modules else []),
            *inside,
            *([HEAD_PATH] if HEAD_PATH in self.modules else []),
        ]


# --- random numbers ---------------------------------------------------------------------------------


def drawn_adapter(rng: np.random.Generator, adapter: AdapterCase, base: Base) -> AdapterData:
    """Draw an adapter's numbers as bfloat16 values, large enough that each part of it shows in the logits."""
    config: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
    if any(path in base.arrays for path in adapter.paths):  # parameters: their layout depends on PEFT's version
        config["peft_version"] = WRITTEN_AS
    config |= adapter.config
    modules: dict[str, AdapterModule] = {}
    starts: NamedArrays = {}
    for path in adapter.paths:
        modules[path], start = _drawn_module(rng, adapter, config, path, base)
        starts |= {} if start is None else {path: start}
    if adapter.pissa == "converted":
        config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"]}
    saved: NamedArrays = {}
    for path in adapter.saved:
        W = base.arrays[f"{path}.weight"]
        saved[path] = rounded(W + 0.7 * np.sqrt(np.square(W).mean()) * rng.standard_normal(W.shape))
    tokens: dict[str, tuple[list[int], np.ndarray]] = {}
    if adapter.tokens:
        W, which = base.arrays[f"{EMBEDDING_PATH}.weight"], [*range(*adapter.tokens)]
        noise = rng.standard_normal((len(which), W.shape[1]))
        tokens[EMBEDDING_PATH] = which, rounded(W[which] + np.sqrt(np.square(W).mean()) * noise)
    return AdapterData(config, modules, starts, saved, tokens)


def _drawn_module(
    rng: np.random.Generator, adapter: AdapterCase, config: Mapping[str, Any], path: str, base: Base
) -> tuple[AdapterModule, np.ndarray | None]:
    """Draw an adapter's part for one module, and for raw PiSSA files the product that training started from."""
    name, expert, rows = target_array(path, path, base.arrays)
    W = base.arrays[name].T if path == EMBEDDING_PATH else base.arrays[name]
    count = len(W) if W.ndim == 3 and expert is None else 1
    out, width = W[0][rows].shape if W.ndim == 3 else W.shape
    r, s, spread = setting(config, "r", path), scale(config, path), float(np.sqrt(np.square(W).mean()))
    length = width**0.5
    if is_turned(config) and count > 1:
        out, width = width, out
    A = rng.standard_normal((count * r, width)) / length
    B = rng.standard_normal((out, r * count)) * (SIZE * spread * length / (s * r**0.5))
    bias = rounded(rng.standard_normal(out) / s) if config.get("lora_bias") else None
    m = rounded(rng.uniform(0.5, 2.0, out) * np.sqrt(sums(W * W))[:, 0]) if config.get("use_dora") else None
    if not adapter.pissa:
        trained = rounded(rng.standard_normal(out)) if config.get("bias") == "lora_only" else None
        return AdapterModule(rounded(A), 0 * B if adapter.zero else rounded(B), bias, m, trained), None
    A0, B0 = pissa_factors(W, r, s)
    A, B = rounded(A0 + 0.5 * A), rounded(B0 + 0.5 * B)
    if adapter.pissa == "raw":
        return AdapterModule(A, B), product(B0, A0.T)
    ends = np.concatenate([A, -A0]), np.concatenate([B, B0], axis=1)
    return AdapterModule(*(end.astype(np.float32).astype(np.float64) for end in ends)), None


def as_stored(given: AdapterData, stored: str) -> AdapterData:
    """Round an adapter's factors to the type that its file stores; an empty `stored` changes nothing."""
    if not stored:
        return given

    def held(x: np.ndarray) -> np.ndarray:
        return cast(x, FLOATS[stored]).astype(np.float64)

    modules = {path: replace(m, lora_A=held(m.lora_A), lora_B=held(m.lora_B)) for path, m in given.modules.items()}
    return replace(given, modules=modules, stored=stored)


def rounded(x: np.ndarray) -> np.ndarray:
    """Round numbers to bfloat16, and return them as float64."""
    return to_bfloat16(x).astype(np.float64)


def pissa_factors(W: np.ndarray, rank: int, s: float) -> tuple[np.ndarray, np.ndarray]:
    """Compute PiSSA's factors A (r, in) and B (out, r) of a weight, by orthogonal iteration."""
    basis = np.eye(rank, W.shape[1])
    for _ in range(60):
        basis = _orthogonal(product(product(basis, W), W.T))
    u = product(basis, W)  # each row is a left singular vector times its singular value
    S = np.sqrt(sums(u * u))
    return np.sqrt(S / s) * basis, (u / S * np.sqrt(S / s)).T


def _orthogonal(rows: np.ndarray) -> np.ndarray:
    directions: list[np.ndarray] = []
    for row in rows:
        for other in directions:
            row = row - sums(row * other) * other
        directions.append(row / np.sqrt(sums(row * row)))
    return np.array(directions)


# --- files ----------------------------------------------------------------------------------------

DEFAULTS: dict[str, Any] = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": None, "bias": "none",
    "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {},
    "lora_bias": False, "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA", "rank_pattern": {},
    "revision": None, "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
}  # fmt: skip
"""The keys of adapter_config.json that PEFT has written for years, with their defaults."""


def adapter_files(adapter: AdapterCase, given: AdapterData, base: Base) -> tuple[dict[str, Any], NamedArrays]:
    """Return an adapter's configuration, and its tensors under PEFT's names."""
    parameters = [path for path in given.modules if path in base.arrays]
    place_of = layer_paths(parameters)
    targets = adapter.targets or targets_of([path for path in given.modules if path not in parameters], base)
    config = {**DEFAULTS, "base_model_name_or_path": f"bases/{base.name}", "target_modules": targets}
    if parameters:
        config["target_parameters"] = [path.removeprefix(f"{LAYER}.") for path in parameters]
    tensors: NamedArrays = {}
    for path, module in given.modules.items():
        names = EMBEDDING_FACTORS if path == EMBEDDING_PATH else FACTOR_TENSORS
        parts = {
            names[0]: module.lora_A, names[1]: module.lora_B, "lora_B.bias": module.bias,
            "lora_magnitude_vector": module.magnitude, "base_layer.bias": module.trained_bias,
        }  # fmt: skip
        if adapter.with_base and path in (EMBEDDING_PATH, HEAD_PATH):
            parts[BASE_WEIGHT] = base.arrays[f"{path}.weight"]
        prefix = f"{PREFIX}{place_of.get(path, path)}"
        tensors |= {f"{prefix}.{part}": array for part, array in parts.items() if array is not None}
    tensors |= {f"{PREFIX}{path}.weight": array for path, array in given.saved.items()}
    for path, (which, rows) in given.tokens.items():
        config["trainable_token_indices"] = which
        tensors[f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"] = rows
    return {**config, **given.config}, {name: array.astype(np.float32) for name, array in tensors.items()}


def targets_of(paths: list[str], base: Base) -> list[str]:
    """Return names for target_modules: the last parts of paths, or more of a path if its end would match others too."""
    if base.mixture is not None:  # experts and a shared expert have layers of the same names
        old = any(".experts." in path for path in paths)
        ends = {path.rpartition(".")[2] if old or ".self_attn." in path else path for path in paths}
        return sorted(end.removeprefix(f"{LAYER}.") for end in ends)
    ends = {path.rpartition(".")[2] for path in paths}
    named = {name.removesuffix(".weight") for name in base.arrays if name.split(".")[-2] in ends}
    return sorted(ends if named == set(paths) else paths)


def damaged(config: dict[str, Any], tensors: NamedArrays, how: str) -> tuple[dict[str, Any], NamedArrays]:
    """Damage an adapter's configuration and tensors so that a reader must refuse them."""
    name = next((name for name in tensors if name.endswith("lora_B.weight")), "")
    match how:
        case "no factor":
            del tensors[name]
        case "no prefix":
            tensors = {key.removeprefix(PREFIX): array for key, array in tensors.items()}
        case "another rank":
            tensors[name] = np.ascontiguousarray(tensors[name][:, :-1])
        case "another shape":
            tensors[name] = np.ascontiguousarray(tensors[name][:-64])
        case "unknown module":
            parts = {key: array for key, array in tensors.items() if "v_proj" in key}
            tensors |= {key.replace("layers.0", "layers.7"): array for key, array in parts.items()}
        case "transposed":
            A = name.replace("lora_B", "lora_A")
            tensors |= {name: np.ascontiguousarray(tensors[name].T), A: np.ascontiguousarray(tensors[A].T)}
        case "no alpha":
            del config["lora_alpha"]
        case "no tensors":
            tensors = {}
        case "language model":
            tensors = {key.replace(PREFIX, f"{PREFIX}language_model."): array for key, array in tensors.items()}
        case "missing expert":
            tensors = {key: _without_last_expert(key, array) for key, array in tensors.items()}
        case _ if how:
            key, value = how.split("=")
            config[key] = int(value) if value.lstrip("-").isdigit() else value
    return config, tensors


def _without_last_expert(name: str, array: np.ndarray) -> np.ndarray:
    """Drop the last expert from packed factors; the expert is lora_A's slow index and lora_B's fast one."""
    if name.endswith("lora_A.weight"):
        return array[: -len(array) // EXPERT_COUNT]
    return np.ascontiguousarray(array[:, np.arange(array.shape[1]) % EXPERT_COUNT < EXPERT_COUNT - 1])
