"""What the problems have in common on which an answer is wrong."""

from types import SimpleNamespace

import pytest

from minilora.conformance import check

from ..implementations import OURS, from_formulas, with_kinds

LINEAR = vars(OURS["linear"])


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (lambda p: len(p["x"]) > 128, "for more than 128 rows"),
        *(
            pytest.param(*more, marks=pytest.mark.long)
            for more in (
                (lambda p: len(p["weight"]) > 128, "for more than 128 outputs"),
                (lambda p: len(p["lora_A"]) > 32, "at ranks above 32"),
                (lambda p: len(p["lora_A"]) % 32 == 0, "at a rank that is a multiple of 32"),
            )
        ),
    ],
)
def test_what_is_wrong_beyond_a_tile_alone_is_told(wrong, where):
    def forward(x, weight, bias, A, B, alpha):
        y = LINEAR["forward"](x, weight, bias, A, B, alpha)
        return 1.01 * y if wrong({"x": x, "weight": weight, "lora_A": A}) else y

    (text,) = check(SimpleNamespace(forward=forward)).diagnoses
    assert text.startswith(f"the output, {where}, is off by ")


WRONG_WHERE = {
    "with the sizes of an earlier problem (is something kept between calls?)": lambda W, b, A, B, alpha: alpha == 4.5,
    "with lora_A's shape of an earlier problem (is something kept between calls?)": lambda W, b, A, B, alpha: (
        alpha == 4.5 or len(B) == 133),
    "where in = out": lambda W, b, A, B, alpha: W.shape[0] == W.shape[1],
    "where in and out differ": lambda W, b, A, B, alpha: W.shape[0] != W.shape[1],
    "where in is below out": lambda W, b, A, B, alpha: W.shape[1] < W.shape[0],
    "where in is above out": lambda W, b, A, B, alpha: W.shape[1] > W.shape[0],
    "where the rank is above a width": lambda W, b, A, B, alpha: len(A) > A.shape[1] or len(A) > len(B),
    "in wide layers": lambda W, b, A, B, alpha: W.shape[1] > 100,
    "in layers that are not wide": lambda W, b, A, B, alpha: W.shape[1] <= 100,
    "wherever there is a bias": lambda W, b, A, B, alpha: b is not None,
    "wherever there is no bias": lambda W, b, A, B, alpha: b is None,
    "at rank 1": lambda W, b, A, B, alpha: len(A) == 1,
    "where alpha is below the rank": lambda W, b, A, B, alpha: alpha / len(A) < 1,
    "where alpha is above the rank": lambda W, b, A, B, alpha: alpha / len(A) > 1,
    "where alpha / r is no whole number": lambda W, b, A, B, alpha: alpha / len(A) != round(alpha / len(A)),
    "where lora_B is zero": lambda W, b, A, B, alpha: not B.any(),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("words", WRONG_WHERE)
def test_what_the_wrong_problems_have_in_common_is_told(words):
    def forward(x, *layer):
        return LINEAR["forward"](x, *layer) + WRONG_WHERE[words](*layer)

    (text,) = check(SimpleNamespace(forward=forward)).diagnoses
    assert text.startswith(f"the output, {words}, is off by 1 at ")


@pytest.mark.parametrize(("words", "few"), [("at a single row", True), ("for more than one row", False)])
def test_how_many_rows_are_wrong_is_told(words, few):
    def forward(x, *layer):
        return LINEAR["forward"](x, *layer) + ((len(x) == 1) == few)

    (text,) = check(SimpleNamespace(forward=forward)).diagnoses
    assert text.startswith(f"the output, {words}, is off by 1 at ")


WRONG_STEPS = {
    "where the kernel has more than one entry": lambda kernel, stride, padding, dilation, groups: kernel != (1, 1),
    "at a stride above 1": lambda kernel, stride, padding, dilation, groups: stride != (1, 1),
    "with padding": lambda kernel, stride, padding, dilation, groups: padding != (0, 0),
    "with dilation": lambda kernel, stride, padding, dilation, groups: dilation != (1, 1),
    "with groups": lambda kernel, stride, padding, dilation, groups: groups != 1,
}


@pytest.mark.long
@pytest.mark.parametrize("words", WRONG_STEPS)
def test_what_the_wrong_convolutions_have_in_common_is_told(words):
    right = from_formulas("conv2d")

    def forward(x, weight, *layer, stride, padding, dilation, groups):
        steps = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return right.forward(x, weight, *layer, **steps) + WRONG_STEPS[words](weight.shape[2:], **steps)

    (text,) = check(with_kinds(conv2d=SimpleNamespace(forward=forward))).kinds["conv2d"].diagnoses
    assert text.startswith(f"the output, {words}, is off by 1 at ")
