"""The cases: adapters as PEFT writes them, each with what it is there for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ...files.peft import BASE, EMBEDDING_FACTORS, FACTORS, PREFIX
from ...files.tensors import FLOATS
from .bases import BIASED, TIED, TIED_NF4, TOKENS, UNTIED, UNTIED_NF4, Base, to_bfloat16
from .exact import product, sums
from .formulas import Arrays, Given, Module, scale, setting
from .prompts import PROMPTS

LENGTH = 6
"""Tokens of a prompt."""
SIZE = 1.3
"""How large an update is, as a part of the weight that it changes."""
Q, K, V, O = (f"self_attn.{name}_proj" for name in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
ALL = (Q, K, V, O, GATE, UP, DOWN)
EMBED, LM_HEAD = "model.embed_tokens", "lm_head"


def block(i: int, *names: str) -> tuple[str, ...]:
    """Return paths of modules in a block."""
    return tuple(f"model.layers.{i}.{name}" for name in names)


def blocks(*names: str) -> tuple[str, ...]:
    """Return paths of modules in both blocks of the untied base."""
    return (*block(0, *names), *block(1, *names))


@dataclass(frozen=True)
class Adapter:
    """What is drawn for one adapter: the paths that it adapts, and what its adapter_config.json says of them."""

    paths: tuple[str, ...]
    config: Mapping[str, Any]  # r, lora_alpha, and what is not as PEFT's defaults are
    pissa: str = ""  # "raw" or "converted", of one that started by PiSSA
    with_base: bool = False  # whether PEFT saved the base's own weight of an embedding or a head beside it
    saved: tuple[str, ...] = ()  # the paths that were trained in full, beside those with factors
    targets: str = ""  # target_modules, where it is a regular expression
    tokens: tuple[int, ...] = ()  # the tokens whose rows of the embedding were trained
    zero: bool = False  # whether lora_B is zero, as before the first step


@dataclass(frozen=True)
class Case:
    """A case: a base, adapters with their weights, and what is there to know."""

    id: str
    note: str
    adapters: tuple[tuple[Adapter, float], ...]
    base: Base = UNTIED
    refused: str = ""  # why, where it must be
    damage: str = ""  # what is done to the files, see `damaged`
    after: str = ""  # the id of the case that is to be answered just before, with the same prompts
    stored: str = ""  # the type of the tensors in the file, where it is not float32
    either: bool = False  # of one to be refused, whether it may be answered too

    @property
    def answered(self) -> bool:
        """Whether there are right numbers: of what must be refused, only where it can be converted too."""
        return not self.refused or self.either or self.adapters[0][0].pissa == "raw"

    @cached_property
    def given(self) -> list[tuple[Given, float]]:
        """The adapters, drawn."""
        rng = np.random.default_rng([*self.id.encode()])
        return [(in_type(drawn(rng, adapter, self.base), self.stored), weight) for adapter, weight in self.adapters]

    @cached_property
    def previous(self) -> list[tuple[Given, float]]:
        """The adapters of the case that is answered just before, where that matters."""
        return next((case.given for case in CASES if case.id == self.after), [])

    @cached_property
    def prompts(self) -> np.ndarray:
        """Token ids, (prompts, T), none of them special."""
        return np.array([self.prompt(seed) for seed in PROMPTS.get(self.after or self.id, (0, 1))])

    def prompt(self, seed: int) -> np.ndarray:
        """Draw one prompt, (T,)."""
        return np.random.default_rng([seed, *(self.after or self.id).encode()]).integers(2, len(TOKENS), LENGTH)

    @property
    def shown(self) -> str:
        """The name of the weight whose merged numbers are in the answers: the smallest."""
        paths = [path for given, _ in self.given for path in given.modules]
        return min((f"{path}.weight" for path in paths or block(0, K)), key=lambda name: self.base.arrays[name].size)


def drawn(rng: np.random.Generator, adapter: Adapter, base: Base) -> Given:
    """Draw an adapter's numbers, of bfloat16, so large that each part of it shows in the logits."""
    config = {"rank_pattern": {}, "alpha_pattern": {}, **adapter.config}
    modules: dict[str, Module] = {}
    starts: Arrays = {}
    for path in adapter.paths:
        W = base.arrays[f"{path}.weight"]
        W = W.T if path == EMBED else W
        out, width = map(int, W.shape)
        r, s = setting(config, "r", path), scale(config, path)
        spread = float(np.sqrt(np.square(W).mean()))
        A = rng.standard_normal((r, width)) / width**0.5
        B = rng.standard_normal((out, r)) * (SIZE * spread * width**0.5 / (s * r**0.5))
        bias = rounded(rng.standard_normal(out) / s) if config.get("lora_bias") else None
        m = rounded(rng.uniform(0.5, 2.0, out) * np.sqrt(sums(W * W))[:, 0]) if config.get("use_dora") else None
        if not adapter.pissa:
            trained = rounded(rng.standard_normal(out)) if config.get("bias") == "lora_only" else None
            modules[path] = Module(rounded(A), 0 * B if adapter.zero else rounded(B), bias, m, trained)
            continue
        A0, B0 = leading(W, r, s)
        A, B = rounded(A0 + 0.5 * A), rounded(B0 + 0.5 * B)
        if adapter.pissa == "raw":
            modules[path], starts[path] = Module(A, B), product(B0, A0.T)
        else:
            ends = np.concatenate([A, -A0]), np.concatenate([B, B0], axis=1)
            modules[path] = Module(*(end.astype(np.float32).astype(np.float64) for end in ends))
    if adapter.pissa == "converted":
        config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"]}
    saved = {path: base.arrays[f"{path}.weight"] for path in adapter.saved}
    saved = {
        path: rounded(W + 0.7 * np.sqrt(np.square(W).mean()) * rng.standard_normal(W.shape))
        for path, W in saved.items()
    }
    tokens: dict[str, tuple[list[int], np.ndarray]] = {}
    if adapter.tokens:
        W, which = base.arrays[f"{EMBED}.weight"], [*adapter.tokens]
        noise = rng.standard_normal((len(which), W.shape[1]))
        tokens[EMBED] = which, rounded(W[which] + np.sqrt(np.square(W).mean()) * noise)
    return Given(config, modules, starts, saved, tokens)


