"""Kinds of layers, and the set of problems that each is tried on: every one is a linear layer on rows.

    kind                  x               weight             lora_A            lora_B
    linear, rslora, dora  (N, in)         (out, in)          (r, in)           (out, r)
    dropout               (N, in)         (out, in)          (r, in)           (out, r)
    embedding             (N,) ids        (V, dim)           (r, V)            (dim, r)
    conv1d                (N, C, L)       (out, C, K)        (r, C, K)         (out, r, 1)
    conv2d                (N, C, H, W)    (out, C, KH, KW)   (r, C, KH, KW)    (out, r, 1, 1)
    nf4                   (N, in)         codes and scales   (r, in)           (out, r)
    mixed                 (N, in)         (out, in)          (r, in)           (out, r)
    fused                 (N, in)         (out, in)          a list, one entry for each slot of the outputs
    experts               (N, in)         (E, out, in)       (E r, in)         (out, r E)
    combine               a list of adapters, each (r, in) and (out, r), and their weights

The shapes are those of PyTorch and of PEFT. See `images`, `lowprecision` and `several`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .formulas import DORA, DROPOUT, RIGHT, RSLORA, Formulas
from .images import Ids, Images
from .lowprecision import FourBits, Mixed
from .problem import Problem
from .several import Fused, Stacks, Sums


@dataclass(frozen=True)
class ProblemSet:
    """What a kind of layer should give, and the problems that it is tried on."""

    formulas: Formulas
    problems: tuple[Problem, ...]


AGAIN = Problem(7, 5, 3, 2, alpha=4.5, seed=7)
"""It has the sizes of the first problem, and other numbers: nothing may be remembered by its shape."""
LINEAR = (
    Problem(7, 5, 3, 2, alpha=3.0),
    Problem(4, 3, 6, 4, alpha=10.0, bias=False, seed=1),
    Problem(1, 8, 2, 3, alpha=0.5, seed=2),
    Problem(6, 6, 6, 4, alpha=7.0, seed=3),  # square: there a transposed factor fits
    Problem(3, 4, 9, 5, alpha=2.5, bias=False, seed=4),
    Problem(5, 2, 3, 6, alpha=16.0, seed=5),  # of a rank above both widths
    Problem(2, 7, 4, 1, alpha=5.0, seed=6),  # of rank 1, for which some have code of its own
    AGAIN,
    Problem(5, 3, 4, 2, alpha=3.0, seed=8, start=True),
    Problem(67, 130, 69, 17, alpha=24.0, seed=9),  # each a little above a power of two, where blocks end
    Problem(2, 4096, 5, 3, alpha=12.0, seed=10),  # as wide as layers are in use
    Problem(3, 35, 40, 33, alpha=20.0, seed=11),  # of a rank above 32, which some kernels hold at most
    Problem(4, 30, 36, 64, alpha=40.0, seed=12),  # of a rank that is a multiple of 32
    Problem(131, 7, 5, 3, alpha=4.0, seed=13),  # more than 128 rows
    Problem(3, 6, 133, 4, alpha=9.0, seed=14),  # more than 128 outputs
)
NARROW = tuple(problem for problem in LINEAR if problem.in_features < 4096)
CONV1D = (
    Images(3, 4, 5, 2, 3.0, kernel=(3,), sizes=(9,), stride=(1,), padding=(0,), dilation=(1,)),
    Images(2, 3, 4, 5, 2.0, False, 1, kernel=(4,), sizes=(11,), stride=(2,), padding=(1,), dilation=(1,)),
    Images(2, 2, 3, 3, 7.0, True, 2, kernel=(2,), sizes=(8,), stride=(3,), padding=(2,), dilation=(3,)),
    Images(3, 4, 6, 2, 5.0, True, 3, kernel=(3,), sizes=(7,), stride=(1,), padding=(1,), dilation=(1,), groups=2),
    Images(2, 4, 8, 4, 3.0, True, 4, kernel=(3,), sizes=(6,), stride=(1,), padding=(1,), dilation=(1,), groups=4),
)
CONV2D = (
    Images(2, 3, 4, 2, 3.0),
    Images(1, 2, 5, 3, 2.0, False, 1, kernel=(2, 3), sizes=(7, 6), stride=(2, 1), padding=(1, 2)),
    Images(2, 4, 3, 5, 7.0, True, 2, kernel=(3, 2), sizes=(8, 7), stride=(1, 2), padding=(0, 1), dilation=(2, 3)),
    Images(3, 4, 4, 4, 6.0, True, 3, kernel=(1, 1), sizes=(3, 4)),
    Images(2, 4, 6, 4, 10.0, True, 4, sizes=(5, 7), padding=(1, 1), groups=2),
    Images(2, 4, 6, 2, 3.0, False, 5, kernel=(2, 2), sizes=(4, 5), groups=2),
    Images(3, 4, 8, 4, 7.0, True, 6, kernel=(3, 2), sizes=(4, 5), groups=4),  # depthwise
)
EMBEDDING = (
    Ids(7, 5, 3, 2, 3.0),
    Ids(4, 9, 6, 4, 10.0, seed=1),
    Ids(1, 6, 2, 3, 0.5, seed=2),
    Ids(12, 6, 6, 5, 7.0, seed=3),
    Ids(300, 50, 20, 8, 12.0, seed=4),
    Ids(6, 4, 5, 1, 2.0, seed=5, start=True),
)
FOUR_BITS = (
    FourBits(5, 37, 6, 2, 3.0),  # blocks end within rows, and the last one is shorter
    FourBits(3, 64, 5, 4, 10.0, bias=False, seed=1),
    FourBits(4, 15, 9, 3, 2.0, seed=2),  # an odd number of weights
    FourBits(2, 160, 110, 5, 16.0, seed=3, double=True),
    FourBits(6, 33, 3, 2, 5.0, bias=False, seed=4, double=True),
)
MIXED = (
    Mixed(7, 5, 3, 2, alpha=3.0),
    Mixed(4, 3, 6, 4, alpha=10.0, bias=False, seed=1),
    Mixed(6, 6, 6, 4, alpha=7.0, seed=3),
    Mixed(2, 7, 4, 1, alpha=5.0, seed=6),
    Mixed(5, 3, 4, 2, alpha=3.0, seed=8, start=True),
    Mixed(5, 13, 9, 4, alpha=2.7, seed=30, near=True),
    Mixed(7, 19, 11, 3, alpha=2.2, seed=31, near=True),
    Mixed(5, 130, 20, 17, alpha=24.0, seed=9),
    Mixed(3, 35, 40, 33, alpha=20.0, seed=11),
)
FUSED = (
    Fused.of(7, 5, (8, 4, 4), (2, 0, 3)),  # q, k and v, grouped; k has no adapter
    Fused.of(4, 8, (5, 5), (4, 3), alpha=10.0, bias=False, seed=1),  # gate and up
    Fused.of(5, 6, (4, 4, 4), (3, 3, 3), alpha=2.0, seed=2),  # slots and ranks of one size: there an exchange fits
    Fused.of(6, 8, (4, 2, 2), (2, 3, 5), alpha=7.0, seed=3),  # square
    Fused.of(1, 7, (6, 3, 3), (0, 4, 2), alpha=0.5, seed=4),
    Fused.of(3, 4, (7, 7), (0, 5), alpha=2.5, bias=False, seed=5),  # of two slots the second alone
    Fused.of(7, 5, (8, 4, 4), (2, 0, 3), alpha=4.5, seed=7),  # the sizes of the first, and other numbers
    Fused.of(5, 3, (6, 2, 2), (2, 3, 1), seed=8, start=True),
    Fused.of(4, 35, (34, 17, 17), (33, 5, 9), alpha=24.0, seed=9),  # a little above powers of two
)
EXPERTS = (
    Stacks(11, 5, 4, 2, alpha=3.0, experts=3),
    Stacks(9, 6, 6, 3, alpha=7.0, seed=1, experts=4),  # square: there in and out can be exchanged
    Stacks(10, 4, 8, 3, alpha=10.0, seed=2, experts=2),  # out = 2 in, as gate and up have where d = m
    Stacks(7, 5, 3, 2, alpha=5.0, seed=3, experts=4, idle=2),
    Stacks(1, 7, 4, 3, alpha=0.5, seed=4, experts=3),
    Stacks(4, 3, 5, 2, alpha=2.5, seed=5, experts=1),
    Stacks(8, 4, 7, 1, alpha=2.0, seed=6, experts=5),  # of rank 1, where both packings of a factor are one
    Stacks(11, 5, 4, 2, alpha=4.5, seed=7, experts=3),  # the sizes of the first, and other numbers
    Stacks(6, 3, 4, 2, seed=8, start=True, experts=3),
    Stacks(67, 35, 33, 17, alpha=24.0, seed=9, experts=8),
)
COMBINE = (
    Sums.of(5, 4, 2, [(2, 0.7, False), (2, 0.4, False)]),
    Sums.of(6, 7, 3, [(2, 0.7, False), (2, -0.4, False)], alpha=5.0, seed=1),
    Sums.of(7, 5, 3, [(3, 1.5, False), (2, -0.5, False)], alpha=4.4, seed=2),
    Sums.of(6, 5, 2, [(3, 0.7, True), (3, 0.3, True)], alpha=2.2, seed=3),
    Sums.of(5, 8, 4, [(3, -1.25, True), (3, 0.5, True)], alpha=7.0, seed=4),
    Sums.of(7, 6, 3, [(2, 0.6, True), (3, 1.4, False)], alpha=2.5, seed=5),
    Sums.of(8, 7, 4, [(3, 0.8, False), (3, -0.6, True)], alpha=5.0, seed=162),
    Sums.of(6, 6, 3, [(2, 0.5, False), (2, -1.5, False), (2, 2.0, False)], alpha=3.5, seed=7),
    Sums.of(5, 6, 2, [(3, -0.5, False)], alpha=4.6, seed=8),
    Sums.of(4, 7, 1, [(1, 2.0, False), (1, 0.25, False)], alpha=3.0, seed=9),
    Sums.of(5, 4, 2, [(2, 0.7, False), (2, 0.4, False)], alpha=4.5, seed=10),  # the sizes of the first
    Sums.of(9, 8, 6, [(2, 1.0, True), (4, -1.0, True)], alpha=5.6, seed=11),  # of the sum's own rank
    Sums.of(20, 17, 4, [(5, 0.9, False), (3, -1.1, True)], alpha=12.0, seed=53),
)
SETS = {
    "linear": ProblemSet(RIGHT, LINEAR),
    "rslora": ProblemSet(RSLORA, NARROW),
    "dora": ProblemSet(DORA, NARROW),
    "embedding": ProblemSet(RIGHT, EMBEDDING),
    "conv1d": ProblemSet(RIGHT, CONV1D),
    "conv2d": ProblemSet(RIGHT, CONV2D),
    "dropout": ProblemSet(DROPOUT, NARROW),
    "nf4": ProblemSet(RIGHT, FOUR_BITS),
    "mixed": ProblemSet(RIGHT, MIXED),
    "fused": ProblemSet(RIGHT, FUSED),
    "experts": ProblemSet(RIGHT, EXPERTS),
    "combine": ProblemSet(RIGHT, COMBINE),
    "dora-full": ProblemSet(DORA.with_parts(through_norm=1.0), NARROW),
}
"""The problems of each kind of layer; of DoRA twice, since the gradient may pass through its norm or not."""
DECLARED = tuple(kind for kind in SETS if kind != "dora-full")
"""The kinds that an implementation may have: with DoRA it declares ``detached_norm``."""
