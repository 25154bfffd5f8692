"""What PEFT's adapter_config.json says, in so far as we can do it; the rest is refused by name.

PEFT's configuration has some fifty keys. ``adapter_config.schema.json`` beside this file lists them: which decide what
an adapter computes (`CHANGES_NUMBERS`), and of which only some values are implemented here. A key that is not known at
all is refused unless it is empty or false: whoever wrote it meant something.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checks import FileRefused, short
from ...guards.boundedpatterns import Matching
from ...variants.scaling import scaling
from ...variants.variant import LORA, Variant
from ..inputs import parse_json, read_whole
from .adapterkeys import PEFT_NAMES

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG = 3 << 20
"""Bytes of configuration that we agree to parse: parsing can take some twenty-five times the memory."""

SCHEMA: dict[str, Any] = json.loads(Path(__file__).with_name("adapter_config.schema.json").read_bytes())
"""A JSON Schema of the file, whose properties are the one list of the keys that are known."""
KEYS: dict[str, dict[str, Any]] = SCHEMA["properties"]
CHANGES_NUMBERS = frozenset(key for key, entry in KEYS.items() if entry["x-changes-numbers"])
"""The keys that decide what the same tensors compute: a reader that leaves one out computes something else."""
UNSET: list[Any] = SCHEMA["$defs"]["unset"]["enum"]
"""The values that a key which is not known may have."""

B_LAYOUTS = {"rank_major": False, "grouped_by_expert": True}
"""The values of lora_B_layout, a key of unsloth's, and whether the expert is B's slow index."""

MIN_ALPHA, MAX_ALPHA = 1e-30, 1e30
"""Beyond these a scaling could vanish or overflow."""


@dataclass(frozen=True)
class LayerConfig:
    """What the configuration says of one adapted layer."""

    rank: int
    alpha: float  # lora_alpha, or what alpha_pattern says
    use_rslora: bool

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return scaling(self.alpha, self.rank, use_rslora=self.use_rslora)


@dataclass(frozen=True)
class PeftConfig:
    """The part of adapter_config.json that decides what an adapter computes."""

    path: Path  # where it was read
    r: int  # of the layers that `rank_pattern` does not name
    lora_alpha: float  # of the layers that `alpha_pattern` does not name
    use_rslora: bool  # whether the scaling is alpha / sqrt(r), and not alpha / r
    variant: Variant  # whose flag is set: plain LoRA, or one such as DoRA
    fan_in_fan_out: bool  # whether the base weights are stored (in, out), and not (out, in)
    rank_pattern: dict[str, int]  # exceptions by a regular expression for a path's end; the first that matches decides
    alpha_pattern: dict[str, float]  # likewise
    target_modules: list[str] | str  # the ends of the adapted modules' paths, or one regular expression
    excludes: list[str] | str  # what is excluded again, in the same form
    layers_to_transform: list[int]  # the numbers of the layers that `target_modules` is about; empty for all
    layers_pattern: list[str]  # regular expressions for what stands before the number in a path; empty for anything
    target_parameters: list[str]  # the ends of the adapted arrays' paths
    peft_version: str | None  # that wrote it, which says how arrays' factors lie
    lora_B_layout: str | None  # how the experts' columns of lora_B lie, where it is said
    digest: str | None  # of a file as `save_adapter` writes it; None where another program wrote it

    def layers(self, modules: list[str]) -> dict[str, LayerConfig]:
        """Return what it says of each module; refuse modules that it does not give an adapter."""
        with Matching(self.path) as matching:
            self._check_targets(matching, modules)
            return self._settings(matching, modules)

    def settings(self, paths: list[str]) -> dict[str, LayerConfig]:
        """Return what it says of each path, whether or not `target_modules` names it."""
        with Matching(self.path) as matching:
            return self._settings(matching, paths)

    def _settings(self, matching: Matching, paths: list[str]) -> dict[str, LayerConfig]:
        ranks = matching.first("rank_pattern", self.rank_pattern, paths)
        alphas = matching.first("alpha_pattern", self.alpha_pattern, paths)
        exceptional_ranks, exceptional_alphas = list(self.rank_pattern.values()), list(self.alpha_pattern.values())
        layers = {}
        for path, rank, alpha in zip(paths, ranks, alphas, strict=True):
            # Where no pattern matches, PEFT still takes one that is the path letter for letter.
            r = self.rank_pattern.get(path, self.r) if rank is None else exceptional_ranks[rank]
            a = self.alpha_pattern.get(path, self.lora_alpha) if alpha is None else exceptional_alphas[alpha]
            layers[path] = LayerConfig(r, a, self.use_rslora)
        return layers

    def _check_layers(self, matching: Matching, modules: list[str]) -> None:
        """Refuse tensors of layers that PEFT would pass over: those whose number is not in `layers_to_transform`."""
        wanted = {str(number) for number in self.layers_to_transform}
        patterns = [rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\." for pattern in self.layers_pattern]
        patterns = patterns or [r".*?\.[^.]*\.(?P<layer>\d+)\."]
        numbers = matching.layers("layers_pattern", patterns, self.layers_pattern, modules)
        for module, number in zip(modules, numbers, strict=True):
            if number is None or (number.lstrip("0") or "0") not in wanted:
                raise FileRefused(
                    self.path, f"layers_to_transform does not name the layer of {short(module)}, which has tensors"
                )

    def _check_targets(self, matching: Matching, modules: list[str]) -> None:
        """Refuse tensors of modules that PEFT would pass over, without a word about their tensors."""
        targets = self.target_modules
        if targets != "all-linear":
            named = _named(matching, "target_modules", targets, modules)
            stranger = next((module for module, is_named in zip(modules, named, strict=True) if not is_named), None)
            if stranger is not None:
                raise FileRefused(
                    self.path, f"target_modules does not name {short(stranger)}, for which there are tensors"
                )
            if isinstance(targets, list) and self.layers_to_transform:
                whole = set(targets)
                self._check_layers(matching, [module for module in modules if module not in whole])
        named = _named(matching, "exclude_modules", self.excludes, modules)
        excluded = next((module for module, is_named in zip(modules, named, strict=True) if is_named), None)
        if excluded is not None:
            raise FileRefused(self.path, f"exclude_modules names {short(excluded)}, for which there are tensors")


def _integers(path: Path, key: str, value: Any) -> list[int]:
    numbers = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(number) is int for number in numbers):
        raise FileRefused(path, f"{key} is {short(value)}, expected an integer or a list of them")
    return numbers


def _named(matching: Matching, key: str, names: list[str] | str, modules: list[str]) -> list[bool]:
    """Return of each module whether one of the names is its end, or the one regular expression matches it."""
    return matching.whole(key, names, modules) if isinstance(names, str) else matching.named(key, names, modules)


def read_config(path: Path) -> PeftConfig:
    """Read adapter_config.json.

    Raises
    ------
    FileRefused
        If it is not sound JSON, a key has a value that it cannot have, or asks for what is not supported.
    """
    text = read_whole(path)
    config = parse_json(path, text)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise FileRefused(path, f"peft_type is {short(kind)}, expected 'LORA', the only kind supported")
    for refusal in refusals(config):
        raise FileRefused(path, refusal)
    excludes = config.get("exclude_modules")
    parameters = _parameters(path, config.get("target_parameters"))
    targets = config.get("target_modules")
    targets = [] if parameters and not targets else _names(path, "target_modules", targets)
    version, layout = _text(path, config, "peft_version"), _text(path, config, "lora_B_layout")
    if layout not in (None, *B_LAYOUTS):
        raise FileRefused(path, f"lora_B_layout is {short(layout)}, expected one of {', '.join(B_LAYOUTS)}")
    return PeftConfig(
        path,
        r=_rank(path, "r", _or(config.get("r"), 8)),
        lora_alpha=_alpha(path, "lora_alpha", _or(config.get("lora_alpha"), 8)),
        use_rslora=_flag(path, config, "use_rslora"),
        variant=next((v for v, names in PEFT_NAMES.items() if _flag(path, config, names.flag)), LORA),
        fan_in_fan_out=_flag(path, config, "fan_in_fan_out"),
        rank_pattern={k: _rank(path, f"rank_pattern[{short(k)}]", v) for k, v in _table(path, config, "rank_pattern")},
        alpha_pattern={
            k: _alpha(path, f"alpha_pattern[{short(k)}]", v) for k, v in _table(path, config, "alpha_pattern")
        },
        target_modules=targets,
        target_parameters=parameters,
        peft_version=version if parameters else None,
        lora_B_layout=layout,
        layers_to_transform=_integers(path, "layers_to_transform", config.get("layers_to_transform")),
        layers_pattern=_optional_names(path, "layers_pattern", config.get("layers_pattern")),
        excludes=_names(path, "exclude_modules", excludes) if excludes else [],
        digest=digest(text) if config_text(config) == text else None,
    )


def refusals(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield of each key that asks for what is not supported, or is not known and not unset, what it says and why."""
    for key, value in config.items():
        supported = KEYS[key].get("x-supported") if key in KEYS else UNSET
        if supported is not None and not any(_same(value, other) for other in supported):
            name, reason = (key, KEYS[key]["x-refusal"]) if key in KEYS else (short(key), "this key is not known")
            yield f"{name} is {short(value)}: {reason}"