def in_type(given: Given, stored: str) -> Given:
    """Return an adapter whose factors are numbers of a file's type."""
    if not stored:
        return given

    def held(x: np.ndarray) -> np.ndarray:
        return x.astype(FLOATS[stored]).astype(np.float64)

    modules = {path: replace(m, lora_A=held(m.lora_A), lora_B=held(m.lora_B)) for path, m in given.modules.items()}
    return replace(given, modules=modules, stored=stored)


def rounded(x: np.ndarray) -> np.ndarray:
    """Return the nearest numbers of bfloat16, in float64."""
    return to_bfloat16(x).astype(np.float64)


def leading(W: np.ndarray, rank: int, s: float) -> tuple[np.ndarray, np.ndarray]:
    """Return PiSSA's factors A (r, in) and B (out, r) of a weight, by orthogonal iteration."""
    basis = np.eye(rank, W.shape[1])
    for _ in range(60):
        basis = _orthogonal(product(product(basis, W), W.T))
    u = product(basis, W)  # each row is a left vector times its singular value
    S = np.sqrt(sums(u * u))
    return np.sqrt(S / s) * basis, (u / S * np.sqrt(S / s)).T


def _orthogonal(rows: np.ndarray) -> np.ndarray:
    directions: list[np.ndarray] = []
    for row in rows:
        for other in directions:
            row = row - sums(row * other) * other
        directions.append(row / np.sqrt(sums(row * row)))
    return np.array(directions)


# --- as files -------------------------------------------------------------------------------------

