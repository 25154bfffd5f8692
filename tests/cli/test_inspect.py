"""``minilora inspect``."""

import io
import re
import sys

import numpy as np
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file

from minilora import Adapter, LoRA, load_adapter, save_adapter

from ..support.command_line import run


def test_inspect_prints_the_table_and_draws_it(adapter, tmp_path, shell, monkeypatch):
    figures, real = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or real(self, *a, **k))
    head, enc, top, total, _, written = shell(f"inspect {adapter} --plot {tmp_path}/p.png").splitlines()
    loras = load_adapter(adapter)
    norms = {name: np.linalg.norm(lora.delta().astype(float)) for name, lora in loras.items()}
    assert head.split()[:4] == ["module", "out", "x", "in"]
    assert enc.split()[:9] == ["enc.fc", *["3", "x", "5", "2", "1", "0.7071", "16"], f"{norms['enc.fc']:.4g}"]
    assert top.split()[:9] == ["head", *["7", "x", "3", "4", "6", "3", "40"], f"{norms['head']:.4g}"]
    assert total.split() == ["total", "56"]
    assert written == f"figure written to {tmp_path / 'p.png'}"
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    bars = figures[0].axes[0].patches
    np.testing.assert_allclose([bar.get_width() for bar in bars], list(norms.values()), rtol=1e-6)
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == ["enc.fc", "head"]


TABLE = """\
module  kind        out x in  rank  alpha  scaling  parameters  |delta|  share of each singular value
conv    conv2d 2x3    4 x 12     1      1        1          16    6.928  100.0%
fc      linear        9 x 11     9      3   0.3333         180    5.627  28.4% 22.5% 17.2% 12.6% 8.8% 5.6% 3.2% 1.4% ...
total                                                      196
"""
LINEAR = """\
module  out x in  rank  alpha  scaling  parameters  |delta|  share of each singular value
fc        9 x 11     8      8        1         160    2.828  12.5% 12.5% 12.5% 12.5% 12.5% 12.5% 12.5% 12.5%
up         4 x 3     1      1        1           7    3.464  100.0%
total                                          167
"""


def test_kinds_have_a_column_and_eight_shares_are_shown(tmp_path, shell):
    conv = Adapter(np.ones((1, 12)), np.ones((4, 1)), 1, kind="conv2d", kernel=(2, 3))
    save_adapter(tmp_path, {"conv": conv, "fc": LoRA(np.eye(9, 11), np.diag(np.arange(9.0, 0, -1)), 3.0)})
    assert shell(f"inspect {tmp_path}") == TABLE
    layers = {"fc": LoRA(np.eye(8, 11), np.eye(9, 8), 8.0), "up": LoRA(np.ones((1, 3)), np.ones((4, 1)), 1.0)}
    save_adapter(tmp_path, layers, overwrite=True)
    assert shell(f"inspect {tmp_path}") == LINEAR


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path, monkeypatch):
    save_adapter(tmp_path / "a", {"é.fc": LoRA(np.ones((1, 2)), np.ones((3, 1)), 2.0)})
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown := io.BytesIO(), encoding="ascii"))
    assert run(f"inspect {tmp_path}/a") == 0
    assert b"\\xe9.fc" in shown.getvalue()


def test_a_base_s_own_weight_in_the_file_is_said(tmp_path, shell):
    """PEFT saves it beside an adapted embedding or head: it is no part of the adapter."""
    save_adapter(tmp_path / "a", {"lm_head": LoRA(np.ones((1, 2)), np.ones((3, 1)), 2.0)})
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.lm_head.base_layer.weight": np.ones((3, 2))}, path)
    assert "lm_head" in shell("inspect", tmp_path / "a")
    assert "also holds the base's own weight of 'lm_head', which is not loaded" in shell.err
    assert shell.err.count("\n") == 1


def test_layers_named_by_weights_are_summed_by_their_own_names(tmp_path, shell):
    """Those of a Qwen3-MoE: two kinds of one size are two rows."""
    lora = LoRA(np.ones((1, 3), "f4"), np.ones((2, 1), "f4"), 1.0)
    layers = {f"model.layers.{i}.mlp.{name}": lora for i in range(13) for name in ("gate_proj", "up_proj")}
    save_adapter(tmp_path / "a", layers, target_parameters=[f"{path}.weight" for path in layers])
    rows = shell(f"inspect {tmp_path}/a").splitlines()[1:-1]
    assert [row.split()[:3] for row in rows] == [["gate_proj", "x", "13"], ["up_proj", "x", "13"]]


def test_a_long_table_is_summed_by_kind(tmp_path, shell):
    rng = np.random.default_rng(0)
    layers = {
        f"h.{i}.{name}": LoRA(rng.standard_normal((2, width)), rng.standard_normal((4, 2)), 6.0)
        for i in range(13)
        for name, width in (("q", 3), ("k", 5))
    }
    save_adapter(tmp_path / "a", layers)
    base = {f"{path}.weight": rng.standard_normal(lora.shape) for path, lora in layers.items()}
    save_file(base, tmp_path / "b.safetensors")
    inspect, merge = f"inspect {tmp_path}/a", f"merge {tmp_path}/b.safetensors {tmp_path}/a -o {tmp_path}/c --dry-run"
    head, *rows = shell(inspect).splitlines()
    assert head.endswith("mean share of each singular value")
    norms = {
        name: [float(np.linalg.norm(a.delta())) for path, a in layers.items() if path.endswith(name)] for name in "qk"
    }
    for row, name, width in zip(rows, "kq", (5, 3), strict=False):
        assert re.split(r"  +", row)[:-1] == [
            f"{name} x 13", f"4 x {width}", "2", "6", "3", f"{13 * 2 * (width + 4):,}",
            f"{min(norms[name]):.4g} to {max(norms[name]):.4g}",
        ]  # fmt: skip
    assert len(rows) == 3
    assert [line[:6] for line in shell(merge).splitlines()[1:3]] == ["k x 13", "q x 13"]
    for command in (inspect, merge):
        assert len(shell(command, "--all").splitlines()) == 28
    save_adapter(tmp_path / "a", dict([*layers.items()][:24]), overwrite=True)  # as many as are shown one by one
    for command in (inspect, merge):
        assert len(shell(command).splitlines()) == 26


def test_a_system_message_that_is_kept_is_shown(tmp_path, shell):
    layers = {"fc": LoRA(np.ones((1, 2)), np.ones((3, 1)), 1.0)}
    save_adapter(tmp_path, layers)
    table = shell(f"inspect {tmp_path}")
    save_adapter(tmp_path, layers, system="Be brief.\nBe kind.", overwrite=True)
    assert shell(f"inspect {tmp_path}") == table + "\nsystem message: Be brief.\\nBe kind.\n"
