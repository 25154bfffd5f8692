"""Other people's implementations through the conformance suite, by the wrappers in examples/conformance."""

import importlib
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from minilora.conformance import check
from minilora.conformance.problems.kinds import KINDS
from minilora.conformance.report import read_known

pytestmark = pytest.mark.peers
FOLDER = Path(__file__).parents[2] / "examples" / "conformance"


def load(name, monkeypatch, *needed):
    for package in ("torch", *needed):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(FOLDER))
    sys.modules.pop(name, None)
    return importlib.import_module(name)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("name", "needed"), [("plain_torch", "torch"), ("peft_lora", "peft"), ("loralib_lora", "loralib")]
)
@pytest.mark.filterwarnings("ignore")
def test_a_right_implementation_passes(monkeypatch, name, needed, dtype):
    report = check(load(name, monkeypatch, needed), dtype=dtype)
    kinds, report.kinds = report.kinds, {}
    assert report.passed, str(report)
    assert report.claims["slope"] == "ok"
    wrong = {kind for kind, one in kinds.items() if not one.passed}
    assert wrong <= {"conv1d", "conv2d", "dora", "combine"}  # peft's, see below


@pytest.mark.filterwarnings("ignore")
def test_pefts_convolution_fails_with_dilation_alone(monkeypatch):
    report = check(load("peft_lora", monkeypatch, "peft"))
    for kind in ("conv1d", "conv2d"):
        (text,) = report.kinds[kind].diagnoses
        assert text.startswith("forward, where the largest of dilation is above 1, raises RuntimeError")
        assert report.kinds[kind].claims["merge"] == "ok"


@pytest.mark.filterwarnings("ignore")
def test_what_is_known_of_peft_is_all_that_fails(monkeypatch):
    report = check(load("peft_lora", monkeypatch, "peft"))
    report.known = read_known(FOLDER / "peft-xfails.txt")
    report.require(["forward", "slope", "merge", "start"])
    assert (report.verdict, report.status) == ("fails as is known", 0), str(report)


@pytest.mark.filterwarnings("ignore")
def test_pefts_sums_keep_rsloras_root(monkeypatch):
    """Wherever no adapter has rsLoRA's scaling, and there are two, they are right."""
    report = check(load("peft_lora", monkeypatch, "peft")).kinds["combine"]
    root, one = report.diagnoses
    assert root.startswith("the new adapter keeps the first one's use_rslora")
    assert one.startswith("svd of one adapter is that adapter as it is")
    problems = KINDS["combine"].problems
    right = {f"combine-{i}-{kind}" for i, p in enumerate(problems) if not p.stabilised[0] for kind in ("cat", "svd")}
    assert {case.id for case in report.cases if case.verdict == "ok"} >= right - {"combine-8-svd"}


@pytest.mark.filterwarnings("ignore")
def test_pefts_rslora_passes_as_a_kind(monkeypatch):
    report = check(load("peft_lora", monkeypatch, "peft"))
    assert report.kinds["rslora"].claims["slope"] == report.kinds["rslora"].claims["merge"] == "ok"


@pytest.mark.filterwarnings("ignore")
def test_the_four_bits_of_bitsandbytes_pass(monkeypatch):
    report = check(load("bitsandbytes_nf4", monkeypatch, "bitsandbytes"))
    assert report.passed, str(report)
    found = report.kinds["nf4"].claims
    assert {found[claim] for claim in ("forward", "slope")} == {"ok"}


@pytest.mark.filterwarnings("ignore")
def test_lora_pytorch_is_wrong_in_two_known_ways(monkeypatch):
    report = check(load("lora_pytorch_lora", monkeypatch, "lora_pytorch"))
    assert not report.passed
    first, second = report.diagnoses
    assert first.startswith("dx lacks dy W: the base passes no gradient")
    assert second.startswith("A's start has the spread of fan r = 9, not fan in = 400")
    assert report.claims["forward"] == "ok"


@pytest.mark.parametrize(("name", "needed"), [("loralib_lora", "loralib"), ("litgpt_lora", "litgpt")])
@pytest.mark.filterwarnings("ignore")
def test_fused_slots_of_others_pass(monkeypatch, name, needed):
    """loralib's MergedLinear, LitGPT's LoRAQKVLinear."""
    report = check(load(name, monkeypatch, needed)).kinds["fused"]
    assert report.passed, str(report)
    assert {report.claims[claim] for claim in ("forward", "slope", "merge")} == {"ok"}


@pytest.mark.filterwarnings("ignore")
def test_peft_passes_beside_bfloat16(monkeypatch):
    report = check(load("peft_lora", monkeypatch, "peft")).kinds["mixed"]
    assert report.passed, str(report)
    assert {report.claims[claim] for claim in ("forward", "slope", "merge", "output dtype")} == {"ok"}


@pytest.mark.filterwarnings("ignore")
def test_pefts_adapter_under_autocast_is_named(monkeypatch):
    """torch.autocast rounds the factors and each product to bfloat16, whatever precision they are kept in."""
    wrapper = load("peft_lora", monkeypatch, "peft")
    torch, plain = importlib.import_module("torch"), importlib.import_module("plain_torch")

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
