"""``minilora audit`` of what cannot be looked at, or holds what a terminal takes for orders."""

import numpy as np
import pytest

from tests.audit.adapters import config, factors, paths, peft
from tests.support.command_line import run


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
