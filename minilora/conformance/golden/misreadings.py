"""The bugs of programs that read adapters, a row each: what such a program computes, and in whose code it was made.

A bug is `Formulas` with some parts replaced. A row is all there is to add: each case in which the bug makes a
difference then carries its numbers, as the bug's *signature*, and a program that answers with these numbers is told.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...layers.rotary import halves_from_interleaved, interleaved_from_halves
from .bases import EMBEDDING
from .formulas import PATTERNS, Config, lengths, matching, scale, scaled, setting

HEAD_DIM = 64
EMBED = EMBEDDING.removesuffix(".weight")


@dataclass(frozen=True)
class Bug:
    """A known bug. ``str(bug)`` is its name, and where it was made."""

    flag: str  # its identifier, which stays
    name: str  # the diagnosis, as it is told
    parts: Mapping[str, Any]  # what it replaces of `Formulas`
    source: str = ""  # where it was made in public, as "owner/repository #issue"

    def __str__(self) -> str:
        return f"{self.name} (made in {self.source})" if self.source else self.name


def _alpha(config: Config, path: str) -> float:
    return float(setting(config, "lora_alpha", path))


def _rank(config: Config, path: str) -> int:
    return int(setting(config, "r", path))


def _last(config: Config, path: str) -> float:
    alpha = [config["lora_alpha"], *matching(config, "lora_alpha", path)][-1]
    rank = [config["r"], *matching(config, "r", path)][-1]
    return scaled(config, alpha, rank)


def _whole_paths(config: Config, path: str) -> float:
    alpha, rank = config.get("alpha_pattern", {}), config.get("rank_pattern", {})
    return scaled(config, alpha.get(path, config["lora_alpha"]), rank.get(path, config["r"]))


def _matching_by(matches: Callable[[str, str], Any]) -> Callable[[Config, str], float]:
    """Return the scaling where another rule says which key of a pattern matches a path."""

    def found(config: Config, key: str, path: str) -> Any:
        pattern = config.get(PATTERNS[key], {})
        return next((value for name, value in pattern.items() if matches(name, path)), config[key])

    return lambda config, path: scaled(config, found(config, "lora_alpha", path), found(config, "r", path))


def _unpermuted(path: str, A: np.ndarray, B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return A, halves_from_interleaved(B, HEAD_DIM) if path.endswith(("q_proj", "k_proj")) else B


def _permuted(path: str, A: np.ndarray, B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return A, interleaved_from_halves(B, HEAD_DIM) if path.endswith(("q_proj", "k_proj")) else B


def _other_heads(path: str, A: np.ndarray, B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return A, np.roll(B, HEAD_DIM, axis=0) if path.endswith(("k_proj", "v_proj")) else B


def _transposed(path: str, A: np.ndarray, B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (A.T if A.shape[0] == A.shape[1] else A), (B.T if B.shape[0] == B.shape[1] else B)


def _without_last_rank(path: str, A: np.ndarray, B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return A[:-1], B[:, :-1]


def _swapped(one: str, other: str) -> Any:
    """Return where the adapters of two modules go that are exchanged."""

    def place(path: str) -> str:
        head, last = path.rpartition(".")[::2]
        return f"{head}.{other if last == one else one if last == other else last}".lstrip(".")

    return place


def _without(pattern: str) -> Any:
    return lambda path: re.search(pattern, path) is None


def _turned_layers(path: str) -> str:
    return re.sub(r"(?<=^model\.layers\.)[01]", lambda match: str(1 - int(match[0])), path)


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")

BUGS = (
    # the scaling, where the configuration says more than r and lora_alpha
    Bug(
        "rslora-root-is-ignored",
        "rsLoRA's root is ignored: alpha is divided by the rank, and should be divided by its root",
        {"scale": lambda c, p: _alpha(c, p) / _rank(c, p)},
        "vllm-project/vllm #10798, NVIDIA/TensorRT-LLM #1668, sgl-project/sglang #40835",
    ),
    Bug(
        "rank-pattern-is-dropped-in-the-scaling",
        "rank_pattern is dropped in the scaling: alpha is divided by r for all modules",
        {"scale": lambda c, p: scaled(c, _alpha(c, p), c["r"])},
        "vllm-project/vllm-omni #6565, huggingface/peft #2194, huggingface/diffusers #14409",
    ),
    Bug(
        "alpha-pattern-is-dropped",
        "alpha_pattern is dropped: lora_alpha is taken for all modules",
        {"scale": lambda c, p: scaled(c, c["lora_alpha"], _rank(c, p))},
        "vllm-project/vllm-omni #6565",
    ),
    Bug(
        "both-patterns-are-dropped",
        "rank_pattern and alpha_pattern are dropped: r and lora_alpha are taken for all modules",
        {"scale": lambda c, p: scaled(c, c["lora_alpha"], c["r"])},
        "vllm-project/vllm-omni #6565",
    ),
    Bug(
        "root-and-patterns-are-dropped",
        "rsLoRA's root is ignored, and rank_pattern and alpha_pattern are dropped",
        {"scale": lambda c, p: c["lora_alpha"] / c["r"]},
    ),
    Bug(
        "root-and-alpha-pattern-are-dropped",
        "rsLoRA's root is ignored, and alpha_pattern is dropped: the scaling is lora_alpha / rank",
        {"scale": lambda c, p: c["lora_alpha"] / _rank(c, p)},
    ),
    Bug(
        "the-last-pattern-decides",
        "of several patterns that match a module the last one decides, and should the first",
        {"scale": _last},
    ),
    Bug(
        "patterns-are-whole-paths-alone",
        "patterns are compared with whole paths alone, and are regular expressions for the end of a path",
        {"scale": _whole_paths},
    ),
    Bug(
        "patterns-match-anywhere",
        "a pattern is looked for at a path's start or anywhere in it, and has to match up to its end",
        {"scale": _matching_by(lambda key, path: re.search(key, path))},
    ),
    Bug(
        "patterns-are-no-regular-expressions",
        "patterns are compared as plain text with the end of a path, and are regular expressions",
        {"scale": _matching_by(lambda key, path: f".{path}".endswith(f".{key}"))},
    ),
    Bug(
        "patterns-are-the-ends-of-names",
        "patterns are compared as plain text with the end of a path, also in the midst of a name",
        {"scale": _matching_by(lambda key, path: path.endswith(key))},
    ),
    Bug(
        "alpha-is-divided-in-whole-numbers",
        "alpha is divided by the rank in whole numbers, and rounded down",
        {"scale": lambda c, p: float(_alpha(c, p) // _rank(c, p))},
    ),
    # DoRA
    Bug(
        "dora-magnitude-is-ignored",
        "DoRA's magnitude is ignored: this is LoRA",
        {"gain": lambda m, n: np.ones_like(n)},
    ),
    Bug(
        "dora-magnitude-is-not-read",
        "DoRA's magnitude is not read from the file: rows keep the lengths of W, as before the training",
        {"magnitude": lambda m, W: lengths(W)},
        "transformers 5.24.0",
    ),
    Bug(
        "dora-norm-is-that-of-w",
        "DoRA's norm is that of W, and should be that of W + s B A",
        {"length": lambda W, BA, s: np.sqrt((W * W).cumsum(axis=1)[:, -1:])},
        "Comfy-Org/ComfyUI #15458",
    ),
    Bug(
        "dora-norm-lacks-the-scaling",
        "DoRA's norm lacks the scaling: it is that of W + B A, and should be that of W + s B A",
        {"length": lambda W, BA, s: np.sqrt(((W + BA) ** 2).cumsum(axis=1)[:, -1:])},
    ),
    Bug(
        "dora-norm-is-taken-along-the-wrong-axis",
        "DoRA's norm is taken along the wrong axis: of each column of W + s B A, and should be of each row",
        {"length": lambda W, BA, s: np.sqrt(((W + s * BA) ** 2).cumsum(axis=0)[-1:])},
        "wanshuiyin/ARIS-in-AI-Offer #17",
    ),
    # what else stands in a file
    Bug(
        "lora-bias-is-ignored",
        "the adapter's bias (lora_bias) is ignored",
        {"bias": lambda b, s: 0 * b},
    ),
    Bug(
        "lora-bias-lacks-the-scaling",
        "the adapter's bias (lora_bias) lacks the scaling",
        {"bias": lambda b, s: b},
    ),
    Bug(
        "the-tied-head-is-changed-too",
        "the tied head is changed with the embedding, or the embedding with the head: an adapter changes one alone",
        {"ties": True},
        "huggingface/peft #2777",
    ),
    Bug(
        "pissa-start-is-not-taken-off",
        "PiSSA's start is not taken off the base: init_lora_weights was passed over",
        {"start": 0.0},
    ),
    # a base in 4 bits
    Bug(
        "nf4-nibbles-are-swapped",
        "the two 4-bit codes of a byte are taken in the other order: the first is in the upper half",
        {"base": "swapped"},
        "paiml/entrenar #298",
    ),
    Bug(
        "nf4-mean-of-scales-is-left-out",
        "the mean of the 4-bit blocks' scales (nested_offset) is not added to the dequantised scales",
        {"base": "no mean"},
    ),
    # several adapters
    Bug(
        "the-weights-of-adapters-are-ignored",
        "the weights of several adapters are ignored: each is added once",
        {"weights": lambda weights: [1.0] * len(weights)},
    ),
    Bug(
        "a-negative-weight-is-taken-as-positive",
        "an adapter with a negative weight is added, and should be subtracted",
        {"weights": lambda weights: [abs(w) for w in weights]},
        "huggingface/peft #2918",
    ),
    Bug(
        "the-weights-of-adapters-go-into-both-factors",
        "the weights of several adapters go into both factors: they act squared",
        {"weights": lambda weights: [w * abs(w) for w in weights]},
    ),
    Bug(
        "the-weights-of-adapters-are-divided-by-their-number",
        "the weights of several adapters are divided by the number of adapters",
        {"weights": lambda weights: [w / len(weights) for w in weights]},
    ),
    Bug(
        "the-last-adapter-alone-is-applied",
        "of several adapters the last alone is applied",
        {"weights": lambda weights: [0.0] * (len(weights) - 1) + [*weights[-1:]] if len(weights) > 1 else weights},
    ),
    Bug(
        "the-first-adapter-alone-is-applied",
        "of several adapters the first alone is applied",
        {"weights": lambda weights: [*weights[:1], *[0.0] * (len(weights) - 1)]},
    ),
    Bug(
        "the-first-configuration-is-taken-for-all-adapters",
        "the first adapter's configuration is taken for all adapters",
        {"config_of": lambda i: 0},
    ),
    # one kind of module is left out; where there is no other, that is the whole update
    *(
        Bug(
            f"{name.replace('_', '-')}-is-left-out",
            f"the adapter of {name} is not applied",
            {"applied": _without(name)},
        )
        for name in TARGETS
    ),
    # the update as a whole
    Bug("the-adapter-is-not-applied", "the adapter is not applied: this is the base", {"applied": lambda path: False}),
    Bug("the-update-is-added-twice", "the update is added twice", {"times": 2.0}, "huggingface/peft #3774"),
    Bug("the-update-is-subtracted", "the update is subtracted", {"times": -1.0}, "vllm-project/vllm #48437"),
    # the scaling of all modules
    Bug(
        "alpha-is-not-divided-by-the-rank",
        "alpha is not divided by the rank: the scaling is alpha",
        {"scale": _alpha},
        "Blaizzy/mlx-vlm #846",
    ),
    Bug(
        "alpha-is-divided-by-the-root-of-the-rank",
        "alpha is divided by the root of the rank, as with use_rslora, and should be divided by the rank",
        {"scale": lambda c, p: _alpha(c, p) / math.sqrt(_rank(c, p))},
    ),
    Bug("there-is-no-scaling", "there is no scaling: the update is B A as it is", {"scale": lambda c, p: 1.0}),
    Bug("alpha-is-ignored", "alpha is ignored: the scaling is 1 / r", {"scale": lambda c, p: 1 / _rank(c, p)}),
    Bug(
        "the-scaling-is-r-alpha",
        "the scaling is r / alpha, upside down",
        {"scale": lambda c, p: _rank(c, p) / _alpha(c, p)},
    ),
    Bug(
        "the-scaling-is-applied-twice",
        "the scaling is applied twice",
        {"scale": lambda c, p: scale(c, p) ** 2},
    ),
    Bug(
        "alpha-is-divided-in-whole-numbers",
        "alpha is divided by the rank in whole numbers, and rounded down",
        {"scale": lambda c, p: float(_alpha(c, p) // _rank(c, p))},
    ),
    # places
    Bug(
        "k-and-v-are-swapped",
        "the adapters of k_proj and v_proj are exchanged",
        {"place": _swapped("k_proj", "v_proj")},
    ),
    Bug(
        "gate-and-up-are-swapped",
        "the adapters of gate_proj and up_proj are exchanged",
        {"place": _swapped("gate_proj", "up_proj")},
        "sgl-project/sglang #27274",
    ),
    Bug("layers-are-swapped", "the adapters of the layers 0 and 1 are exchanged", {"place": _turned_layers}),
    Bug("attention-is-left-out", "the adapters of attention are not applied", {"applied": _without("self_attn")}),
    Bug("the-mlp-is-left-out", "the adapters of the MLP are not applied", {"applied": _without(r"\.mlp\.")}),
    *(
        Bug(
            f"layer-{i}-is-left-out",
            f"the adapters of layer {i} are not applied",
            {"applied": _without(rf"layers\.{i}\.")},
        )
        for i in range(2)
    ),
    # the factors
    Bug(
        "a-square-factor-is-transposed",
        "a square factor is transposed",
        {"factors": _transposed},
    ),
    Bug(
        "the-update-is-read-the-other-way-round",
        "the factors are exchanged: the update comes out as (in, out), and its numbers are taken as (out, in)",
        {"update": lambda path, BA: BA.T.reshape(BA.shape)},
    ),
    Bug(
        "the-update-of-embed-tokens-is-not-transposed",
        "the update of embed_tokens is reshaped to (V, dim), and has to be transposed",
        {"update": lambda path, BA: BA.reshape(BA.shape[::-1]).T if path == EMBED else BA},
    ),
    Bug(
        "lora-b-is-reshaped",
        "lora_B is read in another order: its numbers as (r, out), transposed",
        {"factors": lambda path, A, B: (A, B.reshape(B.shape[::-1]).T)},
        "unslothai/unsloth-zoo #1269",
    ),
    Bug(
        "lora-a-is-reshaped",
        "lora_A is read in another order: its numbers as (in, r), transposed",
        {"factors": lambda path, A, B: (A.reshape(A.shape[::-1]).T, B)},
    ),
    Bug(
        "both-factors-are-reshaped",
        "both factors are read in another order: their numbers as those of the transposed matrices",
        {"factors": lambda path, A, B: (A.reshape(A.shape[::-1]).T, B.reshape(B.shape[::-1]).T)},
    ),
    Bug(
        "the-last-rank-is-dropped",
        "the last rank is dropped",
        {"factors": _without_last_rank},
    ),
    Bug(
        "the-order-of-ranks-differs-between-the-factors",
        "the ranks stand in another order in one factor than in the other",
        {"factors": lambda path, A, B: (A[::-1], B)},
        "huggingface/diffusers #13998",
    ),
    Bug(
        "rows-of-q-and-k-are-not-permuted",
        "rows of lora_B of q_proj and k_proj are not permuted as the base's are in a .gguf file",
        {"factors": _unpermuted},
    ),
    Bug(
        "rows-of-q-and-k-are-permuted",
        "rows of lora_B of q_proj and k_proj are permuted as for a .gguf file, and the base's are not",
        {"factors": _permuted},
    ),
    Bug(
        "heads-of-k-and-v-are-exchanged",
        "the update's key and value heads are exchanged",
        {"factors": _other_heads},
    ),
)