DEFAULTS: dict[str, Any] = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": None, "bias": "none",
    "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {},
    "lora_bias": False, "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA", "rank_pattern": {},
    "revision": None, "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
}  # fmt: skip
"""The keys of adapter_config.json that PEFT has written for years, as it writes them."""


def files(case: Case) -> Iterator[tuple[dict[str, Any], Arrays]]:
    """Yield each adapter's configuration, and its tensors under PEFT's names."""
    for (adapter, _), (given, _) in zip(case.adapters, case.given, strict=True):
        yield damaged(*adapter_files(adapter, given, case.base), case.damage)


def adapter_files(adapter: Adapter, given: Given, base: Base) -> tuple[dict[str, Any], Arrays]:
    """Return an adapter's configuration, and its tensors under PEFT's names."""
    targets = adapter.targets or targets_of(list(given.modules), base)
    config = {**DEFAULTS, "base_model_name_or_path": f"bases/{base.name}", "target_modules": targets}
    tensors: Arrays = {}
    for path, module in given.modules.items():
        names = EMBEDDING_FACTORS if path == EMBED else FACTORS
        parts = {names[0]: module.lora_A, names[1]: module.lora_B}
        others = {
            "lora_B.bias": module.bias, "lora_magnitude_vector": module.magnitude,
            "base_layer.bias": module.trained_bias,
        }  # fmt: skip
        for name, array in others.items():
            parts |= {} if array is None else {name: array}
        if adapter.with_base and path in (EMBED, LM_HEAD):
            parts[BASE] = base.arrays[f"{path}.weight"]
        tensors |= {f"{PREFIX}{path}.{part}": array.astype(np.float32) for part, array in parts.items()}
    tensors |= {f"{PREFIX}{path}.weight": array.astype(np.float32) for path, array in given.saved.items()}
    for path, (which, rows) in given.tokens.items():
        config["trainable_token_indices"] = which
        tensors[f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"] = rows.astype(np.float32)
    return {**config, **given.config}, tensors


def targets_of(paths: list[str], base: Base) -> list[str]:
    """Return names for target_modules: the ends of paths, or whole paths where an end would name other modules too."""
    ends = {path.rpartition(".")[2] for path in paths}
    named = {name.removesuffix(".weight") for name in base.arrays if name.split(".")[-2] in ends}
    return sorted(ends if named == set(paths) else paths)


def damaged(config: dict[str, Any], tensors: Arrays, how: str) -> tuple[dict[str, Any], Arrays]:
    """Return files that must be refused."""
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
        case _ if how:
            key, value = how.split("=")
            config[key] = int(value) if value.lstrip("-").isdigit() else value
    return config, tensors


# --- the table --------------------------------------------------------------------------------------


def one(*paths: str, **config: Any) -> tuple[tuple[Adapter, float], ...]:
    """Return the adapters of a case that has one."""
    return ((Adapter(paths, config), 1.0),)


PATTERNS_OF_RANKS = {"model.layers.1.self_attn.q_proj": 7, "v_proj": 2}
PATTERNS_OF_ALPHAS = {"layers.1.mlp.up_proj": 3, "up_proj": 22, "model.layers.0.self_attn.v_proj": 1.5}
KEYS = {"model.layers.0.mlp": 7, "p_proj": 2, r"self_attn\.[qv]_proj": 90, "up_proj": 30}
TARGETS = r"model\.layers\.\d+\.(self_attn\.[qv]|mlp\.down)_proj"
PLAIN = one(*block(0, K, V), r=4, lora_alpha=10)

CASES = (
    Case(
        "all-linear",
        "An adapter beside each linear layer but the head.",
        one(*blocks(*ALL), r=4, lora_alpha=10),
    ),
    *(
        Case(
            f"{name.rpartition('.')[2].replace('_', '-')}-alone",
            f"An adapter of {name.rpartition('.')[2]} and of no other layer.",
            one(*block(0, name), r=3, lora_alpha=7),
            TIED,
        )
        for name in ALL
    ),
    Case(
        "rslora",
        "use_rslora: the scaling is alpha / sqrt(r).",
        one(*block(0, Q, V, GATE, DOWN), r=8, lora_alpha=6, use_rslora=True),
        TIED,
    ),
    Case(
        "rank-pattern",
        "rank_pattern, one key a whole path and one the end of several.",
        one(*blocks(Q, V, DOWN), r=4, lora_alpha=10, rank_pattern=PATTERNS_OF_RANKS),
    ),
    Case(
        "alpha-pattern",
        "alpha_pattern. Two of its keys match one module; the first decides.",
        one(*blocks(V, UP), r=4, lora_alpha=10, alpha_pattern=PATTERNS_OF_ALPHAS),
    ),
    Case(
        "both-patterns",
        "rank_pattern and alpha_pattern, which meet in some modules.",
        one(*blocks(Q, V, UP), r=4, lora_alpha=10, rank_pattern=PATTERNS_OF_RANKS, alpha_pattern=PATTERNS_OF_ALPHAS),
    ),
    Case(
        "pattern-keys",
        "alpha_pattern with a regular expression, and with keys that match no module: a path's start, a name's end.",
        one(*block(0, Q, V, UP), r=4, lora_alpha=10, alpha_pattern=KEYS),
        TIED,
    ),
    Case(
        "rslora-with-patterns",
        "use_rslora with both patterns: the root is that of each module's own rank.",
        one(
            *blocks(Q, V, UP),
            r=4,
            lora_alpha=5,
            use_rslora=True,
            rank_pattern=PATTERNS_OF_RANKS,
            alpha_pattern=PATTERNS_OF_ALPHAS,
        ),
    ),
    Case(
        "mixed-ranks",
        "Layers that programs put into one matrix, q with k with v and gate with up, have ranks of their own.",
        one(
            *block(0, Q, K, V, GATE, UP),
            r=4,
            lora_alpha=9,
            rank_pattern={"q_proj": 2, "v_proj": 5, "up_proj": 6},
        ),
        TIED,
    ),
    Case(
        "lora-bias",
        "lora_bias: B has a bias, which the scaling multiplies too.",
        one(*block(0, Q, UP), r=4, lora_alpha=10, lora_bias=True),
        TIED,
    ),
    Case(
        "dora",
        "use_dora: each row of W + s B A gets the length that its magnitude says.",
        one(*block(0, Q, V, DOWN), r=4, lora_alpha=1, use_dora=True),
        TIED,
    ),
    Case(
        "dora-rslora",
        "use_dora with use_rslora and both patterns.",
        one(
            *block(0, V, GATE),
            r=4,
            lora_alpha=5,
            use_dora=True,
            use_rslora=True,
            rank_pattern={"v_proj": 7},
            alpha_pattern={"gate_proj": 11},
        ),
        TIED,
    ),
    Case(
        "embedding",
        "An adapter of embed_tokens beside others. As PEFT does, the base's own embedding is saved beside it.",
        ((Adapter((EMBED, *blocks(V, DOWN)), {"r": 4, "lora_alpha": 10}, with_base=True), 1.0),),
    ),
    Case(
        "tied-embedding",
        "An adapter of embed_tokens where the head is tied: the head stays as it was.",
        one(EMBED, r=4, lora_alpha=10),
        TIED,
    ),
    Case("head", "An adapter of lm_head.", one(*block(1, O), LM_HEAD, r=4, lora_alpha=10)),
    Case(
        "tied-head",
        "An adapter of lm_head where the head is tied: the embedding stays as it was.",
        one(LM_HEAD, r=4, lora_alpha=10),
        TIED,
    ),
    Case(
        "square-factor",
        "The rank is the input's width, so that lora_A is square: its shape does not show which way round it lies.",
        one(*block(0, V), r=64, lora_alpha=40),
        TIED,
    ),
    Case(
        "pissa-converted",
        "An adapter that started by PiSSA, as its difference from the start, of twice the rank.",
        ((Adapter(block(0, V), {"r": 2, "lora_alpha": 3}, pissa="converted"), 1.0),),
        TIED,
    ),
    Case(
        "pissa-raw",
        "The same trained factors as PiSSA leaves them: init_lora_weights says that the base was changed at the start. "
        "To be refused, or converted: the answers are those of the conversion.",
        ((Adapter(block(0, V), {"r": 2, "lora_alpha": 3, "init_lora_weights": "pissa"}, pissa="raw"), 1.0),),
        TIED,
        refused="init_lora_weights is pissa: the base was changed before the training",
    ),
    *(
        Case(
            f"nf4-{base.name.removesuffix('-nf4')}",
            "A base in NF4, its scales quantised too, as bitsandbytes writes it.",
            one(*block(0, Q, V, DOWN), r=4, lora_alpha=10),
            base,
        )
        for base in (UNTIED_NF4, TIED_NF4)
    ),
    Case(
        "two-adapters",
        "Two adapters summed with weights, one of them negative; their ranks, alphas and modules differ.",
        (
            (Adapter(block(0, Q, V, DOWN), {"r": 4, "lora_alpha": 26}), 2.0),
            (Adapter(block(0, V, GATE), {"r": 3, "lora_alpha": 4, "use_rslora": True}), -0.75),
        ),
        TIED,
    ),
    *(
        Case(f"refused-{name}", note, PLAIN, TIED, refused=note, damage=how)
        for name, how, note in (
            ("rank-zero", "r=0", "r is 0."),
            ("rank-negative", "r=-4", "r is negative."),
            ("unknown-start", "init_lora_weights=simplex", "init_lora_weights names a start that nobody knows."),
            ("missing-factor", "no factor", "A module has a lora_A and no lora_B."),
            ("another-rank", "another rank", "A lora_B has another rank than its lora_A and the configuration."),
            ("another-shape", "another shape", "A lora_B has other outputs than the base's weight."),
            ("transposed", "transposed", "A module's factors are transposed, and no shape fits."),
            ("no-prefix", "no prefix", "The tensors' names lack the prefix base_model.model."),
            ("unknown-module", "unknown module", "Tensors are of a module that the base has not: layers.7."),
        )
    ),
    Case(
        "modules-to-save",
        "modules_to_save: lm_head was trained in full, and the file has its weight.",
        ((Adapter(block(0, V), {"r": 4, "lora_alpha": 10, "modules_to_save": ["lm_head"]}, saved=(LM_HEAD,)), 1.0),),
    ),
    Case(
        "bias-lora-only",
        'bias="lora_only": the base\'s biases were trained where there is an adapter, and the file has them.',
        one(*block(0, Q, V), r=4, lora_alpha=10, bias="lora_only"),
        BIASED,
    ),
    Case(
        "target-modules-pattern",
        "target_modules is a regular expression: what has tensors has an adapter, and no name decides.",
        ((Adapter(block(0, Q, V, DOWN), {"r": 4, "lora_alpha": 10}, targets=TARGETS), 1.0),),
        TIED,
    ),
    Case(
        "shared-prompts-first",
        "The first of two adapters that are asked the same prompts.",
        one(*block(0, V, GATE), r=4, lora_alpha=10),
        TIED,
    ),
    Case(
        "shared-prompts-second",
        "The second of two adapters that are asked the same prompts: nothing of the first may be left. Answer it just "
        "after the first, in the same process.",
        one(*block(0, K, V, DOWN), r=3, lora_alpha=8),
        TIED,
        after="shared-prompts-first",
    ),
    Case(
        "base-alone",
        "The base without an adapter. Where this is wrong, the decoder is, and what other cases say does not count.",
        (),
        TIED,
    ),
)
