"""The kind nf4: a layer whose weight is codes and scales, with pack and unpack beside its forward and backward."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from minilora import NF4, quantize_nf4
from minilora.conformance import check
from minilora.conformance.checking.contract import ids
from minilora.conformance.checking.packing import weights
from minilora.conformance.problems.bugs import bugs_of
from minilora.conformance.problems.kinds import FOUR_BITS

from ..implementations import OURS, nf4_functions, unpack, with_kinds


def report_of(**functions):
    return check(with_kinds(nf4=SimpleNamespace(**vars(OURS["nf4"]) | functions))).kinds["nf4"]


def test_problems_have_codes_that_stand_for_their_weight():
    for problem in FOUR_BITS:
        full, options = problem.full, problem.options
        shape = (problem.out_features, problem.in_features)
        found = unpack(full["packed"], full["absmax"], shape, **options)
        np.testing.assert_array_equal(found, problem.weight().astype("float32"))
        assert bool(options) == problem.double
        assert problem.restrict(frozenset()).options == {}
    assert {problem.double for problem in FOUR_BITS} == {problem.bias for problem in FOUR_BITS} == {True, False}
    assert any(problem.in_features * problem.out_features % 2 for problem in FOUR_BITS)
    assert max(problem.blocks for problem in FOUR_BITS) > 256


@pytest.mark.long
def test_an_own_way_to_the_nearest_code_passes():
    """By a quotient in float64, in place of a product with the rounded inverse."""

    def pack(weight):
        flat = np.pad(weight.ravel().astype(float), (0, -weight.size % 64)).reshape(-1, 64)
        absmax = np.abs(flat).max(axis=1)
        codes = np.abs(flat[..., None] / np.where(absmax == 0, 1, absmax)[:, None, None] - NF4).argmin(axis=-1).ravel()
        packed = (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[: (weight.size + 1) // 2]
        return packed[:, None], absmax.astype(np.float32)  # bitsandbytes has a column of bytes

    assert report_of(pack=pack).passed


def test_a_layer_without_nested_scales_is_asked_for_none():
    functions = OURS["nf4"]
    without = SimpleNamespace(
        forward=lambda x, packed, absmax, bias, A, B, alpha: functions.forward(x, packed, absmax, bias, A, B, alpha),
        unpack=lambda packed, absmax, shape: unpack(packed, absmax, shape),
    )
    report = check(with_kinds(nf4=without)).kinds["nf4"]
    assert report.passed
    assert report.claims["decoded"] == "ok"
    assert report.claims["codes"] == "not offered"


def naming_nested_absmax(x, packed, absmax, bias, A, B, alpha, nested_absmax=None):
    assert nested_absmax is None
    return OURS["nf4"].forward(x, packed, absmax, bias, A, B, alpha)


def naming_mean(x, packed, absmax, bias, A, B, alpha, mean=None):
    assert mean is None
    return OURS["nf4"].forward(x, packed, absmax, bias, A, B, alpha)


@pytest.mark.parametrize("forward", [naming_nested_absmax, naming_mean])
def test_a_layer_that_names_one_of_the_two_options_is_handed_neither(forward):
    assert check(with_kinds(nf4=SimpleNamespace(forward=forward))).kinds["nf4"].passed


@pytest.mark.long
@pytest.mark.parametrize(
    "bug", [bug for bug in bugs_of("nf4") if bug.flag.startswith("nf4-")], ids=lambda bug: bug.flag
)
def test_a_bug_of_unpack_alone_is_named(bug):
    """By the same row as in a forward."""

    def wrong(packed, absmax, shape, nested_absmax=None, mean=0.0):
        problem = next(p for p in FOUR_BITS if np.array_equal(p.full["packed"], packed))
        parts = bug.of(problem)
        return (parts["weight"](None) if parts else problem.weight()).astype("float32")

    report = report_of(unpack=wrong)
    assert not report.passed
    assert report.claims["decoded"] == str(bug)
    assert report.claims["forward"] == "ok"
    assert str(bug) in report.diagnoses


@pytest.mark.long
@pytest.mark.parametrize(
    ("pack", "verdict"),
    [
        (lambda w: quantize_nf4(w)[0], "pack returns a ndarray, expected packed and absmax"),
        (
            lambda w: quantize_nf4(w, block_size=128),
            r"pack returns uint8 \(98,\) and \(2,\), expected uint8 \(98,\) and",
        ),
        (lambda w: (quantize_nf4(w)[0].astype(int), quantize_nf4(w)[1]), r"pack returns int64 \(98,\)"),
        (lambda w: (quantize_nf4(w)[0], 2 * quantize_nf4(w)[1]), "the scale of block 0 is .*, expected "),
        (lambda w: (quantize_nf4(w)[0] ^ 16, quantize_nf4(w)[1]), "weight 0, .* of its block's largest, has the code"),
        (lambda w: 1 / 0, "pack raises ZeroDivisionError"),
    ],
)
def test_what_pack_gets_wrong_is_said(pack, verdict):
    report = report_of(pack=pack)
    assert not report.passed
    assert re.match(verdict, report.claims["codes"]), report.claims["codes"]
    assert report.claims["decoded"] == "ok"


def test_a_weight_that_is_off_is_shown():
    def wrong(packed, absmax, shape, nested_absmax=None, mean=0.0):
        found = unpack(packed, absmax, shape, nested_absmax, mean)
        found[1, 2] += 1
        return found

    verdict = report_of(unpack=wrong).claims["decoded"]
    assert verdict.startswith("the weight at [1, 2] is ")
    assert str(FOUR_BITS[0]) in verdict


def test_its_ids_end_with_the_two_functions():
    found = ids(SimpleNamespace(kinds={"nf4": None}))
    assert found[-2:] == ["nf4-codes", "nf4-decoded"]
    assert "nf4-4-merge" in found


def test_weights_to_quantise_have_zeros_and_an_odd_count():
    first, second = weights()
    assert (first.ravel()[64:128] == 0).all()
    assert first.size % 2 == 1
    assert second.size % 64 == 0


@pytest.mark.long
def test_a_bug_of_lora_is_named_over_four_bits():
    def forward(x, packed, absmax, bias, A, B, alpha, nested_absmax=None, mean=0.0):
        return nf4_functions().forward(
            x, packed, absmax, bias, A, B, alpha * len(A), nested_absmax=nested_absmax, mean=mean
        )

    report = report_of(forward=forward)
    assert any("alpha is not divided by the rank" in text for text in report.diagnoses)
