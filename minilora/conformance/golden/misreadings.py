"""Known bugs of programs that read adapters.

A bug is `Reading` with some parts replaced. To add a bug, add a row: each case in which the bug makes a difference then
stores its numbers, the bug's *signature*, so that a program which answers with these numbers can be recognized. A row
also says in whose code the bug was found. A mistake that layers make too is a row of the suite's table, and `of_suite`
looks it up by its flag.

`MISREADINGS` apply to adapters of a plain decoder, `MIXTURE_MISREADINGS` to those of one with mixtures of experts.

If several bugs give the same numbers, or nearly so, the one that gets the least wrong is kept: `count` is 1 if one key,
one kind of module or one factor is wrong, and 2 or 3 if several are. Ties are broken alphabetically by flag; the order
of the rows only sets their order in the index.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...files.dtypes import FLOATS, cast
from ...layers.rotary import halves_from_interleaved, interleaved_from_halves
from ..naming import Parts, Wrong
from ..problems import bugs as table
from .bases import EMBEDDING_PATH
from .reading import PATTERNS, ConfigJson, Reading, matching_values, row_lengths, scale, scaled, setting

HEAD_DIM = 64


def of_suite(
    flag: str, parts: Parts | None = None, *, says: str = "", source: str | None = None, count: int = 1
) -> Wrong:
    """Return a bug of the suite's table, as a program that reads files makes it.

    Without `parts`, the row of the table is used as it is, which fits the rows about the layout of experts' factors.
    `says` replaces the table's sentence if files need other words: they have use_rslora, but no V. `source` replaces
    the table's source if the bug was found in other code that reads files.
    """
    bug = table.known(flag)
    if parts is None:
        return Wrong(flag, bug.says, bug.parts, bug.source, count=bug.count)
    return Wrong(flag, says or bug.says, parts, bug.source if source is None else source, count=count)


def _alpha(config: ConfigJson, path: str) -> float:
    return float(setting(config, "lora_alpha", path))


def _rank(config: ConfigJson, path: str) -> int:
    return int(setting(config, "r", path))


def _alpha_cut(config: ConfigJson, path: str) -> float:
    alpha = _alpha(config, path)
    return float(int(alpha)) if alpha == config["lora_alpha"] else alpha


def _as_float16(stored: str, x: np.ndarray) -> np.ndarray:
    return cast(x, FLOATS["BF16"]).view("<f2").astype(np.float64) if stored == "BF16" else x


def _square(W: np.ndarray) -> bool:
    return bool(W.shape[0] == W.shape[1])


def _last(config: ConfigJson, path: str) -> float:
    alpha = [config["lora_alpha"], *matching_values(config, "lora_alpha", path)][-1]
    rank = [config["r"], *matching_values(config, "r", path)][-1]
    return scaled(config, alpha, rank)


def _whole_paths(config: ConfigJson, path: str) -> float:
    alpha, rank = config.get("alpha_pattern", {}), config.get("rank_pattern", {})
    return scaled(config, alpha.get(path, config["lora_alpha"]), rank.get(path, config["r"]))


def _matching_by(matches: Callable[[str, str], Any]) -> Callable[[ConfigJson, str], float]:
    """Return a scaling that uses another rule for which key of a pattern matches a path."""

    def value(config: ConfigJson, key: str, path: str) -> Any:
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
    """Return the `place` of a reader that exchanges the adapters of two modules."""

    def place(path: str) -> str:
        head, last = path.rpartition(".")[::2]
        return f"{head}.{other if last == one else one if last == other else last}".lstrip(".")

    return place


def _without(pattern: str) -> Any:
    return lambda path: re.search(pattern, path) is None


def _swapped_layers(path: str) -> str:
    return re.sub(r"(?<=^model\.layers\.)[01]", lambda match: str(1 - int(match[0])), path)


def _scaled_by(factor: Callable[[ConfigJson, str], float]) -> Callable[[ConfigJson, str], float]:
    """Return the right scaling times a factor."""
    return lambda config, path: scale(config, path) * factor(config, path)


def _fused_root(config: ConfigJson, path: str) -> float:
    """Return sqrt(2) for gate and up, since r and alpha are doubled when the two are fused; 1 otherwise."""
    in_one = re.search(r"\.experts\.\d+\.(w1|w3|gate_proj|up_proj)$", path)
    return math.sqrt(2) if config.get("use_rslora") and in_one else 1.0


def _swapped_halves(BA: np.ndarray) -> np.ndarray:
    return np.roll(BA, len(BA) // 2, axis=0)


def _deinterleaved(BA: np.ndarray) -> np.ndarray:
    """Return the even rows, followed by the odd ones."""
    return np.concatenate([BA[::2], BA[1::2]])


def _interleaved(BA: np.ndarray) -> np.ndarray:
    """Return the rows of the two halves, interleaved."""
    return BA.reshape(2, -1, BA.shape[1]).swapaxes(0, 1).reshape(BA.shape)


def _scaled_halves(gate: float, up: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that multiplies the gate's half of an update, and the up projection's, by these factors."""
    return lambda BA: np.repeat([gate, up], len(BA) // 2)[:, None] * BA


def _gate_twice(BA: np.ndarray) -> np.ndarray:
    return np.concatenate([BA[: len(BA) // 2]] * 2)


def _shifted(E: int, r: int) -> np.ndarray:
    return np.roll(np.arange(E * r), -1).reshape(E, r)


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")

# fmt: off
MISREADINGS: Sequence[Wrong] = (
    # the scaling, for configurations with more than r and lora_alpha
    of_suite("rslora-root-is-ignored", {"scale": lambda c, p: _alpha(c, p) / _rank(c, p)},
             source="vllm-project/vllm #10798, NVIDIA/TensorRT-LLM #1668, sgl-project/sglang #40835"),
    Wrong("rank-pattern-is-dropped-in-the-scaling",
          "rank_pattern is dropped in the scaling: alpha is divided by r for all modules",
          {"scale": lambda c, p: scaled(c, _alpha(c, p), c["r"])},
          "vllm-project/vllm-omni #6565, huggingface/peft #2194, huggingface/diffusers #14409"),
    Wrong("alpha-pattern-is-dropped", "alpha_pattern is dropped: lora_alpha is taken for all modules",
          {"scale": lambda c, p: scaled(c, c["lora_alpha"], _rank(c, p))}, "vllm-project/vllm-omni #6565"),
    Wrong("both-patterns-are-dropped",
          "rank_pattern and alpha_pattern are dropped: r and lora_alpha are taken for all modules",
          {"scale": lambda c, p: scaled(c, c["lora_alpha"], c["r"])}, "vllm-project/vllm-omni #6565", count=2),
    Wrong("root-and-patterns-are-dropped",
          "rsLoRA's root is ignored, and rank_pattern and alpha_pattern are dropped",
          {"scale": lambda c, p: c["lora_alpha"] / c["r"]}, count=2),
    Wrong("root-and-alpha-pattern-are-dropped",
          "rsLoRA's root is ignored, and alpha_pattern is dropped: the scaling is lora_alpha / rank",
          {"scale": lambda c, p: c["lora_alpha"] / _rank(c, p)}, count=2),
    Wrong("the-last-pattern-decides",
          "of several patterns that match a module the last one decides, and should the first",
          {"scale": _last}),
    Wrong("patterns-are-whole-paths-alone",
          "patterns are compared with whole paths alone, and are regular expressions for the end of a path",
          {"scale": _whole_paths}, count=2),
    Wrong("patterns-match-anywhere",
          "a pattern is looked for at a path's start or anywhere in it, and has to match up to its end",
          {"scale": _matching_by(lambda key, path: re.search(key, path))}),
    Wrong("patterns-are-no-regular-expressions",
          "patterns are compared as plain text with the end of a path, and are regular expressions",
          {"scale": _matching_by(lambda key, path: f".{path}".endswith(f".{key}"))}),
    Wrong("patterns-are-the-ends-of-names",
          "patterns are compared as plain text with the end of a path, also in the midst of a name",
          {"scale": _matching_by(lambda key, path: path.endswith(key))}),
    Wrong("alpha-is-divided-in-whole-numbers", "alpha is divided by the rank in whole numbers, and rounded down",
          {"scale": lambda c, p: float(_alpha(c, p) // _rank(c, p))}),
    # DoRA
    Wrong("dora-magnitude-is-ignored", "DoRA's magnitude is ignored: this is LoRA",
          {"gain": lambda m, n: np.ones_like(n)}),
    Wrong("dora-magnitude-is-not-read",
          "DoRA's magnitude is not read from the file: rows keep the lengths of W, as before the training",
          {"magnitude": lambda m, W: row_lengths(W)}, "transformers 5.24.0"),
    of_suite("dora-norm-is-that-of-w", {"length": lambda W, BA, s: np.sqrt((W * W).cumsum(axis=1)[:, -1:])},
             says="DoRA's norm is that of W, and should be that of W + s B A"),
    of_suite("dora-norm-lacks-the-scaling",
             {"length": lambda W, BA, s: np.sqrt(((W + BA) ** 2).cumsum(axis=1)[:, -1:])},
             says="DoRA's norm lacks the scaling: it is that of W + B A, and should be that of W + s B A"),
    of_suite("dora-norm-is-taken-along-the-wrong-axis",
             {"length": lambda W, BA, s: np.sqrt(((W + s * BA) ** 2).cumsum(axis=0)[-1:])},
             says="DoRA's norm is taken along the wrong axis: of each column of W + s B A, and should be of each row",
             source="wanshuiyin/ARIS-in-AI-Offer #17"),
    Wrong("dora-magnitude-is-along-the-inputs",
          "DoRA's magnitude is taken for that of the inputs: each column of W + s B A is rescaled, as in LyCORIS",
          {"magnitude": lambda m, W: m[None] if _square(W) else m[:, None],
           "length": lambda W, BA, s: row_lengths((W + s * BA).T).T if _square(W) else row_lengths(W + s * BA)},
          "invoke-ai/InvokeAI #9517"),
    # other contents of the files
    Wrong("bfloat16-is-read-as-float16", "the bits of a file in bfloat16 are read as float16", {"read": _as_float16}),
    Wrong("alpha-is-cut-to-a-whole-number", "lora_alpha is read as a whole number, and cut",
          {"scale": lambda c, p: scaled(c, _alpha_cut(c, p), _rank(c, p))}),
    Wrong("lora-bias-is-ignored", "the adapter's bias (lora_bias) is ignored", {"bias": lambda b, s: 0 * b}),
    Wrong("lora-bias-lacks-the-scaling", "the adapter's bias (lora_bias) lacks the scaling", {"bias": lambda b, s: b}),
    Wrong("the-tied-head-is-changed-too",
          "the tied head is changed with the embedding, or the embedding with the head: an adapter changes one "
          "alone",
          {"ties": True}, "huggingface/peft #2777"),
    Wrong("pissa-start-is-not-taken-off",
          "PiSSA's start is not taken off the base: init_lora_weights was passed over",
          {"start": 0.0}),
    # a base in 4 bits
    Wrong("nf4-nibbles-are-swapped",
          "the two 4-bit codes of a byte are taken in the other order: the first is in the upper half",
          {"base": "swapped"}, "paiml/entrenar #298"),
    Wrong("nf4-mean-of-scales-is-left-out",
          "the mean of the 4-bit blocks' scales (nested_offset) is not added to the dequantised scales",
          {"base": "no mean"}),
    # several adapters
    Wrong("the-weights-of-adapters-are-ignored", "the weights of several adapters are ignored: each is added once",
          {"weights": lambda weights: [1.0] * len(weights)}),
    Wrong("a-negative-weight-is-taken-as-positive",
          "an adapter with a negative weight is added, and should be subtracted",
          {"weights": lambda weights: [abs(w) for w in weights]}, "huggingface/peft #2918"),
    Wrong("the-weights-of-adapters-go-into-both-factors",
          "the weights of several adapters go into both factors: they act squared",
          {"weights": lambda weights: [w * abs(w) for w in weights]}),
    Wrong("the-weights-of-adapters-are-divided-by-their-number",
          "the weights of several adapters are divided by the number of adapters",
          {"weights": lambda weights: [w / len(weights) for w in weights]}),
    Wrong("the-last-adapter-alone-is-applied", "of several adapters the last alone is applied",
          {"weights": lambda weights: [*[0.0] * (len(weights) - 1), *weights[-1:]]}),
    Wrong("the-first-adapter-alone-is-applied", "of several adapters the first alone is applied",
          {"weights": lambda weights: [*weights[:1], *[0.0] * (len(weights) - 1)]}),
    Wrong("the-first-configuration-is-taken-for-all-adapters",
          "the first adapter's configuration is taken for all adapters",
          {"config_of": lambda i: 0}),
    # one kind of module is left out; if there is no other, that is the whole update
    *(Wrong(f"{name.replace('_', '-')}-is-left-out", f"the adapter of {name} is not applied",
            {"applied": _without(name)})
      for name in TARGETS),
    # the update as a whole
    Wrong("the-adapter-is-not-applied", "the adapter is not applied: this is the base",
          {"applied": lambda path: False}, count=2),
    of_suite("the-update-is-added-twice", {"times": 2.0}, source="huggingface/peft #3774"),
    Wrong("the-update-is-subtracted", "the update is subtracted", {"times": -1.0}, "vllm-project/vllm #48437"),
    # the scaling of all modules
    of_suite("alpha-is-not-divided-by-the-rank", {"scale": _alpha},
             says="alpha is not divided by the rank: the scaling is alpha", source="Blaizzy/mlx-vlm #846", count=2),
    of_suite("alpha-is-divided-by-the-root-of-the-rank", {"scale": lambda c, p: _alpha(c, p) / math.sqrt(_rank(c, p))},
             says="alpha is divided by the root of the rank, as with use_rslora, and should be divided by the rank",
             count=3),
    of_suite("there-is-no-scaling", {"scale": lambda c, p: 1.0},
             says="there is no scaling: the update is B A as it is", count=2),
    of_suite("alpha-is-ignored", {"scale": lambda c, p: 1 / _rank(c, p)}, count=3),
    of_suite("the-scaling-is-r-alpha", {"scale": lambda c, p: _rank(c, p) / _alpha(c, p)}, count=3),
    of_suite("the-scaling-is-applied-twice", {"scale": lambda c, p: scale(c, p) ** 2}, count=2),
    # the modules that get the adapters
    Wrong("k-and-v-are-swapped", "the adapters of k_proj and v_proj are exchanged",
          {"place": _swapped("k_proj", "v_proj")}),
    Wrong("gate-and-up-are-swapped", "the adapters of gate_proj and up_proj are exchanged",
          {"place": _swapped("gate_proj", "up_proj")}, "sgl-project/sglang #27274"),
    Wrong("layers-are-swapped", "the adapters of the layers 0 and 1 are exchanged", {"place": _swapped_layers}),
    Wrong("attention-is-left-out", "the adapters of attention are not applied",
          {"applied": _without("self_attn")}, count=3),
    Wrong("the-mlp-is-left-out", "the adapters of the MLP are not applied", {"applied": _without(r"\.mlp\.")}, count=2),
    *(Wrong(f"layer-{i}-is-left-out", f"the adapters of layer {i} are not applied",
            {"applied": _without(rf"layers\.{i}\.")}, count=3)
      for i in range(2)),
    # the factors
    Wrong("a-square-factor-is-transposed", "a square factor is transposed", {"factors": _transposed}),
    Wrong("the-update-is-read-the-other-way-round",
          "the factors are exchanged: the update comes out as (in, out), and its numbers are taken as (out, in)",
          {"update": lambda path, BA: BA.T.reshape(BA.shape)}),
    Wrong("the-update-of-embed-tokens-is-not-transposed",
          "the update of embed_tokens is reshaped to (V, dim), and has to be transposed",
          {"update": lambda path, BA: BA.reshape(BA.shape[::-1]).T if path == EMBEDDING_PATH else BA}),
    Wrong("lora-b-is-reshaped", "lora_B is read in another order: its numbers as (r, out), transposed",
          {"factors": lambda path, A, B: (A, B.reshape(B.shape[::-1]).T)}, "unslothai/unsloth-zoo #1269"),
    Wrong("lora-a-is-reshaped", "lora_A is read in another order: its numbers as (in, r), transposed",
          {"factors": lambda path, A, B: (A.reshape(A.shape[::-1]).T, B)}),
    Wrong("both-factors-are-reshaped",
          "both factors are read in another order: their numbers as those of the transposed matrices",
          {"factors": lambda path, A, B: (A.reshape(A.shape[::-1]).T, B.reshape(B.shape[::-1]).T)}),
    Wrong("the-last-rank-is-dropped", "the last rank is dropped", {"factors": _without_last_rank}),
    Wrong("the-order-of-ranks-differs-between-the-factors",
          "the ranks stand in another order in one factor than in the other",
          {"factors": lambda path, A, B: (A[::-1], B)}, "huggingface/diffusers #13998"),
    Wrong("rows-of-q-and-k-are-not-permuted",
          "rows of lora_B of q_proj and k_proj are not permuted as the base's are in a .gguf file",
          {"factors": _unpermuted}),
    Wrong("rows-of-q-and-k-are-permuted",
          "rows of lora_B of q_proj and k_proj are permuted as for a .gguf file, and the base's are not",
          {"factors": _permuted}),
    Wrong("heads-of-k-and-v-are-exchanged", "the update's key and value heads are exchanged",
          {"factors": _other_heads}),
    Wrong("lora-a-is-reshaped-where-it-lies-transposed",
          "lora_A's transpose is reshaped to (r, in), and should be taken as it lies",
          {"factors": lambda path, A, B: (A.T.reshape(A.shape), B)}, count=2),
    Wrong("lora-b-is-reshaped-where-it-lies-transposed",
          "lora_B's transpose is reshaped to (out, r), and should be taken as it lies",
          {"factors": lambda path, A, B: (A, B.T.reshape(B.shape))}, count=2),
    # parts that were trained besides the factors
    Wrong("modules-to-save-are-ignored",
          "modules_to_save is ignored: the base's weight stays where the file has a trained one",
          {"saved": lambda W, trained: W}),
    Wrong("modules-to-save-are-added",
          "the weight of modules_to_save is added to the base's, and should take its place",
          {"saved": lambda W, trained: W + trained}),
    Wrong("trained-biases-are-ignored",
          'the trained biases (bias="lora_only") are ignored: the base\'s stay',
          {"trained_bias": lambda b, trained: b}),
    Wrong("trained-biases-are-added",
          'the trained biases (bias="lora_only") are added to the base\'s, and should take their place',
          {"trained_bias": lambda b, trained: b + trained}),
    Wrong("trained-tokens-are-ignored", "the trained rows of trainable_token_indices are ignored",
          {"tokens": lambda rows, trained: rows}),
    Wrong("trained-tokens-are-added",
          "the trained rows of trainable_token_indices are added to the base's, and should take their place",
          {"tokens": lambda rows, trained: rows + trained}),
    # remains of the previous case
    Wrong("the-previous-adapter-answers", "the previous adapter's answer: this case's adapter is not taken up",
          {"previous": "instead"}),
    Wrong("the-previous-adapter-stays-on", "the previous adapter stays on: this case's is added to it",
          {"previous": "beside"}),
    Wrong("keys-and-values-are-the-previous-adapters",
          "the prompt's keys and values are the previous adapter's: they are kept by its tokens alone",
          {"previous": "cached"}),
    # the base without an adapter
    Wrong("rope-turns-neighbours",
          "the rotary embedding turns neighbours (2j, 2j + 1) together, and should turn j with j + head_dim / 2",
          {"base": "neighbours"}),
    Wrong("attention-is-scaled-by-hidden-size-over-heads",
          "attention's scores are divided by the root of hidden_size / heads, and should be by that of head_dim",
          {"base": "hidden size"}),
)
_OF_EXPERTS: Sequence[Wrong] = (
    # one array, or one kind of module, is left out
    Wrong("experts-gate-up-proj-is-left-out", "the adapter of the experts' gate_up_proj is not applied",
          {"applied": _without(r"experts\.(\d+\.(w1|w3|gate_proj|up_proj)|gate_up_proj)$")}),
    Wrong("experts-down-proj-is-left-out", "the adapter of the experts' down_proj is not applied",
          {"applied": _without(r"experts\.(\d+\.(w2|down_proj)|down_proj)$")}),
    Wrong("experts-are-left-out", "the adapter of the experts is not applied, the others are",
          {"applied": _without(r"\.experts\.")}, count=2),
    Wrong("experts-the-shared-experts-adapter-is-left-out", "the adapter of the shared expert is not applied",
          {"applied": _without("shared_expert")}),
    Wrong("experts-the-routers-adapter-is-left-out", "the adapter of the router is not applied",
          {"applied": _without(r"mlp\.gate\.weight")}),
    # gate and up in one array
    Wrong("experts-gate-and-up-are-exchanged",
          "the update's halves are exchanged: gate_up_proj is taken for [up; gate], and is [gate; up]",
          {"gate_up": _swapped_halves}),
    Wrong("experts-gate-and-up-are-taken-for-alternating",
          "the update's rows are taken for alternating, gate, up, gate, up, and its halves are gate and up",
          {"gate_up": _deinterleaved}),
    Wrong("experts-gate-and-up-are-made-alternating",
          "the update's halves are put into alternating rows, gate, up, gate, up, and the weight's are not",
          {"gate_up": _interleaved}),
    Wrong("experts-the-gates-half-counts-twice",
          "the update's first half is taken for gate and for up, its second half for neither",
          {"gate_up": _gate_twice}, "unslothai/unsloth-zoo #942"),
    Wrong("experts-the-up-half-is-left-out", "the update's second half, of up, is left out",
          {"gate_up": _scaled_halves(1, 0)}),
    Wrong("experts-the-gates-half-is-left-out", "the update's first half, of the gate, is left out",
          {"gate_up": _scaled_halves(0, 1)}),
    # ranks and scalings
    Wrong("experts-ranks-begin-a-row-late", "each expert's rows of lora_A begin one row late", {"rows_of_A": _shifted}),
    Wrong("experts-the-first-half-of-the-ranks-counts-alone",
          "the first half of each expert's ranks is used alone",
          {"factors": lambda path, A, B: (A[: len(A) // 2], B[:, : len(A) // 2])}),
    Wrong("experts-slices-are-of-the-configurations-rank",
          "each expert's slice is of the configuration's r, and rank_pattern has another for this array",
          {"rank": lambda config, path: int(config["r"])}),
    Wrong("experts-the-root-is-that-of-the-packed-rank",
          "rsLoRA's root is that of the packed factors' rank, E r, and should be that of one expert's",
          {"scaling_of": lambda s, e, E: s / math.sqrt(E)}),
    Wrong("experts-rslora-root-is-taken-twice",
          "rsLoRA's root is taken twice: alpha is divided by the fourth root of the rank",
          {"scale": lambda c, p: _alpha(c, p) / _rank(c, p) ** 0.25}),
    Wrong("experts-rslora-root-is-that-of-gate-and-up-together",
          "rsLoRA's root is that of gate's and up's ranks together, with alpha doubled: their update is too large "
          "by the root of 2",
          {"scale": _scaled_by(_fused_root)}, "peft 0.21.2"),
    Wrong("experts-the-update-is-divided-by-the-kept",
          "the update is divided by how many experts a token keeps",
          {"scale": _scaled_by(lambda config, path: 0.5 if ".experts." in path else 1.0)}),
    # factors packed differently by an older PEFT or another program
    Wrong("experts-lora-b-layout-is-not-read",
          "lora_B_layout is not read: it says that lora_B has the expert as its slow index",
          {"layout": lambda config: None}),
    # the mixture itself
    Wrong("experts-the-update-is-not-weighted",
          "each kept expert's update counts whole, and should count by the router's share",
          {"unweighted": True}),
    Wrong("experts-the-shares-are-renormalised-wrongly",
          "a token's shares are made to sum to 1, and norm_topk_prob says no; or they are not, and it says yes",
          {"renormalised": lambda renormalised: not renormalised}),
    Wrong("experts-one-is-kept", "one expert is kept for a token, and num_experts_per_tok says 2",
          {"kept": lambda K: 1}),
    Wrong("experts-three-are-kept", "three experts are kept for a token, and num_experts_per_tok says 2",
          {"kept": lambda K: 3}),
    Wrong("experts-the-shared-expert-is-left-out", "the shared expert is left out, with its adapter",
          {"shared": False}),
)
# fmt: on
_PACKINGS = [
    of_suite(bug.flag)
    for bug in table.BUGS
    if bug.flag.startswith("experts-") and not callable(bug.parts) and set(bug.parts) <= vars(Reading()).keys()
]
"""The suite's rows about the layout of experts' factors."""
_ALSO = (
    "rslora-root-is-ignored",
    "rank-pattern-is-dropped-in-the-scaling",
    "the-adapter-is-not-applied",
    "the-update-is-added-twice",
    "alpha-is-not-divided-by-the-rank",
    "alpha-is-divided-by-the-root-of-the-rank",
    "there-is-no-scaling",
    "the-scaling-is-applied-twice",
    "the-last-rank-is-dropped",
)
"""Bugs from `MISREADINGS` that apply to mixtures as well."""
MIXTURE_MISREADINGS = (*_PACKINGS, *_OF_EXPERTS, *(row for row in MISREADINGS if row.flag in _ALSO))
