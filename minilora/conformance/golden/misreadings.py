"""The bugs of programs that read adapters, a row each: what such a program computes, and in whose code it was made.

A bug is `Formulas` with some parts replaced. A row is all there is to add: each case in which the bug makes a
difference then carries its numbers, as the bug's *signature*, and a program that answers with these numbers is told.
A mistake that layers make too is a row of `minilora.conformance.problems.bugs`, and `known` by its flag here.

Where several bugs give the same numbers, the first row is named: what is left out of one kind of module stands before
what is left out of all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...files.tensors import FLOATS
from ...layers.rotary import halves_from_interleaved, interleaved_from_halves
from ..problems import bugs as table
from .bases import EMBEDDING
from .formulas import PATTERNS, Config, lengths, matching, scale, scaled, setting

HEAD_DIM = 64
EMBED = EMBEDDING.removesuffix(".weight")


@dataclass(frozen=True)
class Misreading:
    """A bug of a program that reads adapters."""

    flag: str  # its identifier, which stays
    name: str  # the diagnosis, as it is printed
    parts: Mapping[str, Any]  # what it replaces of `Formulas`
    source: str = ""  # where it was made in public, as "owner/repository #issue"


def known(flag: str, parts: Mapping[str, Any], *, says: str | None = None, source: str | None = None) -> Misreading:
    """Return a bug of the suite's table, as a program makes it that reads files.

    Its sentence is that of the table, or `says` where the words are others for files, which have use_rslora and no V.
    Its source is that of the table, or `source` where other code made it when it read files.
    """
    bug = table.known(flag)
    return Misreading(flag, says or bug.says, parts, bug.source if source is None else source)


def _alpha(config: Config, path: str) -> float:
    return float(setting(config, "lora_alpha", path))


def _rank(config: Config, path: str) -> int:
    return int(setting(config, "r", path))


def _alpha_cut(config: Config, path: str) -> float:
    alpha = _alpha(config, path)
    return float(int(alpha)) if alpha == config["lora_alpha"] else alpha


def _as_float16(stored: str, x: np.ndarray) -> np.ndarray:
    return x.astype(FLOATS["BF16"]).view("<f2").astype(np.float64) if stored == "BF16" else x


def _square(W: np.ndarray) -> bool:
    return bool(W.shape[0] == W.shape[1])


def _last(config: Config, path: str) -> float:
    alpha = [config["lora_alpha"], *matching(config, "lora_alpha", path)][-1]
    rank = [config["r"], *matching(config, "r", path)][-1]
    return scaled(config, alpha, rank)


def _whole_paths(config: Config, path: str) -> float:
    alpha, rank = config.get("alpha_pattern", {}), config.get("rank_pattern", {})
    return scaled(config, alpha.get(path, config["lora_alpha"]), rank.get(path, config["r"]))


def _matching_by(matches: Callable[[str, str], Any]) -> Callable[[Config, str], float]:
    """Return the scaling where another rule says which key of a pattern matches a path."""

    def value(config: Config, key: str, path: str) -> Any:
        pattern = config.get(PATTERNS[key], {})
        return next((number for name, number in pattern.items() if matches(name, path)), config[key])

    return lambda config, path: scaled(config, value(config, "lora_alpha", path), value(config, "r", path))


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

# fmt: off
MISREADINGS: Sequence[Misreading] = (
    # the scaling, where the configuration says more than r and lora_alpha
    known("rslora-root-is-ignored", {"scale": lambda c, p: _alpha(c, p) / _rank(c, p)},
          source="vllm-project/vllm #10798, NVIDIA/TensorRT-LLM #1668, sgl-project/sglang #40835"),
    Misreading("rank-pattern-is-dropped-in-the-scaling",
               "rank_pattern is dropped in the scaling: alpha is divided by r for all modules",
               {"scale": lambda c, p: scaled(c, _alpha(c, p), c["r"])},
               "vllm-project/vllm-omni #6565, huggingface/peft #2194, huggingface/diffusers #14409"),
    Misreading("alpha-pattern-is-dropped", "alpha_pattern is dropped: lora_alpha is taken for all modules",
               {"scale": lambda c, p: scaled(c, c["lora_alpha"], _rank(c, p))}, "vllm-project/vllm-omni #6565"),
    Misreading("both-patterns-are-dropped",
               "rank_pattern and alpha_pattern are dropped: r and lora_alpha are taken for all modules",
               {"scale": lambda c, p: scaled(c, c["lora_alpha"], c["r"])}, "vllm-project/vllm-omni #6565"),
    Misreading("root-and-patterns-are-dropped",
               "rsLoRA's root is ignored, and rank_pattern and alpha_pattern are dropped",
               {"scale": lambda c, p: c["lora_alpha"] / c["r"]}),
    Misreading("root-and-alpha-pattern-are-dropped",
               "rsLoRA's root is ignored, and alpha_pattern is dropped: the scaling is lora_alpha / rank",
               {"scale": lambda c, p: c["lora_alpha"] / _rank(c, p)}),
    Misreading("the-last-pattern-decides",
               "of several patterns that match a module the last one decides, and should the first",
               {"scale": _last}),
    Misreading("patterns-are-whole-paths-alone",
               "patterns are compared with whole paths alone, and are regular expressions for the end of a path",
               {"scale": _whole_paths}),
    Misreading("patterns-match-anywhere",
               "a pattern is looked for at a path's start or anywhere in it, and has to match up to its end",
               {"scale": _matching_by(lambda key, path: re.search(key, path))}),
    Misreading("patterns-are-no-regular-expressions",
               "patterns are compared as plain text with the end of a path, and are regular expressions",
               {"scale": _matching_by(lambda key, path: f".{path}".endswith(f".{key}"))}),
    Misreading("patterns-are-the-ends-of-names",
               "patterns are compared as plain text with the end of a path, also in the midst of a name",
               {"scale": _matching_by(lambda key, path: path.endswith(key))}),
    Misreading("alpha-is-divided-in-whole-numbers", "alpha is divided by the rank in whole numbers, and rounded down",
               {"scale": lambda c, p: float(_alpha(c, p) // _rank(c, p))}),
    # DoRA
    Misreading("dora-magnitude-is-ignored", "DoRA's magnitude is ignored: this is LoRA",
               {"gain": lambda m, n: np.ones_like(n)}),
    Misreading("dora-magnitude-is-not-read",
               "DoRA's magnitude is not read from the file: rows keep the lengths of W, as before the training",
               {"magnitude": lambda m, W: lengths(W)}, "transformers 5.24.0"),
    known("dora-norm-is-that-of-w", {"length": lambda W, BA, s: np.sqrt((W * W).cumsum(axis=1)[:, -1:])},
          says="DoRA's norm is that of W, and should be that of W + s B A"),
    known("dora-norm-lacks-the-scaling", {"length": lambda W, BA, s: np.sqrt(((W + BA) ** 2).cumsum(axis=1)[:, -1:])},
          says="DoRA's norm lacks the scaling: it is that of W + B A, and should be that of W + s B A"),
    known("dora-norm-is-taken-along-the-wrong-axis",
          {"length": lambda W, BA, s: np.sqrt(((W + s * BA) ** 2).cumsum(axis=0)[-1:])},
          says="DoRA's norm is taken along the wrong axis: of each column of W + s B A, and should be of each row",
          source="wanshuiyin/ARIS-in-AI-Offer #17"),
    Misreading("dora-magnitude-is-along-the-inputs",
               "DoRA's magnitude is taken for that of the inputs: each column of W + s B A is rescaled, as in LyCORIS",
               {"magnitude": lambda m, W: m[None] if _square(W) else m[:, None],
                "length": lambda W, BA, s: lengths((W + s * BA).T).T if _square(W) else lengths(W + s * BA)},
               "invoke-ai/InvokeAI #9517"),
    # what else stands in a file
    Misreading("bfloat16-is-read-as-float16", "the bits of a file in bfloat16 are read as float16",
               {"read": _as_float16}),
    Misreading("alpha-is-cut-to-a-whole-number", "lora_alpha is read as a whole number, and cut",
               {"scale": lambda c, p: scaled(c, _alpha_cut(c, p), _rank(c, p))}),
    Misreading("lora-bias-is-ignored", "the adapter's bias (lora_bias) is ignored", {"bias": lambda b, s: 0 * b}),
    Misreading("lora-bias-lacks-the-scaling", "the adapter's bias (lora_bias) lacks the scaling",
               {"bias": lambda b, s: b}),
    Misreading("the-tied-head-is-changed-too",
               "the tied head is changed with the embedding, or the embedding with the head: an adapter changes one "
               "alone",
               {"ties": True}, "huggingface/peft #2777"),
    Misreading("pissa-start-is-not-taken-off",
               "PiSSA's start is not taken off the base: init_lora_weights was passed over",
               {"start": 0.0}),
    # a base in 4 bits
    Misreading("nf4-nibbles-are-swapped",
               "the two 4-bit codes of a byte are taken in the other order: the first is in the upper half",
               {"base": "swapped"}, "paiml/entrenar #298"),
    Misreading("nf4-mean-of-scales-is-left-out",
               "the mean of the 4-bit blocks' scales (nested_offset) is not added to the dequantised scales",
               {"base": "no mean"}),
    # several adapters
    Misreading("the-weights-of-adapters-are-ignored", "the weights of several adapters are ignored: each is added once",
               {"weights": lambda weights: [1.0] * len(weights)}),
    Misreading("a-negative-weight-is-taken-as-positive",
               "an adapter with a negative weight is added, and should be subtracted",
               {"weights": lambda weights: [abs(w) for w in weights]}, "huggingface/peft #2918"),
    Misreading("the-weights-of-adapters-go-into-both-factors",
               "the weights of several adapters go into both factors: they act squared",
               {"weights": lambda weights: [w * abs(w) for w in weights]}),
    Misreading("the-weights-of-adapters-are-divided-by-their-number",
               "the weights of several adapters are divided by the number of adapters",
               {"weights": lambda weights: [w / len(weights) for w in weights]}),
    Misreading("the-last-adapter-alone-is-applied", "of several adapters the last alone is applied",
               {"weights": lambda weights: [*[0.0] * (len(weights) - 1), *weights[-1:]]}),
    Misreading("the-first-adapter-alone-is-applied", "of several adapters the first alone is applied",
               {"weights": lambda weights: [*weights[:1], *[0.0] * (len(weights) - 1)]}),
    Misreading("the-first-configuration-is-taken-for-all-adapters",
               "the first adapter's configuration is taken for all adapters",
               {"config_of": lambda i: 0}),
    # one kind of module is left out; where there is no other, that is the whole update
    *(Misreading(f"{name.replace('_', '-')}-is-left-out", f"the adapter of {name} is not applied",
                 {"applied": _without(name)})
      for name in TARGETS),
    # the update as a whole
    Misreading("the-adapter-is-not-applied", "the adapter is not applied: this is the base",
               {"applied": lambda path: False}),
    known("the-update-is-added-twice", {"times": 2.0}, source="huggingface/peft #3774"),
    Misreading("the-update-is-subtracted", "the update is subtracted", {"times": -1.0}, "vllm-project/vllm #48437"),
    # the scaling of all modules
    known("alpha-is-not-divided-by-the-rank", {"scale": _alpha},
          says="alpha is not divided by the rank: the scaling is alpha", source="Blaizzy/mlx-vlm #846"),
    known("alpha-is-divided-by-the-root-of-the-rank", {"scale": lambda c, p: _alpha(c, p) / math.sqrt(_rank(c, p))},
          says="alpha is divided by the root of the rank, as with use_rslora, and should be divided by the rank"),
    known("there-is-no-scaling", {"scale": lambda c, p: 1.0}, says="there is no scaling: the update is B A as it is"),
    known("alpha-is-ignored", {"scale": lambda c, p: 1 / _rank(c, p)}),
    known("the-scaling-is-r-alpha", {"scale": lambda c, p: _rank(c, p) / _alpha(c, p)}),
    known("the-scaling-is-applied-twice", {"scale": lambda c, p: scale(c, p) ** 2}),
    # places
    Misreading("k-and-v-are-swapped", "the adapters of k_proj and v_proj are exchanged",
               {"place": _swapped("k_proj", "v_proj")}),
    Misreading("gate-and-up-are-swapped", "the adapters of gate_proj and up_proj are exchanged",
               {"place": _swapped("gate_proj", "up_proj")}, "sgl-project/sglang #27274"),
    Misreading("layers-are-swapped", "the adapters of the layers 0 and 1 are exchanged", {"place": _turned_layers}),
    Misreading("attention-is-left-out", "the adapters of attention are not applied",
               {"applied": _without("self_attn")}),
    Misreading("the-mlp-is-left-out", "the adapters of the MLP are not applied", {"applied": _without(r"\.mlp\.")}),
    *(Misreading(f"layer-{i}-is-left-out", f"the adapters of layer {i} are not applied",
                 {"applied": _without(rf"layers\.{i}\.")})
      for i in range(2)),
    # the factors
    Misreading("a-square-factor-is-transposed", "a square factor is transposed", {"factors": _transposed}),
    Misreading("the-update-is-read-the-other-way-round",
               "the factors are exchanged: the update comes out as (in, out), and its numbers are taken as (out, in)",
               {"update": lambda path, BA: BA.T.reshape(BA.shape)}),
    Misreading("the-update-of-embed-tokens-is-not-transposed",
               "the update of embed_tokens is reshaped to (V, dim), and has to be transposed",
               {"update": lambda path, BA: BA.reshape(BA.shape[::-1]).T if path == EMBED else BA}),
    Misreading("lora-b-is-reshaped", "lora_B is read in another order: its numbers as (r, out), transposed",
               {"factors": lambda path, A, B: (A, B.reshape(B.shape[::-1]).T)}, "unslothai/unsloth-zoo #1269"),
    Misreading("lora-a-is-reshaped", "lora_A is read in another order: its numbers as (in, r), transposed",
               {"factors": lambda path, A, B: (A.reshape(A.shape[::-1]).T, B)}),
    Misreading("both-factors-are-reshaped",
               "both factors are read in another order: their numbers as those of the transposed matrices",
               {"factors": lambda path, A, B: (A.reshape(A.shape[::-1]).T, B.reshape(B.shape[::-1]).T)}),
    Misreading("the-last-rank-is-dropped", "the last rank is dropped", {"factors": _without_last_rank}),
    Misreading("the-order-of-ranks-differs-between-the-factors",
               "the ranks stand in another order in one factor than in the other",
               {"factors": lambda path, A, B: (A[::-1], B)}, "huggingface/diffusers #13998"),
    Misreading("rows-of-q-and-k-are-not-permuted",
               "rows of lora_B of q_proj and k_proj are not permuted as the base's are in a .gguf file",
               {"factors": _unpermuted}),
    Misreading("rows-of-q-and-k-are-permuted",
               "rows of lora_B of q_proj and k_proj are permuted as for a .gguf file, and the base's are not",
               {"factors": _permuted}),
    Misreading("heads-of-k-and-v-are-exchanged", "the update's key and value heads are exchanged",
               {"factors": _other_heads}),
    Misreading("lora-a-is-reshaped-where-it-lies-transposed",
               "lora_A's transpose is reshaped to (r, in), and should be taken as it lies",
               {"factors": lambda path, A, B: (A.T.reshape(A.shape), B)}),
    Misreading("lora-b-is-reshaped-where-it-lies-transposed",
               "lora_B's transpose is reshaped to (out, r), and should be taken as it lies",
               {"factors": lambda path, A, B: (A, B.T.reshape(B.shape))}),
    # what was trained beside the factors
    Misreading("modules-to-save-are-ignored",
               "modules_to_save is ignored: the base's weight stays where the file has a trained one",
               {"saved": lambda W, trained: W}),
    Misreading("modules-to-save-are-added",
               "the weight of modules_to_save is added to the base's, and should take its place",
               {"saved": lambda W, trained: W + trained}),
    Misreading("trained-biases-are-ignored",
               'the trained biases (bias="lora_only") are ignored: the base\'s stay',
               {"trained_bias": lambda b, trained: b}),
    Misreading("trained-biases-are-added",
               'the trained biases (bias="lora_only") are added to the base\'s, and should take their place',
               {"trained_bias": lambda b, trained: b + trained}),
    Misreading("trained-tokens-are-ignored", "the trained rows of trainable_token_indices are ignored",
               {"tokens": lambda rows, trained: rows}),
    Misreading("trained-tokens-are-added",
               "the trained rows of trainable_token_indices are added to the base's, and should take their place",
               {"tokens": lambda rows, trained: rows + trained}),
    # what is left of the case before
    Misreading("the-previous-adapter-answers", "the previous adapter's answer: this case's adapter is not taken up",
               {"previous": "instead"}),
    Misreading("the-previous-adapter-stays-on", "the previous adapter stays on: this case's is added to it",
               {"previous": "beside"}),
    Misreading("keys-and-values-are-the-previous-adapters",
               "the prompt's keys and values are the previous adapter's: they are kept by its tokens alone",
               {"previous": "cached"}),
    # the base alone
    Misreading("rope-turns-neighbours",
               "the rotary embedding turns neighbours (2j, 2j + 1) together, and should turn j with j + head_dim / 2",
               {"base": "neighbours"}),
    Misreading("attention-is-scaled-by-hidden-size-over-heads",
               "attention's scores are divided by the root of hidden_size / heads, and should be by that of head_dim",
               {"base": "hidden size"}),
)
# fmt: on
