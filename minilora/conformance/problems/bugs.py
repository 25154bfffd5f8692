"""The table of known bugs: what each one computes, which claim it breaks, and where it was found.

To add a bug, add a row, anywhere in the table. `check` then recognizes the bug, the vectors flag the problems that
catch it, and the tests plant it in functions and in a layer. A row has

    flag        the identifier, which never changes; the sentence may be rephrased
    sentence    the diagnosis, as the report prints it
    parts       the parts of the right formulas that the bug replaces: a dict, or a function of the problem
    source      where it was found in public, as "owner/repository #issue" or "package version"; optional

Rows are grouped by the claim that they break and by the kinds of layers that they apply to; the tests plant them in the
first of these kinds. The claim determines the formulas: `AdamFormulas` for "adam", `StartFormulas` for "start", and
`Formulas` for the others.

If several bugs give the same numbers, `naming` decides which one is named, regardless of the order of the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..naming import Wrong
from . import bugparts as parts
from .formulas import RIGHT_FORMULAS, SCALINGS, one_minus
from .kinds import KINDS
from .lowprecision import as_bfloat16
from .several import WAYS, signed_roots
from .tolerance import TOLERANCE, UNIT


@dataclass(frozen=True, eq=False)  # compared by identity, so that its predictions can be cached
class Bug(Wrong):
    """A known bug in the functions of a LoRA implementation."""

    breaks: str = "forward"  # the claim that it breaks, as the report prints it
    kinds: tuple[str, ...] = tuple(KINDS)  # the kinds that it applies to, or "adam"; the tests plant it in the first


ALL_KINDS = tuple(KINDS)
BOTH_DORAS = ("dora", "dora-full")
STANDARD_SCALING = tuple(kind for kind in ALL_KINDS if kind != "rslora")  # those whose scaling is alpha / r
LINEAR_KINDS = ("linear", "rslora", *BOTH_DORAS)
CONVOLUTIONS = ("conv2d", "conv1d")
ALL_BUT_EMBEDDING = tuple(kind for kind in ALL_KINDS if kind != "embedding")  # A may be zero there, and B random
SINGLE_ADAPTER = tuple(kind for kind in ALL_KINDS if kind != "fused")  # those whose ranks all belong to one adapter
BFLOAT16_TIE = 2 * UNIT["bfloat16"] / (TOLERANCE * UNIT["float32"])
"""The change of an answer if bfloat16 rounds a tie the other way, in units of the tolerance for float32."""
NUMERIC_CLAIMS = ("forward", "scaling", "slope", "merge", *WAYS)
"""The claims that compare answers with those of `Formulas`."""


def group(breaks: str, rows: Iterable[tuple[Any, ...]], **more: Any) -> list[Bug]:
    """Return the bugs of rows that all break the same claim and apply to the same kinds."""
    slot = "scaling" if breaks == "scaling" else ""  # a wrong scaling may occur together with another bug
    bugs = [replace(Bug(*row), breaks=breaks, slot=slot, **more) for row in rows]
    return [replace(bug, count=_count(bug)) for bug in bugs]


def _count(bug: Bug) -> int:
    """Return the largest number of parts that a bug replaces in a problem of its first kind."""
    problems = KINDS[bug.kinds[0]].problems if callable(bug.parts) else [None]
    return max(len(bug.replaced_in(problem)) for problem in problems)


# fmt: off
BUGS: Sequence[Bug] = (
    # the scaling
    *group("scaling", rows=(
        ("alpha-is-not-divided-by-the-rank",
         "alpha is not divided by the rank: the scaling is alpha, but should be alpha / r",
         {"scaling": SCALINGS["alpha"]}, "rasbt/LLMs-from-scratch #821, Blaizzy/mlx-vlm #846"),
        ("alpha-is-divided-by-the-root-of-the-rank",
         "alpha is divided by the square root of the rank, as in rsLoRA, but should be divided by the rank",
         {"scaling": SCALINGS["alpha / sqrt(r)"]}),
    )),
    # any kind may declare rsLoRA's scaling; the tests plant this bug in rslora
    *group("scaling", kinds=("rslora", *ALL_KINDS), rows=(
        ("rslora-root-is-ignored",
         "rsLoRA's root is ignored: alpha is divided by the rank, and should be divided by its root",
         {"scaling": SCALINGS["alpha / r"]}, "NVIDIA/TensorRT-LLM #1668, huggingface/peft #2733"),
    )),
    *group("scaling", rows=(
        ("alpha-is-ignored", "alpha is ignored: the scaling is 1 / r", {"scaling": lambda alpha, r: 1 / r}),
        ("there-is-no-scaling", "there is no scaling: the update is added as it is", {"scaling": SCALINGS["1"]}),
        ("the-scaling-is-r-alpha", "the scaling is r / alpha, upside down", {"scaling": lambda alpha, r: r / alpha}),
        ("the-scaling-is-applied-twice", "the scaling is applied twice",
         {"scaling": lambda alpha, r: (alpha / r) ** 2}),
        ("alpha-is-divided-by-the-rank-in-whole-numbers",
         "alpha is divided by the rank as an integer: the scaling is alpha // r, but should be alpha / r",
         {"scaling": lambda alpha, r: alpha // r}),
        ("alpha-is-divided-by-the-rank-twice", "alpha is divided by the rank twice",
         {"scaling": lambda alpha, r: alpha / r**2}),
        ("the-scaling-is-alpha-r", "the scaling is alpha r: alpha is multiplied by the rank",
         {"scaling": lambda alpha, r: alpha * r}),
    )),
    # the output
    *group("forward", rows=(
        ("the-output-lacks-the-update", "the output lacks the update: the adapter is not applied", {"update": 0.0}),
        ("the-update-is-subtracted-from-the-output", "the update is subtracted from the output", {"update": -1.0}),
        ("the-update-is-added-twice", "the update is added twice", {"update": 2.0}),
        ("the-output-lacks-x-w-t", "the output lacks x W^T: the base is not applied",
         {"base": lambda x, W: 0.0 * (x @ W.T)}),
        ("the-output-lacks-the-bias", "the output lacks the bias", {"bias": lambda b, G: 0 * b}),
        ("the-bias-is-added-twice", "the bias is added twice", {"bias": lambda b, G: 2 * b}),
        ("the-scaling-multiplies-the-bias-too", "the scaling multiplies the bias too", {"s_in_bias": lambda s: s}),
        ("the-scaling-multiplies-the-base-too", "the scaling multiplies the base too: it is s (x W^T + x A^T B^T)",
         {"s_in_base": lambda s: s}),
        ("the-scaling-multiplies-the-base-and-the-bias-too", "the scaling multiplies the base and the bias too",
         {"s_in_base": lambda s: s, "s_in_bias": lambda s: s}),
        ("the-base-weight-is-taken-transposed",
         "the base's weight is used transposed: W (out, in) is read as (in, out)",
         {"base": lambda x, W: x @ W if W.shape[0] == W.shape[1] else x @ W.T}),
    )),
    # the gradients
    *group("slope", rows=(
        ("dx-lacks-dy-w", "dx lacks dy W: the base passes no gradient, as under torch.no_grad()",
         {"dx_base": 0.0}, "lora-pytorch 0.2.0"),
        ("dx-lacks-the-adapter-path", "dx lacks the adapter's path, s dy B A", {"dx_update": 0.0}),
        ("dx-is-zero", "dx is zero", {"dx_base": 0.0, "dx_update": 0.0}),
        ("lora-a-gradient-lacks-the-scaling-alpha-r", "lora_A's gradient lacks the scaling alpha / r",
         {"s_in_dA": lambda s: 1.0}),
        ("lora-b-gradient-lacks-the-scaling-alpha-r", "lora_B's gradient lacks the scaling alpha / r",
         {"s_in_dB": lambda s: 1.0}),
        ("the-gradients-of-both-factors-lack-the-scaling-alpha-r",
         "the gradients of both factors lack the scaling alpha / r",
         {"s_in_dA": lambda s: 1.0, "s_in_dB": lambda s: 1.0}),
        ("the-adapter-path-in-dx-lacks-the-scaling-alpha-r", "the adapter's path in dx lacks the scaling alpha / r",
         {"s_in_dx": lambda s: 1.0}),
        ("lora-a-gradient-has-the-scaling-twice", "lora_A's gradient has the scaling twice",
         {"s_in_dA": lambda s: s * s}),
        ("lora-b-gradient-has-the-scaling-twice", "lora_B's gradient has the scaling twice",
         {"s_in_dB": lambda s: s * s}),
        ("lora-a-gradient-has-the-opposite-sign", "lora_A's gradient has the opposite sign", {"s_in_dA": lambda s: -s}),
        ("lora-b-gradient-has-the-opposite-sign", "lora_B's gradient has the opposite sign", {"s_in_dB": lambda s: -s}),
        ("all-gradients-have-the-opposite-sign", "all gradients have the opposite sign",
         {"dx_base": -1.0, "dx_update": -1.0, "s_in_dA": lambda s: -s, "s_in_dB": lambda s: -s}),
        ("lora-a-gradient-is-zero", "lora_A's gradient is zero: A does not train", {"s_in_dA": lambda s: 0.0}),
        ("lora-b-gradient-is-zero", "lora_B's gradient is zero: B does not train", {"s_in_dB": lambda s: 0.0}),
        ("the-gradients-of-the-factors-are-means-over-the-rows",
         "the gradients of the factors are means over the rows, not sums",
         {"gradient_scale": lambda n: 1 / n}),
    )),
    # the merge
    *group("merge", rows=(
        ("merge-adds-the-change-transposed", "merge adds the change transposed",
         {"merged": lambda W, BA, s: W + s * (BA.T if W.shape[0] == W.shape[1] else BA)}),
        ("merge-adds-the-change-twice", "merge adds the change twice", {"merged": lambda W, BA, s: W + 2 * s * BA}),
        ("merge-subtracts-the-change", "merge subtracts the change", {"merged": lambda W, BA, s: W - s * BA}),
        ("merge-returns-the-change-alone", "merge returns only the change", {"merged": lambda W, BA, s: s * BA}),
        ("merge-returns-the-weight-as-it-was", "merge returns the weight unchanged", {"merged": lambda W, BA, s: W}),
    )),
    # DoRA
    *group("forward", kinds=BOTH_DORAS, rows=(
        ("dora-norm-is-taken-along-the-wrong-axis",
         "DoRA's norm is taken along the wrong axis: of each column of V, but should be of each row",
         {"norm": lambda W, BA, s: np.linalg.norm(W + s * BA, axis=0, keepdims=True)},
         "wanshuiyin/ARIS-in-AI-Offer #17, KohakuBlueleaf/LyCORIS #216"),
        ("dora-norm-is-that-of-w", "DoRA's norm is that of W, but should be that of V = W + s B A",
         {"norm": lambda W, BA, s: np.linalg.norm(W, axis=1, keepdims=True)}, "Comfy-Org/ComfyUI #15458"),
        ("dora-norm-lacks-the-scaling",
         "DoRA's norm lacks the scaling: it is that of W + B A, but should be that of V = W + s B A",
         {"norm": lambda W, BA, s: np.linalg.norm(W + BA, axis=1, keepdims=True)}),
        ("dora-divides-by-the-square-of-the-norm", "DoRA divides by the square of the norm",
         {"gain": lambda m, n: m[:, None] / n**2}),
        ("dora-norm-is-one-number-for-the-whole-of-v", "DoRA's norm is a single number for all of V",
         {"norm": lambda W, BA, s: parts.norm_of_all(W + s * BA)}),
        ("dora-does-not-divide-by-the-norm", "DoRA does not divide by the norm: the output is m x V^T",
         {"gain": lambda m, n: m[:, None]}),
        ("dora-magnitude-is-not-applied", "DoRA's magnitude is not applied: each row has norm 1",
         {"gain": lambda m, n: 1 / n}),
    )),
    *group("forward", kinds=BOTH_DORAS, shows=("y",), rows=(
        ("dora-adds-the-base-twice", "DoRA adds the base twice: once with its gain, and once as it is",
         {"gain_in_base": lambda G: 1 + G}),
        ("dora-magnitude-is-not-applied-to-the-base",
         "DoRA's magnitude is not applied to the base, but should be applied to all of V",
         {"gain_in_base": np.ones_like}),
        ("dora-magnitude-is-not-applied-to-the-update",
         "DoRA's magnitude is not applied to the update, but should be applied to all of V",
         {"gain_in_update": np.ones_like}),
    )),
    *group("forward", kinds=BOTH_DORAS, rows=(
        ("the-magnitude-is-ignored", "the magnitude is ignored, so the layer is plain LoRA",
         {"gain": lambda m, n: np.ones((len(m), 1))}),
        ("dora-magnitude-multiplies-the-bias-too", "DoRA's magnitude multiplies the bias too",
         {"bias": lambda b, G: G[:, 0] * b, "bias_in_dm": 1.0}, "torchtune 0.6.1"),
    )),
    *group("slope", kinds=BOTH_DORAS, rows=(
        ("dora-magnitude-is-not-trained", "DoRA's magnitude is not trained: its gradient is zero",
         {"dm": lambda dm, n: 0 * dm}, "meta-pytorch/torchtune #2250"),
        ("backward-returns-no-gradient-of-magnitude",
         "backward returns no gradient of magnitude, so DoRA's magnitude does not train",
         {"dm": lambda dm, n: None}, "meta-pytorch/torchtune #2250"),
        ("magnitude-gradient-has-the-opposite-sign", "magnitude's gradient has the opposite sign",
         {"dm": lambda dm, n: -dm}),
        ("magnitude-gradient-is-not-divided-by-the-norm", "magnitude's gradient is not divided by the norm",
         {"dm": lambda dm, n: dm * n.max(axis=1)}),
    )),
    *group("slope", kinds=("dora",), rows=(
        ("the-gradient-passes-through-dora-norm",
         "the gradient passes through DoRA's norm, which is a constant unless declared otherwise (if this is "
         "intended, declare detached_norm = False)",
         {"through_norm": 1.0}),
    )),
    *group("slope", kinds=("dora-full",), rows=(
        ("the-gradient-takes-dora-norm-for-a-constant",
         "the gradient treats DoRA's norm as a constant, but detached_norm = False declares that it passes through",
         {"through_norm": 0.0}),
    )),
    *group("slope", kinds=("dora-full", "dora"), rows=(
        ("the-gradient-through-dora-norm-is-added",
         "the gradient through DoRA's norm is added, but should be subtracted",
         {"through_norm": -1.0}),
    )),
    # embeddings
    *group("slope", kinds=("embedding",), rows=(
        ("lora-a-gradient-overwrites-where-an-id-comes-again",
         "lora_A's gradient is overwritten when an id is repeated, but should be summed",
         {"dA_input": parts.last_of_each}),
        ("lora-a-gradient-is-a-mean-over-an-id-rows", "lora_A's gradient is a mean over an id's rows",
         {"dA_input": lambda X: X / np.maximum(X.sum(axis=0), 1)}),
        ("lora-a-gradient-is-zero-for-id-0", "lora_A's gradient is zero for id 0, as if it were padding",
         {"dA_input": parts.without_first_id}),
    )),
    # convolutions
    *group("forward", kinds=CONVOLUTIONS, rows=(
        ("the-kernels-are-turned-round",
         "the kernels are flipped: this is a convolution, but torch computes a cross-correlation",
         parts.flip_kernels),
    )),
    *group("forward", kinds=CONVOLUTIONS, shows=("y", "x", "merged"), rows=(
        ("the-kernels-of-lora-a-are-turned-round",
         "lora_A's kernels are flipped: this is a convolution, but torch computes a cross-correlation",
         parts.flip_kernels_of_A),
    )),
    *group("merge", kinds=CONVOLUTIONS, rows=(
        ("merge-turns-the-kernels-round", "merge flips the kernels",
         parts.kernels(lambda k: np.flip(k, tuple(range(2, k.ndim))))),
        ("merge-exchanges-the-channels-and-the-kernel-axes", "merge swaps the channels and the kernel's axes",
         parts.kernels(lambda k: np.moveaxis(k, 1, -1))),
        ("merge-reads-the-kernel-axes-first-and-the-channels-last",
         "merge reads the kernel's axes first and the channels last",
         parts.kernels(lambda k: np.moveaxis(k.reshape(len(k), *k.shape[2:], k.shape[1]), -1, 1))),
        ("merge-exchanges-the-kernel-height-and-width", "merge swaps the kernel's height and width",
         parts.kernels(parts.swap_height_and_width)),
    )),
    *group("forward", kinds=CONVOLUTIONS, shows=("y", "x"), rows=(
        ("b-groups-are-ignored",
         "B's groups are ignored: each output sums all hidden channels, but should sum those of its group",
         parts.no_groups, "Tencent/YOLO-Master #228"),
        ("groups-are-ignored-in-a-depthwise-convolution",
         "groups are ignored in a depthwise convolution: each output sums all hidden channels",
         parts.depthwise),
    )),
    # dropout
    *group("forward", kinds=("dropout",), rows=(
        ("dropout-is-not-applied", "the mask is not applied", parts.WITHOUT_MASK),
        ("dropout-is-applied-to-the-base-too",
         "the mask is applied to the base too, but should be applied only in the adapter's path",
         {"dropped_in_base": lambda x, mask: x * mask}),
        ("what-dropout-keeps-is-not-scaled", "the entries that the mask keeps are not scaled by 1 / (1 - p)",
         {name: lambda x, mask: x * (mask != 0) for name in parts.WITHOUT_MASK}),
    )),
    *group("slope", kinds=("dropout",), rows=(
        ("dx-lacks-the-mask", "dx lacks the mask: the adapter's path passes gradients to dropped entries",
         {"dropped_in_dx": lambda dx, mask: dx}),
        ("lora-a-gradient-lacks-the-mask",
         "lora_A's gradient lacks the mask: it uses x, but should use the masked x",
         {"dropped_in_dA": lambda x, mask: x}),
    )),
    # the layout of the factors
    *group("forward", shows=("y", "x", "merged"), rows=(
        ("lora-b-is-reshaped-where-it-lies-transposed",
         "lora_B is read as (r, out) and reshaped, but should be transposed",
         {"used_B": lambda B: B.T.reshape(B.shape)}, "unslothai/unsloth-zoo #1269"),
        ("lora-a-is-reshaped-where-it-lies-transposed",
         "lora_A is read as (in, r) and reshaped, but should be transposed",
         {"used_A": lambda A: A.T.reshape(A.shape)}),
        ("lora-b-is-reshaped-in-the-place-of-its-transpose",
         "lora_B (out, r) is reshaped to (r, out), but should be transposed",
         {"used_B": lambda B: B.reshape(B.shape[::-1]).T}, "unslothai/unsloth-zoo #1269"),
        ("lora-a-is-reshaped-in-the-place-of-its-transpose",
         "lora_A (r, in) is reshaped to (in, r), but should be transposed",
         {"used_A": lambda A: A.reshape(A.shape[::-1]).T}),
    )),
    *group("forward", shows=("y",), rows=(
        ("the-base-weight-is-reshaped-in-the-place-of-its-transpose",
         "the base's weight (out, in) is reshaped to (in, out), but should be transposed",
         {"base": lambda x, W: x @ W.reshape(W.shape[::-1])}),
    )),
    *group("forward", shows=("y", "x", "merged"), rows=(
        ("the-ranks-of-the-factors-stand-in-opposite-orders",
         "the ranks of lora_B are in the opposite order to those of lora_A",
         {"used_B": lambda B: B[:, ::-1]}),
        ("the-halves-of-the-ranks-are-exchanged", "the two halves of the ranks are swapped in one of the factors",
         {"used_B": lambda B: np.roll(B, B.shape[1] // 2, axis=1)},
         "huggingface/diffusers #13998, sgl-project/sglang #27274"),
    )),
    *group("forward", kinds=SINGLE_ADAPTER, rows=(
        ("the-last-rank-is-left-out",
         "the last rank is dropped: the last row of lora_A and the last column of lora_B have no effect",
         parts.all_ranks_but_one),
    )),
    # sizes beyond the tiles of a kernel
    *group("forward", kinds=LINEAR_KINDS, rows=(
        ("ranks-above-32-are-left-out",
         "ranks above 32 are dropped: only the first 32 rows of lora_A and columns of lora_B have an effect",
         parts.ranks_up_to_32, "predibase/lorax #70"),
    )),
    *group("forward", kinds=LINEAR_KINDS, shows=("y",), rows=(
        ("rows-from-128-on-lack-the-update", "rows from index 128 on lack the update", parts.rows_up_to_128),
    )),
    *group("forward", kinds=LINEAR_KINDS, rows=(
        ("outputs-from-128-on-lack-the-update", "outputs from index 128 on lack the update", parts.outputs_up_to_128),
    )),
    # edge cases of the contract
    *group("alpha of 0", kinds=STANDARD_SCALING, rows=(
        ("an-alpha-of-0-is-taken-for-1", "an alpha of 0 is replaced by 1, as in `alpha or 1`",
         {"scaling": lambda alpha, r: (alpha or 1) / r}),
        ("an-alpha-of-0-is-taken-for-the-rank", "an alpha of 0 is replaced by the rank, as in `alpha or r`",
         {"scaling": lambda alpha, r: (alpha or r) / r}),
    )),
    *group("alpha of 0", kinds=("rslora",), rows=(
        ("rslora-an-alpha-of-0-is-taken-for-the-rank",
         "an alpha of 0 is replaced by the rank, as in `alpha or r`, and divided by the rank's square root",
         {"scaling": lambda alpha, r: (alpha or r) / r**0.5}),
    )),
    *group("row of zeros", kinds=BOTH_DORAS, rows=(
        ("dora-divides-by-the-length-of-a-row-of-zeros",
         "DoRA divides by the norm of a row of zeros: the output is NaN there, but should be the bias",
         {"gain": lambda m, n: m[:, None] / n}, "huggingface/peft #2049, huggingface/peft #3237"),
    )),
    # four bits
    *group("forward", kinds=("nf4",), shows=("y", "x", "merged"), rows=(
        ("nf4-the-halves-of-a-byte-are-exchanged",
         "the two codes of a byte are swapped: the first code is in the high half",
         parts.misread_weight(low_first=True)),
        ("nf4-the-scales-of-the-scales-are-left-out", "the scales of the scales are ignored",
         parts.misread_weight(only_double=True, nested_absmax=np.ones(2, np.float32)),
         "bitsandbytes-foundation/bitsandbytes #1549"),
        ("nf4-the-mean-of-the-scales-is-not-added", "the mean of the scales is not added",
         parts.misread_weight(only_double=True, mean=np.zeros(1, np.float32))),
        ("nf4-the-mean-of-the-scales-is-read-in-bfloat16", "the mean of the scales is rounded to bfloat16",
         parts.misread_weight(only_double=True, mean=np.array([1.453125], np.float32)),
         "bitsandbytes-foundation/bitsandbytes #1971"),
        ("nf4-the-code-book-is-of-middle-quantiles",
         "the code book has the quantiles at (i + 1/2) / 16, which do not include 0",
         parts.misread_weight(book=parts.middle_quantiles())),
        ("nf4-the-code-book-has-even-steps", "the code book has even steps from -1 to 1",
         parts.misread_weight(book=np.linspace(-1, 1, 16))),
        ("nf4-the-scales-of-the-blocks-are-left-out", "the scales of the blocks are ignored", parts.without_scales),
        ("nf4-the-codes-are-read-column-after-column", "the codes are read column by column, but are stored row by row",
         parts.column_by_column),
    )),
    # slots
    *group("forward", kinds=("fused",), rows=(
        ("slots-of-one-width-are-exchanged",
         "slots of the same width are swapped, such as k and v",
         parts.rows_by(parts.swapped_slot_rows)),
        ("slots-stand-in-the-opposite-order", "the slots' updates are in the opposite order",
         parts.rows_by(lambda fused, i: parts.rows_from(fused, i, sum(fused.widths[i + 1 :])))),
        ("a-slots-update-is-added-to-the-next",
         "a slot's update is added to the rows of the next slot, such as k's to those of v",
         parts.rows_by(parts.next_slot_rows)),
        ("slots-are-taken-for-equally-wide",
         "the slots are assumed to have equal widths: each begins at a multiple of out / slots",
         parts.rows_by(lambda fused, i: parts.rows_from(fused, i, i * (fused.out_features // len(fused.widths)))),
         "Lightning-AI/litgpt #357"),
        ("the-rows-of-slots-alternate-by-groups",
         "the slots are assumed to be in two groups, q1 k1 v1 q2 k2 v2, but each is contiguous",
         parts.by_groups(lambda fused: 2), "Lightning-AI/litgpt #891"),
        ("the-rows-of-slots-alternate",
         "the rows of the slots are assumed to alternate, but each slot is contiguous",
         parts.by_groups(lambda fused: min(fused.widths))),
        ("a-slot-without-an-adapter-gets-an-update",
         "a slot without an adapter gets an update: the others' updates are added from row 0 on, without gaps",
         parts.rows_by(parts.rows_without_gaps)),
        ("the-last-slots-update-is-left-out", "the last slot's update is missing",
         lambda fused: {"slot_rows": lambda fused, i: fused.rows_of(i) if i != fused.adapted[-1] else None}),
        ("the-first-slot-alone-gets-its-update", "only the first slot gets its update",
         lambda fused: {"slot_rows": lambda fused, i: fused.rows_of(i) if i == fused.adapted[0] else None}),
        # these break "forward" and not "scaling", which is about a single factor for the whole output
        ("one-scaling-for-all-slots", "the first slot's scaling is used for all slots",
         {"slot_scale": lambda fused, i: (fused.alphas[fused.adapted[0]], fused.ranks[fused.adapted[0]])},
         "huggingface/diffusers #14409"),
        ("the-first-slots-rank-for-all-slots", "each slot's alpha is divided by the first slot's rank",
         {"slot_scale": lambda fused, i: (fused.alphas[i], fused.ranks[fused.adapted[0]])}),
        ("the-first-slots-alpha-for-all-slots", "the first slot's alpha is divided by each slot's rank",
         {"slot_scale": lambda fused, i: (fused.alphas[fused.adapted[0]], fused.ranks[i])}),
        ("alpha-is-divided-by-the-ranks-of-all-slots",
         "alpha is divided by the sum of all slots' ranks, as if their lora_A were one array",
         {"slot_scale": lambda fused, i: (fused.alphas[i], sum(fused.ranks))}, "kohya-ss/sd-scripts #2204"),
        ("one-lora-a-for-all-slots", "the first slot's lora_A is used for all slots", parts.first_lora_A_for_all),
    )),
    *group("slope", kinds=("fused",), rows=(
        ("dx-has-the-first-slots-path-alone", "dx has only the first slot's path, but should have those of all slots",
         {"slot_in_dx": lambda fused, i: float(i == fused.adapted[0])}),
    )),
    # experts
    *group("forward", kinds=("experts",), rows=(
        ("experts-lora-b-is-read-expert-slowest",
         "lora_B (out, r E) is read with the expert as its slow index, and has it as its fast one: B_e is every E-th "
         "column",
         {"columns_of_B": lambda E, r: np.arange(E * r).reshape(E, r)},
         "unslothai/unsloth-zoo #1269, unslothai/unsloth-zoo #1232"),
        ("experts-lora-a-is-read-expert-fastest",
         "lora_A (E r, in) is read with the expert as its fast index, and has it as its slow one: A_e is r rows in a "
         "row",
         {"rows_of_A": lambda E, r: np.arange(r * E).reshape(r, E).T}),
        ("experts-both-factors-are-read-the-other-way",
         "both factors are read the other way: lora_A has the expert as its slow index, and lora_B as its fast one",
         {"rows_of_A": lambda E, r: np.arange(r * E).reshape(r, E).T,
          "columns_of_B": lambda E, r: np.arange(E * r).reshape(E, r)}),
        ("experts-in-and-out-are-exchanged",
         "in and out are exchanged, which a square weight lets pass: the change of W_e is (B_e A_e)^T",
         {"exchanged": True}, "huggingface/peft #3165, vllm-project/vllm #52194"),
        ("experts-take-the-factors-of-the-next", "an expert takes the factors of the next one",
         {"factors_of": lambda e, E: (e + 1) % E}),
        ("experts-stand-in-the-opposite-order", "the experts' factors are taken in the opposite order",
         {"factors_of": lambda e, E: E - 1 - e}),
        ("experts-all-take-the-first-factors", "the first expert's factors are used for all",
         {"factors_of": lambda e, E: 0}),
        ("experts-the-first-alone-is-adapted", "the first expert alone gets its update",
         {"factors_of": lambda e, E: 0 if e == 0 else E}),
        ("experts-the-last-is-left-out", "the last expert's update is left out",
         {"factors_of": lambda e, E: E if e == E - 1 > 0 else e}),
        # these break "forward" and not "scaling", which is about a single factor for the whole output
        ("experts-the-scaling-compounds",
         "the scaling compounds over the experts: that of expert e is (alpha / r)^(e + 1), as where B *= s in a loop",
         {"scaling_of": lambda s, e, E: s ** (e + 1)}),
    )),
    *group("scaling", kinds=("experts",), rows=(
        ("experts-alpha-is-divided-by-the-packed-rank",
         "alpha is divided by the rank of the packed factors, E r, and should be divided by that of one expert",
         {"scaling_of": lambda s, e, E: s / E}),
    )),
    *group("forward", kinds=("experts",), shows=("y", "x"), rows=(
        ("experts-all-take-the-first-weight", "the base's first weight is used for all experts",
         {"weight_of": lambda e, E: 0}),
    )),
    *group("slope", kinds=("experts",), rows=(
        ("experts-the-gradients-are-means-over-an-experts-rows",
         "the gradients of an expert's factors are means over its rows, not sums",
         {"gradient_scale_of": lambda n: 1 / max(n, 1)}),
    )),
    # float32 factors on a bfloat16 base
    *group("forward", kinds=("mixed",), rows=(
        ("mixed-the-factors-are-rounded",
         "lora_A and lora_B are rounded to bfloat16, the base's precision, but should stay in float32",
         {"used_A": as_bfloat16, "used_B": as_bfloat16}, "axolotl-ai-cloud/axolotl #3143"),
        ("mixed-lora-a-is-rounded", "lora_A is rounded to bfloat16, the base's precision, but should stay in float32",
         {"used_A": as_bfloat16}),
        ("mixed-lora-b-is-rounded", "lora_B is rounded to bfloat16, the base's precision, but should stay in float32",
         {"used_B": as_bfloat16}),
    )),
    *group("forward", kinds=("mixed",), ties=BFLOAT16_TIE, rows=(
        ("mixed-the-adapter-computes-in-bfloat16",
         "the adapter computes in bfloat16, as under autocast: its factors and all of its products are rounded",
         parts.autocast(), "AgileRL/AgileRL #623"),
        ("mixed-the-update-is-rounded-before-the-sum",
         "the update is rounded to bfloat16 before it is added: the sum is computed in the base's precision",
         {"final_update": lambda update, *_: as_bfloat16(update)}),
    )),
    *group("slope", kinds=("mixed",), ties=BFLOAT16_TIE, rows=(
        ("mixed-the-gradients-are-rounded",
         "the gradients of lora_A and lora_B are rounded to bfloat16, but should be float32 like the factors",
         {"final_gradients": lambda dA, dB, *_: (as_bfloat16(dA), as_bfloat16(dB))}),
    )),
    *group("output dtype", kinds=("mixed",), rows=(
        ("mixed-the-output-is-float32",
         "the output is not rounded to bfloat16, the precision of the base and of x (or declare output = 'float32')",
         {}, "mflux-community/mflux #740"),
    )),
    # combined adapters
    *group("cat", kinds=("combine",), shows=WAYS, rows=(
        ("combine-the-new-adapter-keeps-rsloras-root",
         "the new adapter keeps the first adapter's use_rslora: with alpha = r, its scaling is the square root of "
         "its rank, but should be 1",
         {"sum_new": lambda sums, s, r: r**0.5 if sums.stabilised[0] else 1.0}, "huggingface/peft #3761"),
        ("combine-the-new-adapter-keeps-the-first-alpha",
         "the new adapter keeps the first adapter's alpha: its scaling is alpha over the new rank, but should be 1",
         {"sum_new": lambda sums, s, r: sums.alpha / (r**0.5 if sums.stabilised[0] else r)}),
        ("combine-the-new-adapter-keeps-the-first-scaling", "the new adapter keeps the first adapter's scaling, in "
         "addition to those in the factors", {"sum_new": lambda sums, s, r: s[0]}),
        ("combine-the-scalings-are-left-out", "the scalings are ignored: the result is the sum of w B A",
         {"sum_scaling": lambda sums, i, s: 1.0}),
        ("combine-one-scaling-for-all", "the first adapter's scaling is used for all adapters",
         {"sum_scaling": lambda sums, i, s: sums.scalings(RIGHT_FORMULAS)[0]}),
        ("combine-rsloras-root-is-ignored", "rsLoRA's square root is ignored: each alpha is divided by its rank",
         {"sum_scaling": lambda sums, i, s: sums.alphas[i] / sums.ranks[i]}),
        ("combine-the-first-use-rslora-for-all", "the first adapter's use_rslora is used for all adapters",
         {"sum_scaling": lambda sums, i, s: sums.alphas[i] / sums.ranks[i] ** (0.5 if sums.stabilised[0] else 1.0)}),
        ("combine-the-sign-of-a-weight-is-lost", "the sign of a negative weight is lost",
         {"sum_weight": lambda sums, i: abs(sums.weights[i])}),
        ("combine-negative-weights-are-left-out", "adapters with negative weights are dropped",
         {"sum_weight": lambda sums, i: max(sums.weights[i], 0.0)}),
        ("combine-the-weights-are-normalised", "the weights are divided by their sum",
         {"sum_weight": lambda sums, i: sums.weights[i] / (sum(sums.weights) or 1.0)}),
        ("combine-the-weights-are-normalised-by-their-absolute-values",
         "the weights are divided by the sum of their absolute values",
         {"sum_weight": lambda sums, i: sums.weights[i] / sum(map(abs, sums.weights))}),
        ("combine-the-weights-are-left-out", "the weights are ignored: each adapter is added once",
         {"sum_weight": lambda sums, i: 1.0}),
        ("combine-the-last-adapter-is-left-out", "the last adapter is dropped",
         {"sum_weight": lambda sums, i: sums.weights[i] * (i + 1 < len(sums.ranks) or i == 0)}),
    )),
    *group("cat", kinds=("combine",), shows=("cat",), rows=(
        ("combine-cat-weighs-both-factors", "cat multiplies both factors by the weight, which is therefore squared",
         {"in_cat": lambda w, s: w * w * s}),
        ("combine-cat-scales-both-factors", "cat multiplies both factors by the scaling, which is therefore squared",
         {"in_cat": lambda w, s: w * s * s}),
        ("combine-cat-pairs-other-adapters", "cat has the factors A and the factors B in different orders",
         parts.paired_in_reverse),
    )),
    *group("linear", kinds=("combine",), shows=("linear",), rows=(
        ("combine-linear-takes-no-roots", "linear multiplies both factors by w s, not by its square root: each w s is "
         "squared", {"in_linear": lambda w, s: (w * s, w * s)}),
        ("combine-linear-takes-no-root-of-the-scaling",
         "linear takes the square root of the weight only: the scaling is in both factors and is therefore squared",
         {"in_linear": lambda w, s: tuple(s * root for root in signed_roots(w))}),
        ("combine-linear-loses-the-sign-in-the-root",
         "linear loses the sign of a negative weight: it multiplies both factors by the square root of |w s|",
         {"in_linear": lambda w, s: (signed_roots(w * s)[0],) * 2}),
        ("combine-linear-has-the-sign-in-both-factors",
         "linear has the sign of a negative weight in both factors, where it cancels",
         {"in_linear": lambda w, s: (signed_roots(w * s)[1],) * 2}),
        ("combine-linear-has-the-sign-in-lora-b",
         "linear has a negative weight's sign in lora_B, but PEFT in lora_A: the signs of the cross terms differ",
         {"in_linear": lambda w, s: signed_roots(w * s)[::-1]}),
        ("combine-linear-cuts-off-negative-weights", "linear uses 0 for the square root of a negative weight",
         {"in_linear": lambda w, s: signed_roots(max(w * s, 0.0))}),
        ("combine-linear-weighs-one-factor",
         "linear multiplies only lora_A by w s: the cross terms have the weight of one adapter",
         {"in_linear": lambda w, s: (1.0, w * s)}),
        ("combine-linear-weighs-lora-b-alone",
         "linear multiplies only lora_B by w s: the cross terms have the weight of one adapter",
         {"in_linear": lambda w, s: (w * s, 1.0)}),
    )),
    *group("svd", kinds=("combine",), shows=("svd",), rows=(
        ("combine-svd-scales-twice",
         "svd applies each scaling twice: in the change of weight, and again with the weight",
         {"in_svd": lambda w, s: w * s * s}, "peft 0.20.0"),
        ("combine-svd-keeps-the-smallest", "svd keeps the smallest singular values, but should keep the largest",
         {"sum_values": lambda S, r: S * (np.arange(len(S)) >= len(S) - r)}),
        ("combine-svd-cuts-nothing", "svd truncates nothing: the rank of its change is above the requested rank",
         {"sum_values": lambda S, r: S}),
        ("combine-svd-does-not-cut-one-adapter",
         "svd returns a single adapter unchanged, whatever the requested rank",
         lambda sums: {"sum_values": lambda S, r: S} if len(sums.ranks) == 1 else {}, "peft 0.21.2"),
        ("combine-svd-keeps-one-less", "svd keeps one singular value fewer than the rank",
         {"sum_values": lambda S, r: S * (np.arange(len(S)) < r - 1)}),
        ("combine-svd-leaves-the-singular-values-out", "svd drops the singular values: its change is U V^T",
         {"sum_values": lambda S, r: 1.0 * (np.arange(len(S)) < r)}),
        ("combine-svd-has-the-singular-values-in-both-factors",
         "svd multiplies both factors by the singular values, which are therefore squared",
         {"sum_values": lambda S, r: S * S * (np.arange(len(S)) < r)}),
        ("combine-svd-has-the-roots-in-one-factor",
         "svd multiplies only one factor by the square roots of the singular values",
         {"sum_values": lambda S, r: np.sqrt(S) * (np.arange(len(S)) < r)}),
    )),
    # the initial values
    *group("start", kinds=ALL_BUT_EMBEDDING, rows=(
        ("a-starts-with-the-fan-of-the-rank", "A's initial spread is that of fan r",
         {"fan": lambda r, n_in, n_out, kernel: r}, "lora-pytorch 0.2.0"),
        ("a-starts-with-the-fan-of-the-output", "A's initial spread is that of fan out",
         {"fan": lambda r, n_in, n_out, kernel: n_out}),
    )),
    *group("start", kinds=CONVOLUTIONS, rows=(
        ("a-starts-with-the-fan-of-the-channels-alone",
         "A's initial spread is that of the channels only, without the kernel",
         {"fan": lambda r, n_in, n_out, kernel: n_in}),
    )),
    # Adam
    *group("adam", kinds=("adam",), rows=(
        ("adam-eps-stands-inside-the-root", "Adam's eps is inside the square root",
         {"direction": lambda m_hat, v_hat, eps: m_hat / np.sqrt(v_hat + eps)}),
        ("adam-has-no-bias-correction", "Adam has no bias correction",
         {"m_hat": lambda m, beta, t: m, "v_hat": lambda v, beta, t: v}),
        ("adam-corrects-no-bias-of-v", "Adam does not correct the bias of v", {"v_hat": lambda v, beta, t: v}),
        ("adam-corrects-no-bias-of-m", "Adam does not correct the bias of m", {"m_hat": lambda m, beta, t: m}),
        ("adam-eps-is-added-before-the-correction", "Adam's eps is added before the bias correction",
         {"eps": lambda eps, beta2, t: eps / np.sqrt(1 - beta2**t)}),
        ("adam-has-no-eps", "Adam has no eps", {"eps": lambda eps, beta2, t: 0.0}),
        ("adam-eps-is-1e-6", "Adam's eps is 1e-6, but should be 1e-8", {"eps": lambda eps, beta2, t: 1e-6}),
        ("adam-divides-by-v", "Adam divides by v, not by its square root",
         {"direction": lambda m_hat, v_hat, eps: m_hat / (v_hat + eps)}),
        ("adam-goes-uphill", "Adam steps in the direction of the gradient, uphill", {"step": lambda d, theta, g: -d}),
        ("adam-takes-the-size-of-the-gradient-for-its-square", "Adam's v is a mean of |g|, but should be one of g^2",
         {"v": lambda v, g, beta: beta * v + one_minus(beta) * abs(g)}),
        ("adam-betas-are-exchanged", "Adam's betas are swapped", {"betas": lambda betas: betas[::-1]}),
        ("a-weight-decay-of-0-01-is-added-to-adam-step", "a weight decay of 0.01 is added to Adam's step, as in AdamW",
         {"step": lambda d, theta, g: d + 0.01 * theta}),
        ("the-step-is-plain-gradient-descent", "the step is plain gradient descent", {"step": lambda d, theta, g: g}),
        ("the-step-moves-nothing", "the step changes nothing", {"step": lambda d, theta, g: 0 * theta}),
    )),
)
# fmt: on


def bugs_of(kind: str, breaks: Sequence[str] = NUMERIC_CLAIMS) -> list[Bug]:
    """Return the known bugs of a kind that break one of the given claims, in table order."""
    return [bug for bug in BUGS if kind in bug.kinds and bug.breaks in breaks]


def known(flag: str) -> Bug:
    """Return the known bug with the given flag."""
    return next(bug for bug in BUGS if bug.flag == flag)
