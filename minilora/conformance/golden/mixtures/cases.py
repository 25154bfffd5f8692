"""The cases of mixtures: adapters as PEFT writes them, each with what it is there for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ....files.experts import MIXTRAL_MLP, WRITTEN_AS, layer_paths
from ....files.peft import FACTORS, PREFIX
from ..bases import TOKENS
from ..cases import DEFAULTS, rounded
from ..formulas import Arrays, Given, Module, scale, setting
from .bases import (
    DOUBLE,
    DOWN,
    EXPERTS,
    FUSED,
    GATE_UP,
    LAYER,
    ROUTER,
    SHARED,
    SHARING,
    SQUARE,
    MixtureBase,
)  # fmt: skip
from .formulas import MixtureFormulas, is_turned, site
from .prompts import MIXTURE_PROMPTS

LENGTH = 4
"""Tokens of a prompt."""
APART = 0.75
"""How far a bug moves some logit at a prompt's end, and the least by which the likeliest next token leads."""
MARGIN = 0.25
"""How far the scores of a kept expert and of the next one are apart at least, so that rounding keeps the same ones."""
SIZE = 1.3
"""How large an update is, as a part of the weight that it changes."""
PAIR = (GATE_UP, DOWN)
ATTENTION = (f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.v_proj")
SHARED_LAYERS = tuple(f"{SHARED}.{name}_proj" for name in ("gate", "up", "down"))


@dataclass(frozen=True)
class MixtureCase:
    """A case: a base, what is adapted by its path, and what its adapter_config.json says."""

    id: str
    note: str
    base: MixtureBase
    paths: tuple[str, ...]
    config: Mapping[str, Any]  # r, lora_alpha, and what is not as PEFT's defaults are
    refused: str = ""  # why, where it must be: the last expert's factors are missing then

    @property
    def answered(self) -> bool:
        """Whether there are right numbers."""
        return not self.refused

    @property
    def adapters(self) -> tuple[tuple[None, float], ...]:
        """It has one."""
        return ((None, 1.0),)

    after = ""

    @cached_property
    def given(self) -> Given:
        """The adapter, drawn, its factors as they lie in the file."""
        rng = np.random.default_rng([*self.id.encode()])
        config: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
        if any(path in self.base.arrays for path in self.paths):
            config["peft_version"] = WRITTEN_AS
        config |= self.config
        modules = {path: _drawn(rng, config, path, self.base) for path in self.paths}
        return Given(config, modules)

    @cached_property
    def prompts(self) -> np.ndarray:
        """Token ids, (2, T), none of them special; the last ones of the two keep all four experts."""
        return np.array([self.prompt(seed) for seed in MIXTURE_PROMPTS.get(self.id, (0, 1))])

    def prompt(self, seed: int) -> np.ndarray:
        """Draw one prompt, (T,)."""
        return np.random.default_rng([seed, *self.id.encode()]).integers(2, len(TOKENS), LENGTH)

    @cached_property
    def shown(self) -> str:
        """The name of the weight whose merged numbers are in the answers: the smallest, but none of expert 0 alone.

        Several bugs leave that one right. Of a base with a tensor for all experts there is none: it would be large.
        """
        if self.base.fused:
            return ""
        arrays = self.base.arrays
        before, after = (
            self.base.in_file({**arrays, **more}) for more in ({}, MixtureFormulas().changed(arrays, self.given))
        )
        names = [name for name, W in before.items() if ".experts.0." not in name and (after[name] != W).any()]
        return min(names, key=lambda name: (before[name].size, before[name].shape[-1]))


def _drawn(rng: np.random.Generator, config: Mapping[str, Any], path: str, base: MixtureBase) -> Module:
    """Draw a pair of factors, of bfloat16, so large that each part of it shows in the logits."""
    name, expert, rows = site(path, path, base.arrays)
    W = base.arrays[name]
    count = len(W) if W.ndim == 3 and expert is None else 1
    out, width = W[0][rows].shape if W.ndim == 3 else W.shape
    r, s, spread = setting(config, "r", path), scale(config, path), float(np.sqrt(np.square(W).mean()))
    length = width**0.5
    if is_turned(config) and count > 1:
        out, width = width, out
    A = rng.standard_normal((count * r, width)) / length
    B = rng.standard_normal((out, r * count)) * (SIZE * spread * length / (s * r**0.5))
    return Module(rounded(A), rounded(B))


# --- as files -------------------------------------------------------------------------------------


def mixture_files(case: MixtureCase) -> tuple[dict[str, Any], Arrays]:
    """Return the adapter's configuration, and its tensors under PEFT's names."""
    arrays, modules = case.base.arrays, case.given.modules
    parameters = [path for path in modules if path in arrays]
    place_of = layer_paths(parameters)
    config = {**DEFAULTS, "base_model_name_or_path": f"bases/{case.base.name}", **case.given.config}
    config["target_modules"] = _targets([path for path in modules if path not in arrays])
    if parameters:
        config["target_parameters"] = [path.removeprefix(f"{LAYER}.") for path in parameters]
    tensors: Arrays = {}
    for path, module in modules.items():
        A, B = module.lora_A, module.lora_B
        if case.refused:
            r = setting(config, "r", path)
            A, B = A[:-r], B[:, np.arange(B.shape[1]) % EXPERTS < EXPERTS - 1]
        names = (f"{PREFIX}{place_of.get(path, path)}.{part}" for part in FACTORS)
        tensors |= {name: np.ascontiguousarray(array, np.float32) for name, array in zip(names, (A, B), strict=True)}
    return config, tensors


def _targets(paths: list[str]) -> list[str]:
    """Return names for target_modules: the ends of paths, but more of a shared expert's, as experts have the same."""
    old = any(".experts." in path for path in paths)
    ends = {path: path.rpartition(".")[2] if old or path in ATTENTION else path for path in paths}
    return sorted({end.removeprefix(f"{LAYER}.") for end in ends.values()})


# --- the table --------------------------------------------------------------------------------------


def each(block: str, *parts: str) -> tuple[str, ...]:
    """Return the paths of old: of the weights of each expert."""
    return tuple(f"{LAYER}.{block}.experts.{e}.{part}" for e in range(EXPERTS) for part in parts)


MIXTURES = (
    MixtureCase(
        "experts-double",
        "A Mixtral with a tensor for each expert, d = 2 m. Its experts' two arrays are adapted, by target_parameters, "
        "and two layers of attention, by target_modules.",
        DOUBLE, (*PAIR, *ATTENTION), {"r": 3, "lora_alpha": 10},
    ),
    MixtureCase(
        "experts-fused",
        "The same Mixtral with a tensor for all experts.",
        FUSED, PAIR, {"r": 3, "lora_alpha": 8},
    ),
    MixtureCase(
        "experts-gate-up-alone",
        "gate_up_proj alone: its factors then have the name that down_proj's have where both are adapted.",
        FUSED, (GATE_UP,), {"r": 3, "lora_alpha": 10},
    ),
    MixtureCase(
        "experts-square",
        "A Mixtral with d = m: an expert's down_proj is square, so no shape shows in from out.",
        SQUARE, (*PAIR, *ATTENTION), {"r": 3, "lora_alpha": 10},
    ),
    MixtureCase(
        "experts-shared",
        "A Qwen2-MoE, whose shares are not renormalised: adapters of its experts, and of its shared expert's layers.",
        SHARING, (*PAIR, *SHARED_LAYERS), {"r": 3, "lora_alpha": 10},
    ),
    MixtureCase(
        "experts-rslora",
        "use_rslora with two ranks: the root is that of one expert's rank in each array.",
        SHARING, PAIR, {"r": 3, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"gate_up_proj": 5}},
    ),
    MixtureCase(
        "experts-router",
        "An adapter of the router, a parameter there, beside those of the experts.",
        SQUARE, (*PAIR, ROUTER), {"r": 3, "lora_alpha": 10},
    ),
    MixtureCase(
        "experts-lora-b-layout",
        "lora_B_layout is grouped_by_expert: lora_B has the expert as its slow index, as lora_A has it.",
        DOUBLE, PAIR, {"r": 3, "lora_alpha": 10, "lora_B_layout": "grouped_by_expert"},
    ),
    MixtureCase(
        "experts-peft-0-19-0",
        "Written by PEFT 0.19.0, which took (out, in) for (in, out): lora_A is as wide as the output, and a weight "
        "changes by (B_e A_e)^T. Nothing but peft_version shows it.",
        SQUARE, (DOWN,), {"r": 3, "lora_alpha": 10, "peft_version": "0.19.0"},
    ),
    MixtureCase(
        "experts-old-names",
        "The names of before, an adapter for each weight of each expert, in a Qwen2-MoE and its shared expert.",
        SHARING, (*each("mlp", "gate_proj", "up_proj", "down_proj"), *SHARED_LAYERS), {"r": 3, "lora_alpha": 10},
    ),
    MixtureCase(
        "experts-old-names-rslora",
        "The names of before with use_rslora, in a Mixtral: gate and up each have a root of their own.",
        DOUBLE, each(MIXTRAL_MLP, "w1", "w3", "w2"), {"r": 3, "lora_alpha": 5, "use_rslora": True},
    ),
    MixtureCase(
        "experts-refused-missing-expert",
        "The factors are those of three experts, and the base has four.",
        DOUBLE, PAIR, {"r": 3, "lora_alpha": 10},
        refused="The factors are those of three experts, and the base has four.",
    ),
)  # fmt: skip
