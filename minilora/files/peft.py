"""Reader of an adapter's folder in PEFT's layout.

In minilora every adapter is two matrices, lora_A (r, in) and lora_B (out, r), and for DoRA a magnitude. In
``adapter_model.safetensors`` each name follows the prefix ``base_model.model.<path>.``:

==========  ==================================  ==================================  =========================
kind        A                                   B                                   ``lora_magnitude_vector``
==========  ==================================  ==================================  =========================
linear      ``lora_A.weight`` (r, in)           ``lora_B.weight`` (out, r)          (out,)
embedding   ``lora_embedding_A`` (r, V)         ``lora_embedding_B`` (dim, r)       (dim,)
conv1d      ``lora_A.weight`` (r, C, K)         ``lora_B.weight`` (out, r, 1)       (1, out, 1)
conv2d      ``lora_A.weight`` (r, C, KH, KW)    ``lora_B.weight`` (out, r, 1, 1)    (1, out, 1, 1)
==========  ==================================  ==================================  =========================

The number of axes shows the kind. The columns of a convolution's matrix are ordered channel first, so a reshape is
enough. For arrays of a mixture see `minilora.files.expert_adapters`.

PEFT's ``adapter_config.json`` has about fifty keys. ``adapter_config.schema.json``, next to this file, lists
them, marks those that decide what an adapter computes (`CHANGES_NUMBERS`), and gives the supported values. An unknown
key is refused unless it is empty or false, since it may change what the adapter computes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from ..checks import MAX_ALPHA, MIN_ALPHA
from ..texts import FileRefused, hub_hint, named, reading, short
from ..variants.scaling import scaling
from .disk import parse_json, read_whole
from .dtypes import FLOATS
from .expert_adapters import adapted_arrays, check_packing
from .patterns import exclusions, first_matches, within_time
from .tensors import TensorFile, Weights

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
DIGEST_KEY = "minilora_config_sha256"
"""The metadata key for the digest of the configuration that was saved with the factors."""
NORM_KEY = "minilora_dora_norm_full"
"""The metadata key for the modules whose DoRA trains with the full gradient, one path per line; PEFT ignores it."""
MERGED_KEY = "minilora_merged"
"""The metadata key, in a merged model, for the digests of the adapters that were merged into it."""
SYSTEM_KEY = "minilora_system_message"
"""The metadata key for the system message that the adapter was trained with."""

# --- names and shapes ---

PREFIX = "base_model.model."
FACTOR_TENSORS = ("lora_A.weight", "lora_B.weight")
EMBEDDING_FACTORS = ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
BASE_WEIGHT = "base_layer.weight"
"""The base's weight. PEFT saves it too if an input or output embedding is adapted (`save_embedding_layers`)."""
_PARTS = "|".join(map(re.escape, (*FACTOR_TENSORS, *EMBEDDING_FACTORS, MAGNITUDE, BASE_WEIGHT)))
ADAPTER_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.(?P<part>{_PARTS})", re.DOTALL)
KERNEL_AXES = {"linear": 0, "conv1d": 1, "conv2d": 2}
"""The number of A's axes beyond two, by the kind of layer; an embedding's factors have other names."""


