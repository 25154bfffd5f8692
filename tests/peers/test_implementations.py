"""Other people's implementations through the conformance suite, by the wrappers in examples/conformance."""

import copy
import importlib
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from minilora.conformance import check
from minilora.conformance.problems.kinds import KINDS
from minilora.report import read_known

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
FOLDER = Path(__file__).parents[2] / "examples" / "conformance"


def load(name, needed="torch"):
    for package in ("torch", needed):
        pytest.importorskip(package)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        sys.modules.pop(name, None)
        return importlib.import_module(name)


def ok(report, *claims):
    """Whether a report has passed, with claims that were compared."""
    assert report.passed, str(report)
    assert {report.claims[claim] for claim in claims} == {"ok"}


@pytest.fixture(scope="module")
def of_peft():
    return check(load("peft_lora", "peft"))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("name", "needed"), [("plain_torch", "torch"), ("peft_lora", "peft"), ("loralib_lora", "loralib")]
)
def test_a_right_implementation_passes(name, needed, dtype):
    report = check(load(name, needed), dtype=dtype)
    kinds, report.kinds = report.kinds, {}
    ok(report, "slope")
    wrong = {kind for kind, one in kinds.items() if not one.passed}
    assert wrong <= {"conv1d", "conv2d", "dora", "combine"}  # peft's, see below


def test_peft_passes_with_rslora_and_beside_bfloat16(of_peft):
    ok(of_peft.kinds["rslora"], "slope", "merge")
    ok(of_peft.kinds["mixed"], "forward", "slope", "merge", "output dtype")


@pytest.mark.parametrize("kind", ["conv1d", "conv2d"])
def test_pefts_convolution_fails_with_dilation_alone(of_peft, kind):
    (text,) = of_peft.kinds[kind].diagnoses
    assert text.startswith("forward, where the largest of dilation is above 1, raises RuntimeError")
    assert of_peft.kinds[kind].claims["merge"] == "ok"


def test_pefts_sums_keep_rsloras_root(of_peft):
    """Wherever no adapter has rsLoRA's scaling, and there are two, they are right."""
    report = of_peft.kinds["combine"]
    root, one = report.diagnoses
    assert root.startswith("the new adapter keeps the first adapter's use_rslora")
    assert one.startswith("svd returns a single adapter unchanged")
    problems = KINDS["combine"].problems
    right = {f"combine-{i}-{kind}" for i, p in enumerate(problems) if not p.stabilised[0] for kind in ("cat", "svd")}
    assert {case.id for case in report.cases if case.verdict == "ok"} >= right - {"combine-8-svd"}


def test_what_is_known_of_peft_is_all_that_fails(of_peft):
    report = copy.copy(of_peft)
    report.known = read_known(FOLDER / "peft-xfails.txt")
    report.require(["forward", "slope", "merge", "start"])
    assert (report.verdict, report.status) == ("fails as is known", 0), str(report)


def test_pefts_adapter_under_autocast_is_named():
    """torch.autocast rounds the factors and each product to bfloat16, whatever precision they are kept in."""
    wrapper = load("peft_lora", "peft")
    torch, plain = importlib.import_module("torch"), load("plain_torch")

    def under_autocast(*arrays):
        layer, *parts = wrapper.on_bfloat16(*arrays)

        def forward(x):
            with torch.autocast("cpu", torch.bfloat16):
                return layer(x)

        return forward, *parts

    both = {name: partial(getattr(plain, name), module=under_autocast) for name in ("forward", "backward")}
    report = check(SimpleNamespace(forward=plain.forward, kinds={"mixed": SimpleNamespace(**both)})).kinds["mixed"]
    (text,) = report.diagnoses
    assert text.startswith("the adapter computes in bfloat16, as under autocast")


def test_the_four_bits_of_bitsandbytes_pass():
    report = check(load("bitsandbytes_nf4", "bitsandbytes"))
    assert report.passed, str(report)
    ok(report.kinds["nf4"], "forward", "slope")


def test_lora_pytorch_is_wrong_in_two_known_ways():
    report = check(load("lora_pytorch_lora", "lora_pytorch"))
    assert not report.passed
    first, second = report.diagnoses
    assert first.startswith("dx lacks dy W: the base passes no gradient")
    assert second.startswith("A's initial spread is that of fan r = 9, not fan in = 400")
    assert report.claims["forward"] == "ok"


@pytest.mark.parametrize(("name", "needed"), [("loralib_lora", "loralib"), ("litgpt_lora", "litgpt")])
def test_fused_slots_of_others_pass(name, needed):
    """loralib's MergedLinear, LitGPT's LoRAQKVLinear."""
    ok(check(load(name, needed)).kinds["fused"], "forward", "slope", "merge")
