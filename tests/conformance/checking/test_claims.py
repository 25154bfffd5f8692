"""A layer that keeps its state gives the same output, merged or not: as often as it is merged, and taken back."""

from types import SimpleNamespace

import numpy as np
import pytest

from minilora.conformance import check

from ..implementations import OURS, from_formulas, implementation

pytestmark = pytest.mark.long

LINEAR = vars(OURS["linear"])


class Merging:
    """A right one: a second merge, or a second unmerge, changes nothing."""

    merged = False

    def __init__(self, weight, bias, A, B, alpha):
        self.weight, self.bias, self.A, self.B, self.s = weight, bias, A, B, alpha / len(A)

    def change(self):
        return self.s * (self.B @ self.A)

    def forward(self, x):
        y = x @ self.weight.T + (0 if self.bias is None else self.bias)
        return y if self.merged else y + self.s * (x @ self.A.T @ self.B.T)

    def merge(self):
        if not self.merged:
            self.weight += self.change()  # in place, in the array that it was handed
        self.merged = True

    def unmerge(self):
        if self.merged:
            self.weight -= self.change()
        self.merged = False


class Refusing(Merging):
    def merge(self):
        if self.merged:
            raise ValueError("it is merged already")
        super().merge()

    def unmerge(self):
        if not self.merged:
            raise ValueError("it is not merged")
        super().unmerge()


class NeverBack(Merging):
    unmerge = None

    def __getattribute__(self, name):
        if name == "unmerge":
            raise AttributeError(name)
        return super().__getattribute__(name)


class Kept(Merging):
    """It keeps the weight, and puts it back."""

    def merge(self):
        if not self.merged:
            self.before = self.weight.copy()
        super().merge()

    def unmerge(self):
        self.weight, self.merged = self.before, False


@pytest.mark.parametrize("cls", [Merging, Refusing, NeverBack, Kept])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_right_layer_passes(cls, dtype):
    report = check(implementation(merging=cls), dtype=dtype)
    assert report.passed, str(report)
    assert report.claims["merged and back"] == "ok"
    assert sum(report.functions.values()) == 5


class MergesTwice(Merging):
    def merge(self):
        self.weight = self.weight + self.change()
        self.merged = True


class AddsAgain(Merging):
    def forward(self, x):
        return Merging.forward(self, x) + (self.s * (x @ self.A.T @ self.B.T) if self.merged else 0)


class UnmergesNothing(Merging):
    def unmerge(self):
        self.merged = False


class UnmergesTwice(Merging):
    def unmerge(self):
        self.weight = self.weight - self.change()
        self.merged = False


class ForgetsTheScaling(Merging):
    def unmerge(self):
        self.weight = self.weight - self.B @ self.A
        self.merged = False


class StaysMerged(Merging):
    def unmerge(self):
        self.weight = self.weight - self.change()


class MergesOnce(Merging):
    """After one round, it takes itself for merged for ever."""

    rounds = 0

    def merge(self):
        self.rounds += 1
        if self.rounds <= 2:
            super().merge()
        else:
            self.merged = True


class OtherLayer(Merging):
    def __init__(self, *arrays):
        super().__init__(*arrays)
        self.A = self.A + 0.5


WRONG = {
    MergesTwice: "after a second merge the output has the update 2 times",
    AddsAgain: "after merge the output has the update 2 times",
    UnmergesNothing: "after unmerge the output has the update 2 times",
    UnmergesTwice: "after a second unmerge the output has the update 0 times",
    ForgetsTheScaling: "after unmerge the output has the update 1.33333 times",
    StaysMerged: "after unmerge the output has the update 0 times",
    MergesOnce: "after unmerge and merge the output has the update 0 times",
    OtherLayer: "the output is off by ",
}


@pytest.mark.parametrize("cls", WRONG)
def test_a_wrong_layer_is_told_step_and_times(cls):
    report = check(implementation(merging=cls))
    (text,) = report.diagnoses
    assert text.startswith(WRONG[cls])
    assert report.claims["merged and back"] == text
    assert [case.id for case in report.cases if case.failed] == ["linear-merged-and-back"]


def test_a_layer_that_raises_is_named():
    class Raises(Merging):
        def merge(self):
            raise RuntimeError("boom")

    (text,) = check(implementation(merging=Raises)).diagnoses
    assert text.startswith("merging raises RuntimeError: boom, in test_claims.py, line ")


def test_a_layer_without_a_merge_is_named():
    (text,) = check(implementation(merging=lambda *arrays: SimpleNamespace(forward=1))).diagnoses
    assert text == "merging returns a SimpleNamespace without forward and merge"


def test_the_layer_of_a_wrong_forward_is_not_judged():
    report = check(SimpleNamespace(forward=from_formulas("linear", {"update": 2.0}).forward, merging=MergesTwice))
    assert report.claims["merged and back"] == "not offered"
    assert len(report.diagnoses) == 1


@pytest.mark.parametrize("kind", ["rslora", "dora", "conv2d", "embedding"])
def test_every_kind_may_have_a_layer(kind):
    functions = OURS[kind]

    class Layer:
        def __init__(self, *arrays, **steps):
            self.arrays, self.steps = arrays, steps

        def forward(self, x):
            return functions.forward(x, *self.arrays, **self.steps)

        def merge(self):
            self.arrays[2][...] *= np.sqrt(2)  # a change that shows

    def merging(*arrays, stride=1, padding=0, dilation=1):
        steps = {"stride": stride, "padding": padding, "dilation": dilation} if kind == "conv2d" else {}
        return Layer(*arrays, **steps)

    kinds = {kind: SimpleNamespace(**vars(functions), merging=merging)}
    report = check(SimpleNamespace(forward=LINEAR["forward"], kinds=kinds)).kinds[kind]
    assert report.claims["merged and back"].startswith("after merge the output ")
