"""What is-a-gradient-right.md asserts and shows; the names are the page's own."""

import inspect
import re

import pictures
from pages import picture, says, shown

from minilora import Adam

# %% Check your own

says("You give three things: a function of a dict of arrays, the values, and your gradients")
assert report.passed and not np.allclose(wrong(p, dy)["W"], backward(p, dy)["W"])

# %% How a slope is measured

FLOOR = 1e-17  # where an error of exactly zero is drawn
of_complex = max(of_tanh[1], of_lora[1])
lines = {
    "tanh layer, central": (steps, np.maximum(of_tanh[0], FLOOR), pictures.BASE_COLOR),
    "LoRA's loss in A, central": (steps, np.maximum(of_lora[0], FLOOR), pictures.LORA_COLOR),
    "complex step, h = 1e-20": (steps, np.full(len(steps), max(of_complex, FLOOR)), pictures.THIRD),
}
axes = {"xscale": "log", "yscale": "log", "xlabel": "step h", "ylabel": "relative error", "ylim": (1e-17, 10)}
alt = "The error of a slope against the step, both logarithmic. For the tanh layer it is a V with its lowest point near a step of "
alt += "1e-5. For LoRA's loss in A there is only the left arm: the error falls all the way to step 1. The complex step is a level "
alt += "line at the bottom."
caption = "Central differences: a V for the tanh layer, and only its left arm for LoRA's loss in A."
picture("slopes", pictures.show(pictures.lines(lines, **axes), alt, caption))
assert max(of_complex, of_lora[0][-1]) < 1e-13 < min(of_tanh[0]) and of_tanh[0][-1] > 1e-3
assert 1e-6 < steps[np.argmin(of_tanh[0])] < 1e-3

# %% Why step 1.0 is exact here

assert abs(central(["lora_A", "lora_B"]) / sum((lora_grads[name] * d[name]).sum() for name in d) - 1) > 0.1
of_one = [lora_loss({**factors, "lora_A": A + t * d["lora_A"]}) for t in range(4)]
assert abs(np.diff(of_one, 3)) < 1e-9 < abs(np.diff(of_one, 2)).min()  # a quadratic has no third derivative
says("it leaves out the third derivative and all higher ones", "A quadratic has no third derivative.")
says(f"Why step {inspect.signature(central).parameters['h'].default} is exact here")

# %% How fast the remainder vanishes

assert np.allclose(right[-4:-1] / right[-3:], 4, rtol=0.01) and np.isclose(off[-2] / off[-1], 2, rtol=0.1)
lines = {
    "no gradient": (halved, remainders({name: 0 * g for name, g in lora_grads.items()}), pictures.INK),
    "gradient off by 1 %": (halved, off, pictures.BASE_COLOR),
    "right gradient": (halved, right, pictures.LORA_COLOR),
}
axes = {"xscale": "log", "yscale": "log", "xlabel": "step h", "ylabel": "what remains"}
alt = "What remains of the loss's change against the step, both logarithmic. Without a gradient: a line of slope 1. With the right "
alt += "gradient: a line of slope 2. With a gradient off by one percent the line begins with slope 2 and bends into slope 1 for "
alt += "small steps."
caption = "Slope 2 is right. A small mistake shows when the steps are small."
picture("remainders", pictures.show(pictures.lines(lines, points=True, **axes), alt, caption))

# %% What each check misses

BUGS = re.findall(r'case "(.*?)"', inspect.getsource(lora_backward))
x, dy = rng.standard_normal((6, 5)), rng.standard_normal((6, 4))
A, B = rng.standard_normal((RANK, 5)), rng.standard_normal((4, RANK))
STEPS = 200
says(f"does Adam halve the loss in {STEPS} steps?")


def shapes_are_wrong(bug):
    grads = lora_backward(x, A, B, dy, bug)
    return any(grads[name].shape != array.shape for name, array in {"x": x, "lora_A": A, "lora_B": B}.items())


def identity_fails(bug):
    grads = lora_backward(x, A, B, dy, bug)
    return not np.allclose(grads["lora_A"] @ A.T, B.T @ grads["lora_B"])


def loss_does_not_fall(bug):
    X = np.random.default_rng(5).standard_normal((100, 5))
    target = X @ np.random.default_rng(6).standard_normal((5, 4))
    start = np.random.default_rng(7)
    layer = LoRA.init(5, 4, rank=RANK, alpha=ALPHA, rng=start, dtype="float64")
    adam, first = Adam(layer.trainable(), lr=0.01), mse(layer(X), target)[0]
    for _ in range(STEPS):
        error = mse(layer(X), target)[1]
        grads = lora_backward(X, layer.lora_A, layer.lora_B, error, bug)
        adam.step({name: grads[name] for name in layer.trainable()})
    return mse(layer(X), target)[0] > first / 2


def output(q):
    return LoRA(q["lora_A"], q["lora_B"], ALPHA)(q["x"])


def gradcheck_fails(bug, B=B, dy=dy, allow_zero=()):
    params = {"x": x, "lora_A": A, "lora_B": B}
    try:
        gradcheck(output, params, lora_backward(x, A, B, dy, bug), cotangent=dy, allow_zero=allow_zero)
    except GradientError:
        return True
    return False


CHECKS = {
    "shapes": shapes_are_wrong,
    "identity": identity_fails,
    "training": loss_does_not_fall,
    "B = 0": lambda bug: gradcheck_fails(bug, B=np.zeros_like(B), allow_zero=("x", "lora_A")),
    "ones": lambda bug: gradcheck_fails(bug, dy=np.ones_like(dy)),
    "random": gradcheck_fails,
}
caught = {bug: {name: check(bug) for name, check in CHECKS.items()} for bug in BUGS}
assert not any(check("") for check in CHECKS.values())  # the right backward passes every check
assert len(BUGS) == 10 and all(row["random"] for row in caught.values())
sums = {name: sum(row[name] for row in caught.values()) for name in CHECKS}
assert sums.pop("shapes") == 0 and sums["training"] == 3 and len(CHECKS) == 6
missed = [bug for bug in BUGS if not caught[bug]["training"]]
assert len(missed) == 7 and [bug for bug in missed if bug != "dx forgotten"] == BUGS[:6]  # these are off by a factor
says("Here are ten bugs, planted", "And six checks:", "In all ten it has", "How many of the ten does *training* catch?")
says(
    "- all ten\n- seven\n- three\n",
    "**three**. Adam's steps",
    "- *all ten*: With",
    "- *seven*: The other way round: it misses seven.",
)
says(
    "It misses seven of ten: six are wrong by a factor, and one layer alone",
    "or a mean taken twice, Adam's steps are the same",
)
rows = [(bug, *("✓" if row[name] else "–" for name in sums)) for bug, row in caught.items()]
shown("caught", pictures.table(["planted bug", *sums], [*rows, ("caught of ten", *sums.values())]))
for dtype in ("float64", "float32"):
    digit, _, power = f"{np.finfo(dtype).eps ** (2 / 3):.0e}".partition("e")
    says(f"${digit} \\cdot 10^{{{int(power)}}}$ in {dtype}")
assert [bug for bug in BUGS if not caught[bug]["ones"]] == ["outputs mixed up in dB", "dB from a stale x"]
