"""``minilora audit``."""

import json

import numpy as np
import pytest

from tests.audit.adapters import config, factors, model, paths, peft
from tests.support.command_line import run

QV = ("q_proj", "v_proj")


@pytest.fixture
def folders(tmp_path):
    adapter = peft(tmp_path / "adapter", factors(paths(*QV)), config(*QV, use_rslora=True))
    return adapter, model(tmp_path / "model")


def test_the_first_line_says_what_and_where(folders, capsys):
    adapter, base = folders
    assert run("audit", str(adapter), "--model", str(base)) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == (
        "adapter: SOUND: a PEFT folder of 6 modules, rank 2, scaling 2.828, 192 numbers in F32, 6 of 6 found in model; "
        "1 note"
    )
    assert any(line.startswith("modules: q_proj 3 of 3, v_proj 3 of 3, ") for line in rest)
    assert rest[-1] == "not offered: what merging loses (--merge)"


def test_a_wrong_adapter_ends_with_1_and_its_fault_stands_first(folders, tmp_path, capsys):
    _, base = folders
    adapter = peft(tmp_path / "a", factors(paths(*QV)), config("q_proj"))
    assert run("audit", str(adapter), "--model", str(base), "--json", str(tmp_path / "report.json")) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("a: WRONG: target_modules (['q_proj']) does not name 'model.layers.0.self_attn.v_proj', ")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["verdict"], report["status"], report["first_line"]) == ("wrong", 1, first)
    assert [finding["code"] for finding in report["findings"]] == ["not-a-target"]
    assert [module["weight"] for module in report["modules"]] == paths(*QV)
    assert {kind["kind"]: (kind["adapted"], kind["total"]) for kind in report["kinds"]}["k_proj"] == (0, 3)


def test_merging_is_told_by_module_and_in_all(folders, tmp_path, capsys):
    adapter, base = folders
    assert run("audit", str(adapter), "--model", str(base), "--merge", "--json", str(tmp_path / "r.json")) == 0
    out = capsys.readouterr().out
    assert "merging: of the change, the part that is kept along its direction, and the noise beside it" in out
    merged = [module["merged"] for module in json.loads((tmp_path / "r.json").read_text())["modules"]]
    assert all(0.9 < loss["bfloat16"]["kept"] < 1.1 and loss["relative"] > 0 for loss in merged)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: t / "nothing", "No such file or directory"),
        (lambda t: (t / "a.bin", (t / "a.bin").write_bytes(b"x"))[0], "a pickle, which can run code"),
        (lambda t: (t / "a.safetensors", (t / "a.safetensors").write_bytes(b"x" * 20))[0], "header too large"),
        (lambda t: (t / "e", (t / "e").mkdir())[0], "expected adapter_model.safetensors, adapters.safetensors, or one"),
        (lambda t: peft(t / "i", factors(paths("q_proj")), config("q_proj", peft_type="IA3")), "peft_type is 'IA3'"),
        (lambda t: peft(t / "h", {"lora_unet_x.hada_w1_a": factors(paths("q_proj")).popitem()[1]}, None), "of LoHa"),
        (lambda t: peft(t / "l", {"lora_unet_x.lokr_w1": factors(paths("q_proj")).popitem()[1]}, None), "of LoKr"),
        (lambda t: peft(t / "n", {f"{'x' * 2000}.lora_A.weight": np.ones((2, 8))}, None), "letters"),
        (lambda t: peft(t / "k", factors(paths("q_proj")), config(modules_to_save=["a"] * 2000)), "2,000 entries"),
    ],
)  # fmt: skip
def test_what_cannot_be_looked_at_ends_with_2(tmp_path, capsys, make, message):
    assert run("audit", str(make(tmp_path))) == 2
    assert message in capsys.readouterr().err


def test_a_pickle_in_a_folder_is_not_opened(tmp_path, capsys):
    folder = peft(tmp_path / "a", factors(paths("q_proj")), config("q_proj"))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert run("audit", str(folder)) == 2
    assert "a pickle" in capsys.readouterr().err


def test_names_that_steer_a_terminal_are_escaped(tmp_path, capsys):
    tensors = {name.replace("q_proj", "q\x1b[2Jproj"): array for name, array in factors(paths("q_proj")).items()}
    assert run("audit", str(peft(tmp_path / "a", tensors, config("q_proj")))) == 1
    assert "\x1b" not in capsys.readouterr().out
