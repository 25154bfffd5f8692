"""``minilora check``."""

import re

import pytest

from minilora import Linear, LoRA
from minilora.cli import check
from minilora.verify import instances

from ..support.command_line import run


@pytest.mark.parametrize("cls", [LoRA, pytest.param(Linear, marks=pytest.mark.long)])
def test_check_fails_on_a_gradient_off_by_a_billionth(monkeypatch, capsys, small_check, cls):
    right = cls.backward

    def wrong(self, *a, **k):
        dx, grads = right(self, *a, **k)
        for grad in grads.values():
            grad[..., 0] += 1e-9
        return dx, grads

    monkeypatch.setattr(cls, "backward", wrong)
    assert run("check") == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_failing_check_ends_with_what_is_wrong(monkeypatch, capsys, small_check):
    right = LoRA.backward

    def unscaled(self, *a, **k):
        dx, grads = right(self, *a, **k)
        return dx, grads | {"lora_B": grads["lora_B"] * 0.75}

    monkeypatch.setattr(LoRA, "backward", unscaled)
    assert run("check") == 1
    table, end = capsys.readouterr().out.split("\nThe wrong ones again:\n")
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


@pytest.mark.long
def test_the_columns_of_check_do_not_touch(small_check, capsys):
    assert run("check") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith("ok")]
    names = [
        f"{title.split('  ')[0]} {block.name}"
        for title, found in instances.prove(instances=check.all_instances())
        for block in found.blocks
    ]
    ends = {len(row) for row in rows}
    assert len(ends) == 1
    for row, name in zip(rows, names, strict=True):
        assert row.startswith(f"{name}  ")
        assert row[max(map(len, names)) + 2 :].startswith("N=")


def test_check_prints_what_it_measured(small_check, capsys, monkeypatch):
    proof = list(instances.prove(instances=check.all_instances()))
    monkeypatch.setattr(instances, "prove", lambda *arguments: proof)
    assert run("check") == 0
    out, err = capsys.readouterr()
    assert err == ""  # nor does it warn of its own layers
    for name in ("Linear x", "LoRA lora_A", "LoRALinear lora_B", "MLP fc1.weight", "mse", "cross_entropy"):
        assert name in out
    assert "residual_form of LoRA " in out
    assert "residual_form of LoRALinear" in out
    rows = [line for line in out.splitlines() if line.endswith("ok")]
    assert f"{len(rows)} of {len(rows)} gradients agree" in out
    assert "WRONG" not in out
    blocks = [block for _, report in proof for block in report.blocks]
    assert len({block.allowed for block in blocks}) > 1
    for row, block in zip(rows, blocks, strict=True):
        assert row.endswith(f"{block.checked}{block.error:10.1e}{block.allowed:10.1e}  ok")


@pytest.mark.long
def test_check_says_where_it_computed(small_check, standin, capsys):
    assert run("check", "--backend", "cupy") == 0
    assert capsys.readouterr().out.endswith(f"(complex step, float64, {standin.device})\n")
    assert standin.device != "CPU"


@pytest.mark.long
def test_check_takes_a_seed(small_check, capsys):
    outputs = []
    for seed in ("0", "1"):
        assert run("check", "--seed", seed) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] != outputs[1]
