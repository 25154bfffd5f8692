"""What PEFT's adapter_config.json says, in so far as we can do it; the rest is refused by name.

PEFT's configuration has some fifty keys. A few decide what an adapter computes (`LORA_KEYS`), some do not matter once
it is trained (`HARMLESS`), and each of the others would change the result in a way that is not implemented here. A
key that is not known at all is refused unless it is empty or false: whoever wrote it meant something.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .patterns import Table, compiled, short
from .tensorfile import AdapterFileError, read_json

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG = 3 << 20
"""Bytes of configuration that we agree to parse: parsing can take some twenty-five times the memory."""

LORA_KEYS = frozenset(
    [
        "peft_type",
        "target_modules",
        "exclude_modules",
        "r",
        "lora_alpha",
        "use_rslora",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "init_lora_weights",
    ]
)
HARMLESS = frozenset(
    [
        "task_type",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "peft_version",
        "inference_mode",
        "lora_dropout",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
    ]
)
UNSUPPORTED = {
    "use_dora": "DoRA is not supported",
    "lora_bias": "a bias in the adapter is not supported",
    "modules_to_save": "modules trained in full are not supported",
    "trainable_token_indices": "trained embedding rows are not supported",
    "layer_replication": "replicated layers are not supported",
    "target_parameters": "adapters on bare parameters are not supported",
    "alora_invocation_tokens": "activated LoRA is not supported",
    "use_qalora": "adapters of quantised bases are not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "arrow_config": "Arrow routing is not supported",
    "kasa_config": "KaSA is not supported",
    "velora_config": "VeLoRA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "megatron_config": "Megatron layers are not supported",
    "ensure_weight_tying": "tied adapters are not supported",
}
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base weight alone; "pissa" and its like change it."""

MIN_ALPHA, MAX_ALPHA = 1e-30, 1e30
"""Beyond these a scaling could vanish or overflow."""


@dataclass(frozen=True)
class LayerConfig:
    """What the configuration says of one adapted layer.

    Attributes
    ----------
    rank : int
        The width between its factors.
    alpha : float
        ``lora_alpha`` as it is written.
    scaling : float
        What B A is multiplied by: alpha / r, or alpha / sqrt(r) where it is rank-stabilised.
    """

    rank: int
    alpha: float
    scaling: float


@dataclass(frozen=True)
class PeftConfig:
    """The part of adapter_config.json that decides what an adapter computes.

    Attributes
    ----------
    path : Path
        Where it was read.
    r : int
        Rank of the layers that `rank_pattern` does not name.
    lora_alpha : float
        Alpha of the layers that `alpha_pattern` does not name.
    use_rslora : bool
        Whether the scaling is alpha / sqrt(r) instead of alpha / r.
    fan_in_fan_out : bool
        Whether the base weights are stored (in, out) instead of (out, in).
    rank_pattern, alpha_pattern : dict
        Exceptions, by a regular expression for the end of a module's path. The first that matches decides.
    target_modules : list of str, or str
        The ends of the adapted modules' paths, or one regular expression.
    excludes : bool
        Whether some targets are excluded again.
    """

    path: Path
    r: int
    lora_alpha: float
    use_rslora: bool
    fan_in_fan_out: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: list[str] | str
    excludes: bool

    def layers(self, modules: list[str]) -> dict[str, LayerConfig]:
        """Return what it says of each module; refuse modules that `target_modules` does not name."""
        ranks = Table(self.path, "rank_pattern", self.rank_pattern, modules)
        alphas = Table(self.path, "alpha_pattern", self.alpha_pattern, modules)
        self._check_targets(modules)
        found = {}
        for module in modules:
            r, alpha = ranks.value(module, self.r), alphas.value(module, self.lora_alpha)
            found[module] = LayerConfig(r, alpha, alpha / math.sqrt(r) if self.use_rslora else alpha / r)
        return found

    def _check_targets(self, modules: list[str]) -> None:
        targets = self.target_modules
        if targets == "all-linear":
            return
        if isinstance(targets, str):
            (pattern,) = compiled(self.path, "target_modules", [targets], modules)
            strangers, idle = [m for m in modules if not pattern.fullmatch(m)], []
        else:
            wanted = set(targets)
            strangers = [m for m in modules if wanted.isdisjoint(_ends(m))]
            idle = [] if self.excludes else sorted(wanted.difference(*map(_ends, modules)))
        if strangers:
            raise AdapterFileError(
                self.path, f"target_modules does not name {strangers[0]!r}, for which there are tensors"
            )
        if idle:
            raise AdapterFileError(self.path, f"target_modules names {idle[0]!r}, for which there are no tensors")


