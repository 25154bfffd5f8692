"""Fifteen exercises with graders: rebuild `LoRA.backward` in five steps, then predict what it does or costs.

Pass a function that you wrote to its grader, ``check_...``, and a number or choice that answers a question to
`check_prediction`. Each prints that the answer is right, or what the mistake is, and returns whether it is right.

====  ==================================================  ===========================================================
step  you write                                           it returns
====  ==================================================  ===========================================================
1     ``loss_gradient(prediction, target)``               dy (N, out) of the mean squared error
2     ``grad_B(dy, h, s)``                                dB (out, r)
3     ``grad_h(dy, B, s)``                                dh (N, r)
4     ``grad_A(dh, x)``                                   dA (r, in)
5     ``backward(dy, x, A, B, alpha)``                    dx (N, in), dA (r, in), dB (out, r)
      ``lora_backward(x, A, B, dL_dy, alpha, r)``         the same, or (dA, dB), as interviews ask for it
6     five numbers, for ``check_prediction(name, n)``     the results of a few lines of code
7     ``first_to_move(A_is_zero, B_is_zero)``             the names of the factors that the first step changes
      ``start(in_features, out_features, rank, rng)``     A (r, in) and B (out, r), initialised as in PEFT
8     ``merged(W, A, B, alpha)``                          the weight (out, in) of one plain layer
9     ``count(in_features, out_features, rank)``          the number of parameters that an adapter trains
10    ``factors(change, rank)``                           A (r, in) and B (out, r) with B A closest to change
11    ``grad_scores(P, dP)``                              dS (T, U) of the softmax in attention
12    two numbers                                         the memory in GB for training a 7B model
13    a choice                                            the best rank, read from a curve
14    two choices                                         how Adam's first step depends on the rank
15    ``grad_V(dW, V, m)``, and a number                  dV (out, in) of DoRA's W = m V / |V|; then dV along V
====  ==================================================  ===========================================================

``python -m minilora.exercises`` prints how to begin.
"""

from .experiments import rank_curve, rate_curve
from .functions import (
    check_backward,
    check_count,
    check_factors,
    check_first_to_move,
    check_grad_A,
    check_grad_B,
    check_grad_h,
    check_grad_scores,
    check_grad_V,
    check_lora_backward,
    check_loss_gradient,
    check_merged,
    check_start,
)
from .questions import QUESTIONS, Question, check_prediction

__all__ = [
    "QUESTIONS",
    "Question",
    "check_backward",
    "check_count",
    "check_factors",
    "check_first_to_move",
    "check_grad_A",
    "check_grad_B",
    "check_grad_V",
    "check_grad_h",
    "check_grad_scores",
    "check_lora_backward",
    "check_loss_gradient",
    "check_merged",
    "check_prediction",
    "check_start",
    "rank_curve",
    "rate_curve",
]