@dataclass(frozen=True)
class Form:
    """The way one module's adapter is stored in a file."""

    kind: str = "linear"  # or "embedding", "conv1d", "conv2d", "parameter"
    kernel: tuple[int, ...] = ()  # a convolution's kernel sizes
    dora: bool = False  # whether it has a magnitude
    place: str = ""  # for a mixture's array: the path of the layer that has its adapter in PEFT
    experts: int = 0  # for a mixture's array: the number of experts E

    def keys(self, module: str) -> tuple[str, ...]:
        """Return the names of a module's arrays: A, B and DoRA's magnitude."""
        parts = EMBEDDING_FACTORS if self.kind == "embedding" else FACTOR_TENSORS
        return tuple(f"{PREFIX}{self.place or module}.{part}" for part in (*parts, MAGNITUDE)[: 3 if self.dora else 2])

    def shapes(self, rank: int, out: int, width: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of A, B and the magnitude in the file for a matrix (out, width)."""
        ones = (1,) * len(self.kernel)
        A, B = (rank, width // math.prod(self.kernel), *self.kernel), (out, rank, *ones)
        return A, B, (1, out, *ones) if self.kernel else (out,)

    def weight_shape(self, out: int, width: int, layout: str) -> tuple[int, ...]:
        """Return the shape of the weight in a file for a matrix (out, width)."""
        return (width, out) if layout == "in-out" else (out, width // math.prod(self.kernel), *self.kernel)

    def __str__(self) -> str:
        if self.kind == "parameter":
            return f"{self.experts} experts" if self.experts > 1 else self.kind
        size = "x".join(map(str, self.kernel))
        return " ".join(filter(None, (self.kind, size, "DoRA" if self.dora else "")))


def natural(path: str) -> list[str | int]:
    """Return a sort key for paths that orders numbers by value: layer 2 comes before layer 10."""
    parts = re.split(r"(\d{1,9})", path)  # names at even indices, numbers at odd ones
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def is_module_path(module: str) -> bool:
    """Return whether a text can be a module's path: names joined by dots."""
    return all(module.split(".")) and module.isprintable()


# --- the configuration ---

CONFIG_SCHEMA: dict[str, Any] = json.loads(Path(__file__).with_name("adapter_config.schema.json").read_bytes())
"""The JSON Schema of the file; its properties are the only list of known keys."""
CONFIG_KEYS: dict[str, dict[str, Any]] = CONFIG_SCHEMA["properties"]
CHANGES_NUMBERS = frozenset(key for key, entry in CONFIG_KEYS.items() if entry["x-changes-numbers"])
"""The keys that change what the same tensors compute; a reader that ignores one computes something else."""
UNSET: list[Any] = CONFIG_SCHEMA["$defs"]["unset"]["enum"]
"""The allowed values of an unknown key."""

Name = Annotated[str, msgspec.Meta(min_length=1)]
Rank = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
Alpha = Annotated[float, msgspec.Meta(gt=MIN_ALPHA, lt=MAX_ALPHA)]


EXCLUSION_MESSAGES = {
    "target_modules": "does not name {}, although there are tensors for it",
    "exclude_modules": "names {}, although there are tensors for it",
    "layers_to_transform": "does not name the layer of {}, although there are tensors for it",
}
"""The error for each key that can exclude a module, if the file contains tensors for that module."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of adapter_config.json that change what an adapter computes; null means the default."""

    peft_type: str  # "LORA", the only kind supported
    r: Rank = 8  # for layers that `rank_pattern` does not match
    lora_alpha: Alpha = 8.0  # for layers that `alpha_pattern` does not match
    rank_pattern: dict[str, Rank] = {}  # exceptions, by a regular expression for a path's end; the first match decides
    alpha_pattern: dict[str, Alpha] = {}  # likewise
    use_rslora: bool = False  # whether the scaling is alpha / sqrt(r) instead of alpha / r
    use_dora: bool = False
    lora_dropout: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    fan_in_fan_out: bool = False  # whether the base weights are stored (in, out) instead of (out, in)
    target_modules: list[Name] | str = ""  # suffixes of the adapted modules' paths, or one regular expression
    exclude_modules: list[Name] | str = ""  # modules to exclude again, in the same form
    layers_to_transform: list[int] | int = []  # the layers that `target_modules` applies to; empty for all
    layers_pattern: list[Name] | str = ""  # regular expressions for the part of a path before a layer's number
    target_parameters: list[Name] = []  # suffixes of the adapted arrays' paths
    peft_version: str | None = None  # the version that wrote it, which shows how experts' factors are packed

    def ranks_and_alphas(self, paths: list[str]) -> dict[str, tuple[int, float]]:
        """Return each path's rank and alpha."""
        ranks = by_pattern("rank_pattern", self.rank_pattern, paths, self.r)
        alphas = by_pattern("alpha_pattern", self.alpha_pattern, paths, self.lora_alpha)
        return {path: (rank, alpha) for path, rank, alpha in zip(paths, ranks, alphas, strict=True)}

    def check_targets(self, forms: Mapping[str, Form]) -> None:
        """Require that the configuration adapts each of these modules; PEFT would ignore the tensors of any other."""
        linear = [form.kind == "linear" and not f".{module}".endswith(".lm_head") for module, form in forms.items()]
        keys = (self.target_modules, self.exclude_modules, self.layers_to_transform, self.layers_pattern)
        for key, module in exclusions([*forms], linear, *keys):
            raise ValueError(f"{key} {EXCLUSION_MESSAGES[key].format(short(module))}")

    def check_magnitudes(self, forms: Mapping[str, Form]) -> None:
        """Require that all modules have a magnitude if `use_dora` is set, and none otherwise."""
        for module, form in forms.items():
            if form.dora != self.use_dora:
                has = "has a" if form.dora else "has no"
                raise ValueError(f"use_dora is {self.use_dora} for all modules, but {short(module)} {has} {MAGNITUDE}")


def by_pattern(key: str, patterns: Mapping[str, Any], paths: list[str], usual: Any) -> list[Any]:
    """Return each path's value: that of the first matching pattern, else of a key equal to the path, else `usual`."""
    with named(key):
        numbers = first_matches(patterns, paths)
    values = [*patterns.values()]
    return [patterns.get(path, usual) if n is None else values[n] for path, n in zip(paths, numbers, strict=True)]


def read_config(path: Path, text: bytes) -> Config:
    """Read adapter_config.json. A key with an unsupported value is refused by name."""
    given = parse_json(path, text)
    with reading(path):
        if given.get("peft_type") != "LORA":
            raise ValueError(f"peft_type is {short(given.get('peft_type'))}, expected 'LORA', the only kind supported")
        config = msgspec.convert({key: value for key, value in given.items() if value is not None}, Config)
        for refusal in refusals(given):
            raise ValueError(refusal)
        if not config.target_modules and not config.target_parameters:
            raise ValueError(
                f"target_modules is {short(config.target_modules)}, expected names or a regular expression"
            )
    return config


def refusals(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each key with an unsupported value, and for each unknown key that is set."""
    for key, value in config.items():
        supported = CONFIG_KEYS[key].get("x-supported") if key in CONFIG_KEYS else UNSET
        if supported is not None and not any(_same(value, other) for other in supported):
            name, reason = (
                (key, CONFIG_KEYS[key]["x-refusal"]) if key in CONFIG_KEYS else (short(key), "this key is unknown")
            )
            yield f"{name} is {short(value)}: {reason}"


def _same(value: Any, other: Any) -> bool:
    """Return whether two values are equal in JSON, where true is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def config_text(config: dict[str, Any]) -> bytes:
    """Return the bytes of adapter_config.json."""
    return (json.dumps(config, indent=2) + "\n").encode()


def config_digest(text: bytes) -> str:
    """Return the digest of a configuration, which is stored in the factors' metadata."""
    return hashlib.sha256(text).hexdigest()


# --- the folder ---


@dataclass(frozen=True)
class AdaptedModule:
    """One module's adapter, whose arrays have not been read."""

    form: Form  # the kind of layer, and how its arrays are stored
    shape: tuple[int, int]  # (out, in) of the matrix that it adapts
    rank: int
    alpha: float  # from lora_alpha or alpha_pattern
    use_rslora: bool
    full_norm: bool  # whether its DoRA trains with the full gradient

    @property
    def scaling(self) -> float:
        """The factor s that B A is multiplied by."""
        return scaling(self.alpha, self.rank, use_rslora=self.use_rslora)


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk that has been checked, but whose factors have not been read."""

    config: Config  # adapter_config.json
    file: TensorFile  # adapter_model.safetensors
    modules: dict[str, AdaptedModule]  # by path, in layer order
    with_base: frozenset[str]  # the modules for which the file also contains the base weight

    @classmethod
    def open(cls, folder: Path) -> AdapterFolder:
        """Open and check a folder in PEFT's layout: both files, every key, and each shape against the configuration."""
        if not os.path.isdir(folder):
            expected = f"expected one with {CONFIG_NAME} and {WEIGHTS_NAME}"
            raise FileRefused(folder, f"not a folder; {expected}{hub_hint(folder)}")
        weights, pickle = folder / WEIGHTS_NAME, folder / "adapter_model.bin"
        if os.path.exists(pickle) and not os.path.exists(weights):
            raise FileRefused(pickle, "a pickle, which can run code when it is loaded: save it as safetensors")
        file = TensorFile(weights)
        path = folder / CONFIG_NAME
        text = read_whole(path)
        file.file.check_unchanged(in_place=True)  # so both files come from the same save
        config = read_config(path, text)
        with reading(weights):
            forms = _forms(file)
        with reading(path), within_time():
            _check_of_one_save(text, file)
            config.check_magnitudes(forms)
            places = adapted_arrays(forms, config.target_parameters) if config.target_parameters else {}
            if places and (config.use_dora or config.lora_dropout):
                key = "use_dora" if config.use_dora else "lora_dropout"
                raise ValueError(
                    f"{key} is {getattr(config, key)}, but target_parameters has adapters: PEFT refuses both"
                )
            forms = {module: form for module, form in forms.items() if module not in places.values()}
            config.check_targets(forms)
            forms |= {array: Form("parameter", place=place) for array, place in places.items()}
            rank_alpha = config.ranks_and_alphas([*forms])
            check_packing(config.peft_version, {array: _matrix(file, forms[array], array) for array in places})
        with reading(weights):
            for module, form in forms.items():
                forms[module] = _checked(file, module, form, rank_alpha[module][0])
            full = _full_norms(file, forms)
        modules = {
            path: AdaptedModule(form, _matrix(file, form, path), *rank_alpha[path], config.use_rslora, path in full)
            for path, form in sorted(forms.items(), key=lambda item: natural(item[0]))
        }
        with_base = frozenset(
            key[len(PREFIX) : -len(BASE_WEIGHT) - 1] for key in file.tensors if key.endswith(f".{BASE_WEIGHT}")
        )
        return cls(config, file, modules, with_base)

    def warn_of_base(self) -> None:
        """Warn if the file also contains a base weight."""
        if self.with_base:
            warnings.warn(
                f"{self.file.path} also contains the base weight of {short(min(self.with_base))}, which is not "
                "loaded: the adapter belongs to that weight. A merge compares it with the base",
                stacklevel=3,
            )

    def read(self, module: str) -> list[np.ndarray]:  # -> (r, in), (out, r), maybe (out,)
        """Read a module's matrices and DoRA's magnitude; for a mixture's array (E r, in) and (out, r E)."""
        arrays = []
        for key in self.modules[module].form.keys(module):
            arrays.append(self.file.read(key))
            if not np.isfinite(arrays[-1]).all():
                raise FileRefused(self.file.path, f"{short(key)} holds NaN or infinity")
        A, B, *magnitude = arrays
        return [A.reshape(len(A), -1), B.reshape(len(B), -1), *(m.reshape(-1) for m in magnitude)]


def check_not_merged(weights: Weights, folder: AdapterFolder) -> None:
    """Refuse an adapter that minilora merged into these weights before."""
    marks = " ".join(file.metadata.get(MERGED_KEY, "") for file in weights.files)
    if marks.strip() and folder.file.digest() in marks:
        raise FileRefused(
            weights.path,
            f"already contains the adapter {folder.file.path.parent}: use the model without it, or give the base",
        )


def _forms(file: TensorFile) -> dict[str, Form]:
    """Return the form of each adapted module; each key must belong to a complete adapter."""
    parts: dict[str, set[str]] = {}
    for key in file.tensors:
        match = ADAPTER_KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"the key {short(key)} does not have the form {PREFIX}<module>.lora_A.weight")
        parts.setdefault(match["module"], set()).add(match["part"])
    if not parts:
        raise ValueError("there are no tensors")
    return {module: _form(file, module, parts[module]) for module in sorted(parts, key=natural)}


def _form(file: TensorFile, module: str, parts: set[str]) -> Form:
    """Return the form of a module with exactly one A and one B of the same kind."""
    embedding = bool(parts & {*EMBEDDING_FACTORS})
    if embedding and parts & {*FACTOR_TENSORS}:
        raise ValueError(f"the module {short(module)} has factors of both an embedding and another kind of layer")
    form = Form("embedding" if embedding else "linear", dora=MAGNITUDE in parts)
    shape, *_ = (file.tensors[key].shape for key in form.keys(module))  # a missing factor is a KeyError
    if embedding:
        return form
    kinds = [kind for kind, axes in KERNEL_AXES.items() if len(shape) == 2 + axes]
    if not kinds:
        key = short(form.keys(module)[0])
        raise ValueError(f"{key} has shape {list(shape)}, expected 2 axes, or 3 or 4 for a convolution")
    return replace(form, kind=kinds[0], kernel=shape[2:])


def _checked(file: TensorFile, module: str, form: Form, rank: int) -> Form:
    """Check the arrays' dtypes, and their shapes against the rank; return the form, with E for a mixture's array."""
    keys = form.keys(module)
    specs = [file.tensors[key] for key in keys]
    if form.kind == "parameter":
        shape = specs[0].shape
        if len(shape) != 2 or not shape[0] or shape[0] % rank:
            raise ValueError(
                f"{short(keys[0])} has shape {list(shape)}, expected rows in a multiple of the rank {rank}"
            )
        form, rank = replace(form, experts=shape[0] // rank), shape[0]
    for key, spec in zip(keys, specs, strict=True):
        if 0 in spec.shape:
            raise ValueError(f"{short(key)} has shape {list(spec.shape)}, which is empty")
        if spec.dtype not in FLOATS:
            raise ValueError(f"{short(key)} has dtype {spec.dtype}, expected one of {', '.join(FLOATS)}")
        if spec.dtype != specs[0].dtype:
            raise ValueError(f"{short(keys[0])} has dtype {specs[0].dtype} and {short(key)} has dtype {spec.dtype}")
    out, width = _matrix(file, form, module)
    for key, spec, expected in zip(keys, specs, form.shapes(rank, out, width), strict=False):
        if spec.shape != expected:
            shapes = f"has shape {list(spec.shape)}, expected {list(expected)}"
            raise ValueError(f"{short(key)} {shapes} for the rank {rank}")
    return form


def _matrix(file: TensorFile, form: Form, module: str) -> tuple[int, int]:  # -> (out, in)
    """Return the shape of the product B A, as a matrix."""
    A, B, *_ = (file.tensors[key].shape for key in form.keys(module))
    return B[0] if B else 0, math.prod(A[1:])


def _full_norms(file: TensorFile, forms: Mapping[str, Form]) -> frozenset[str]:
    """Return the modules that use DoRA's full gradient, according to the file's metadata."""
    note = file.metadata.get(NORM_KEY)
    modules = frozenset(note.split("\n") if note is not None else ())
    for module in sorted(modules):
        if module not in forms or not forms[module].dora:
            raise ValueError(f"{NORM_KEY} names {short(module)}, which is not a module with DoRA")
    return modules


def _check_of_one_save(text: bytes, file: TensorFile) -> None:
    """Require that two files of `save_adapter` are from one save: no shape shows that alpha is of other factors."""
    noted = file.metadata.get(DIGEST_KEY)
    if noted is not None and noted != config_digest(text) and config_text(json.loads(text)) == text:
        raise ValueError(
            f"not the configuration that was saved with {WEIGHTS_NAME}: the two files come from different saves, or "
            "one was edited. Save the adapter again"
        )