def _ends(module: str) -> list[str]:
    """Return what a target may call a module: "enc.fc" ends in "enc.fc" and in "fc"."""
    parts = module.split(".")
    return [".".join(parts[n:]) for n in range(len(parts))]


def read_config(path: Path) -> PeftConfig:
    """Read adapter_config.json.

    Raises
    ------
    AdapterFileError
        If it is not sound JSON, a key has a value that it cannot have, or asks for what is not supported.
    """
    config = read_json(path, MAX_CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterFileError(path, f"peft_type is {kind!r}, expected 'LORA', the only kind supported")
    for key, value in config.items():
        if key in UNSUPPORTED and value not in (None, False, [], {}):
            raise AdapterFileError(path, f"{key} is {short(value)}: {UNSUPPORTED[key]}")
        if key not in LORA_KEYS | HARMLESS | UNSUPPORTED.keys() and value not in (None, False, [], {}, ""):
            raise AdapterFileError(path, f"{key} is {short(value)}: this key is not known")
    if config.get("bias") not in (None, "none"):
        raise AdapterFileError(path, f"bias is {short(config['bias'])}: trained biases are not supported")
    start = config.get("init_lora_weights")
    if not (start is None or isinstance(start, bool | str)) or start not in PLAIN_STARTS:
        raise AdapterFileError(
            path, f"init_lora_weights is {short(start)}: it may change the base weight, which is not supported"
        )
    return PeftConfig(
        path,
        r=_rank(path, "r", _or(config.get("r"), 8)),
        lora_alpha=_alpha(path, "lora_alpha", _or(config.get("lora_alpha"), 8)),
        use_rslora=_flag(path, config, "use_rslora"),
        fan_in_fan_out=_flag(path, config, "fan_in_fan_out"),
        rank_pattern={k: _rank(path, f"rank_pattern[{k!r}]", v) for k, v in _table(path, config, "rank_pattern")},
        alpha_pattern={k: _alpha(path, f"alpha_pattern[{k!r}]", v) for k, v in _table(path, config, "alpha_pattern")},
        target_modules=_targets(path, config.get("target_modules")),
        excludes=bool(config.get("exclude_modules")),
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _rank(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value < 2**31:
        raise AdapterFileError(path, f"{key} is {short(value)}, expected an integer of at least 1")
    return value


def _alpha(path: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not MIN_ALPHA < value < MAX_ALPHA:
        raise AdapterFileError(path, f"{key} is {short(value)}, expected a number from {MIN_ALPHA:g} to {MAX_ALPHA:g}")
    return float(value)


def _flag(path: Path, config: dict[str, Any], key: str) -> bool:
    value = _or(config.get(key), False)
    if not isinstance(value, bool):
        raise AdapterFileError(path, f"{key} is {short(value)}, expected true or false")
    return value


def _table(path: Path, config: dict[str, Any], key: str) -> Iterable[tuple[str, Any]]:
    value = _or(config.get(key), {})
    if not isinstance(value, dict):
        raise AdapterFileError(path, f"{key} is {short(value)}, expected an object")
    return value.items()


def _targets(path: Path, value: Any) -> list[str] | str:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(isinstance(name, str) and name for name in value):
        return value
    raise AdapterFileError(path, f"target_modules is {short(value)}, expected a list of names or a regular expression")
