"""``minilora audit`` of what cannot be looked at, or holds what a terminal takes for orders."""

import numpy as np
import pytest

from tests.audit.adapters import config, factors, gguf, mlx, paths, peft
from tests.support.command_line import run

OTHERS = {
    "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "oft_blocks": "OFT", "oft_diag": "OFT", "boft_R": "BOFT",
    "lora_mid.weight": "LoCon in three factors", "a1.weight": "GLoRA", "glora_a1": "GLoRA", "on_input": "IA3",
}  # fmt: skip


def full(tensors):
    """A full fine-tuning's weights in place of the factors."""
    return {name.replace("lora_a", "weight"): array for name, array in tensors.items() if "lora_a" in name}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: t / "nothing", "No such file or directory"),
        (lambda t: (t / "a.bin", (t / "a.bin").write_bytes(b"x"))[0], "a pickle, which can run code"),
        (lambda t: (t / "a.safetensors", (t / "a.safetensors").write_bytes(b"x" * 20))[0], "header too large"),
        (lambda t: (t / "e", (t / "e").mkdir())[0], "expected adapter_model.safetensors, adapters.safetensors, or one"),
        (lambda t: peft(t / "i", factors(paths("q_proj")), config("q_proj", peft_type="IA3")), "peft_type is 'IA3'"),
        *((lambda t, n=n: peft(t / "l", {f"lora_unet_x.{n}": np.ones((2, 8))}, None), f".{n}' is of {kind}, which is")
          for n, kind in OTHERS.items()),
        (lambda t: mlx(t / "m", paths("q_proj"), fine_tune_type="full"), "fine_tune_type is 'full', which is no LoRA"),
        (lambda t: mlx(t / "m", paths("q_proj"), change=full, fine_tune_type="full"), "fine_tune_type is 'full'"),
        (lambda t: gguf(t / "m.gguf", paths("q_proj"), kind="model"), "general.type is 'model', expected 'adapter'"),
        (lambda t: peft(t / "p", factors(paths("q_proj")), config(target_parameters=["a"] * 2000)), "2,000 entries"),
        (lambda t: peft(t / "y", factors(paths("q_proj")), config(layers_to_transform=[1] * 2000)), "2,000 entries"),
        (lambda t: mlx(t / "m", paths("q_proj"), lora_parameters={"keys": ["a"] * 2000}), "keys has 2,000 entries"),
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