def _same(value: Any, other: Any) -> bool:
    """Return whether two values are the same in JSON, where true is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def config_text(config: dict[str, Any]) -> bytes:
    """Return adapter_config.json as `save_adapter` writes it."""
    return (json.dumps(config, indent=2) + "\n").encode()


def digest(text: bytes) -> str:
    """Return what `save_adapter` notes beside the factors about the configuration that it writes."""
    return hashlib.sha256(text).hexdigest()


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _rank(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value < 2**31:
        raise FileRefused(path, f"{key} is {short(value)}, expected an integer of at least 1")
    return value


def _alpha(path: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not MIN_ALPHA < value < MAX_ALPHA:
        raise FileRefused(path, f"{key} is {short(value)}, expected a number from {MIN_ALPHA:g} to {MAX_ALPHA:g}")
    return float(value)


def _flag(path: Path, config: dict[str, Any], key: str) -> bool:
    value = _or(config.get(key), False)
    if not isinstance(value, bool):
        raise FileRefused(path, f"{key} is {short(value)}, expected true or false")
    return value


def _text(path: Path, config: dict[str, Any], key: str) -> str | None:
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise FileRefused(path, f"{key} is {short(value)}, expected a text")
    return value


def _parameters(path: Path, value: Any) -> list[str]:
    """Return the names of arrays, or refuse an expression: PEFT takes none there."""
    if value is None or value == []:
        return []
    names = _names(path, "target_parameters", value)
    if isinstance(names, str):
        raise FileRefused(
            path, f"target_parameters is {short(value)}, expected a list of names: PEFT takes nothing else"
        )
    return names


def _table(path: Path, config: dict[str, Any], key: str) -> Iterable[tuple[str, Any]]:
    value = _or(config.get(key), {})
    if not isinstance(value, dict):
        raise FileRefused(path, f"{key} is {short(value)}, expected an object")
    return value.items()


def _names(path: Path, key: str, value: Any) -> list[str] | str:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(isinstance(name, str) and name for name in value):
        return value
    raise FileRefused(path, f"{key} is {short(value)}, expected a list of names or a regular expression")


def _optional_names(path: Path, key: str, value: Any) -> list[str]:
    """Return a list of names that may be empty, or be one name."""
    names_or_pattern = _names(path, key, value) if value else []
    return [names_or_pattern] if isinstance(names_or_pattern, str) else names_or_pattern
