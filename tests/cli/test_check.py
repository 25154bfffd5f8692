"""``minilora check``."""

import re
from types import SimpleNamespace

import pytest

from minilora import LoRA, get_backend
from minilora.cli import check
from minilora.verify import instances
from minilora.verify.gradcheck import BlockReport


def changed_backward(monkeypatch, change):
    """Let a change of its gradients be in LoRA's backward."""
    right = LoRA.backward

    def wrong(self, *given, **options):
        dx, grads = right(self, *given, **options)
        return dx, {name: change(name, grad) for name, grad in grads.items()}

    monkeypatch.setattr(LoRA, "backward", wrong)


def test_check_fails_on_a_gradient_off_by_a_billionth(monkeypatch, shell, small_check):
    def off(name, grad):
        grad[..., 0] += 1e-9
        return grad

    changed_backward(monkeypatch, off)
    assert "WRONG" in shell("check", code=1)


def test_a_failing_check_ends_with_what_is_wrong(monkeypatch, shell, small_check):
    changed_backward(monkeypatch, lambda name, grad: grad * 0.75 if name == "lora_B" else grad)
    table, end = shell("check", code=1).split("\nWrong gradients:\n")
    wrong = [line for line in table.splitlines() if line.endswith("WRONG")]
    head, *repeated, _, summary = end.splitlines()
    assert head == table.splitlines()[0]
    assert [line for line in repeated if line.endswith("WRONG")] == wrong
    assert len(wrong) > 5
    assert all("lora_B" in line for line in wrong)
    plain = [i for i, line in enumerate(repeated) if line.startswith(("LoRA lora_B", "LoRALinear lora_B"))]
    assert len(plain) >= 2
    for slopes, factor in (repeated[i + 1 : i + 3] for i in plain):
        analytic, numeric = (float(number) for number in re.findall(r" is ([^,]+)", slopes))
        assert analytic == pytest.approx(0.75 * numeric, rel=1e-6)
        assert factor == "    every slope is off by the same factor, 0.75"
    rows = table.splitlines()[1:]
    assert summary.startswith(f"{len(rows) - len(wrong)} of {len(rows)} gradients agree")


TOLD = """\
gradient of  at         checked     error   allowed
fc dW  N=3   8 directions   2.0e+00   1.0e-09  WRONG
fc x   N=10     6 entries   0.0e+00   1.0e-12  ok

Wrong gradients:
gradient of  at         checked     error   allowed
fc dW  N=3   8 directions   2.0e+00   1.0e-09  WRONG
    along one direction it is 3, and the measured slope is 1

1 of 2 gradients agree with the measured slope (complex step, float64, DEVICE)
"""


def test_a_wrong_slope_along_a_direction_is_told_whole(monkeypatch, shell):
    wrong = BlockReport("dW", (2, 3), "8 directions", 2.0, 1e-9, None, 3.0, 1.0, passed=False)
    right = BlockReport("x", (1, 6), "6 entries", 0.0, 1e-12, (0, 1), 1.0, 1.0)
    proof = [(f"fc  N={rows}", SimpleNamespace(blocks=[block])) for rows, block in ((3, wrong), (10, right))]
    monkeypatch.setattr(instances, "prove", lambda *given: proof)
    assert shell("check", code=1) == TOLD.replace("DEVICE", get_backend("numpy").device)


def test_check_prints_what_it_measured_and_where(small_check, standin, shell, monkeypatch):
    proof, asked = list(instances.prove(instances=check.all_instances())), []
    monkeypatch.setattr(instances, "prove", lambda *given: asked.append(given) or proof)
    out = shell("check")
    assert shell.err == ""  # nor does it warn of its own layers
    for name in ("Linear x", "LoRA lora_A", "LoRALinear lora_B", "MLP fc1.weight", "mse", "cross_entropy"):
        assert name in out
    assert "residual_form of LoRA " in out
    assert "residual_form of LoRALinear" in out
    assert out.split("\n")[0].split() == ["gradient", "of", "at", "checked", "error", "allowed"]
    rows = [line for line in out.splitlines() if line.endswith("ok")]
    assert f"{len(rows)} of {len(rows)} gradients agree" in out
    assert "WRONG" not in out
    blocks = [(f"{title.split('  ')[0]} {block.name}", block) for title, report in proof for block in report.blocks]
    assert len({block.allowed for _, block in blocks}) > 1
    assert len({*map(len, rows)}) == 1
    for row, (name, block) in zip(rows, blocks, strict=True):
        assert row.startswith(f"{name}  ")  # the columns do not touch
        assert row[max(len(name) for name, _ in blocks) + 2 :].startswith("N=")
        assert row.endswith(f"{block.checked}{block.error:10.1e}{block.allowed:10.1e}  ok")
    assert shell("check --backend cupy --seed 3").endswith(f"(complex step, float64, {standin.device})\n")
    assert standin.device != "CPU"
    assert [(backend.name, seed) for backend, seed, _ in asked] == [("numpy", 0), ("cupy", 3)]


def test_the_decoder_is_checked_with_the_layers():
    assert check.all_instances().keys() == instances.INSTANCES.keys() | {"Llama, LoRA"}
