"""What each claim about a layer sees, by layers that are wrong in a way that only it can see."""

import numpy as np
import pytest

from minilora import Linear, mse
from minilora.layer import rows

from .support import claims
from .support.cases import linear_case
from .support.problems import Problem


@pytest.mark.parametrize(("found", "expected"), [(np.nan, 1.0), (1.0, np.nan), (np.inf, 1.0)])
def test_what_is_not_finite_is_close_to_nothing(found, expected):
    with pytest.raises(claims.ClaimBroken):
        claims.require_close("y", np.array([found]), np.array([expected]), 1.0)


def test_a_gradient_buffer_that_is_handed_out_again_is_impure():
    class OneBuffer(Linear):
        """Right, but for the memory: the second backward writes over what the first returned."""

        buffer = None

        def backward(self, dy, cache, *, need_dx=True):
            dx, grads = super().backward(dy, cache, need_dx=need_dx)
            if self.buffer is None:
                self.buffer = [np.empty_like(grads["weight"])]
            grads["weight"] = np.matmul(rows(dy).T, rows(cache[0]), out=self.buffer[0])
            return dx, grads

    problem = Problem(n=4, in_features=3, out_features=2, rank=2)
    claims.backward_is_pure(linear_case(), problem)
    with pytest.raises(claims.ClaimBroken, match="shares memory"):
        claims.backward_is_pure(linear_case(OneBuffer), problem)


def test_a_dx_in_the_outputs_memory_is_impure():
    class UsesUp(Linear):
        """Right, but for the memory: the first backward puts dx where the output was."""

        left = None

        def forward(self, x):
            self.left, cache = super().forward(x)
            return self.left, cache

        def backward(self, dy, cache, *, need_dx=True):
            dx, grads = super().backward(dy, cache, need_dx=need_dx)
            if self.left is not None:
                self.left[...], dx, self.left = dx, self.left, None
            return dx, grads

    with pytest.raises(claims.ClaimBroken, match="gradient of x shares memory"):
        claims.backward_is_pure(linear_case(UsesUp), Problem(n=4, in_features=3, out_features=3, rank=2))


def test_what_a_backward_loses_of_small_gradients_is_seen():
    class Cuts(Linear):
        def backward(self, dy, cache, *, need_dx=True):
            return super().backward(np.where(abs(dy) < 1e-9, 0, dy), cache, need_dx=need_dx)

    problem = Problem(n=4, in_features=3, out_features=2, rank=2)
    claims.backward_knows_no_large_and_no_small(linear_case(), problem)
    with pytest.raises(claims.ClaimBroken):
        claims.backward_knows_no_large_and_no_small(linear_case(Cuts), problem)


class Odd(Linear):
    """Right, but for what a subclass makes of an output or of a dx."""

    def of_y(self, y, x):
        return y

    def of_dx(self, dx):
        return dx

    def forward(self, x):
        y, cache = super().forward(x)
        return self.of_y(y, x), cache

    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        return self.of_dx(dx), grads


class OtherWhenFrozen(Odd):
    def of_y(self, y, x):
        return 2 * y if self.frozen else y


class BlindToStrides(Odd):
    """Like a program in another language that takes an address and no strides: an array read backwards is turned."""

    def of_y(self, y, x):
        return y[::-1] if x.strides[0] < 0 else y


class FlatWithoutRows(Odd):
    def of_dx(self, dx):
        return dx if len(dx) else dx.reshape(-1)


class OneBiasForOneRow(Odd):
    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        return dx, {**grads, "bias": dy} if dy.ndim == 1 else grads


class FlatWithoutEntries(Odd):
    def of_y(self, y, x):
        return y if y.size else y.reshape(-1, y.shape[-1])


class AlwaysALittle(Odd):
    def of_dx(self, dx):
        return dx + 1e-12


class UnaskedDx(Odd):
    def backward(self, dy, cache, *, need_dx=True):
        return super().backward(dy, cache)


class KeepsTheWeight(Odd):
    def of_y(self, y, x):
        kept = vars(self).setdefault("kept", {"weight": self.weight.copy()})["weight"]
        return x @ kept.T + self.bias


class WideForHalf(Odd):
    def of_y(self, y, x):
        return y.astype(np.float64) if y.dtype == np.float16 else y


@pytest.mark.parametrize(
    ("claim", "cls", "said"),
    [
        (claims.leading_axes_are_rows, OneBiasForOneRow, "the gradient of bias is dy's own memory"),
        (claims.leading_axes_are_rows, FlatWithoutEntries, r"\(2, 0, in\) does not give \(2, 0, out\)"),
        (claims.backward_is_linear_in_the_cotangent, AlwaysALittle, "the gradient of x differs"),
        (claims.backward_without_dx_is_the_same, UnaskedDx, "dx is not None where nobody asked for it"),
        (claims.a_layer_remembers_nothing_but_its_cache, KeepsTheWeight, "the output for new numbers differs"),
        (claims.every_precision_is_exact_on_small_integers, WideForHalf, "y is float64 for float16"),
        (claims.a_frozen_layer_only_passes_dx, OtherWhenFrozen, "the frozen output differs"),
        (claims.memory_order_makes_no_difference, BlindToStrides, "the output is off"),
        (claims.no_rows_give_no_rows, FlatWithoutRows, r"no rows give a dx of shape \(0,\)"),
    ],
)
def test_a_claim_sees_the_layer_that_only_it_can_see(claim, cls, said):
    problem = Problem(n=4, in_features=3, out_features=2, rank=2)
    claim(linear_case(Odd), problem)
    with pytest.raises(claims.ClaimBroken, match=said):
        claim(linear_case(cls), problem)


def test_a_loss_whose_gradient_is_wider_is_seen():
    problem = Problem(n=4, in_features=3, out_features=2, rank=2)
    claims.mse_gradient_is_its_slope(mse, problem)
    with pytest.raises(claims.ClaimBroken, match="its gradient is float64 for float32"):
        claims.mse_gradient_is_its_slope(lambda p, t: (mse(p, t)[0], mse(p, t)[1].astype(np.float64)), problem)
