"""``minilora inspect``."""

import io
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file

from minilora import LoRA, load_adapter, save_adapter

from ..support.command_line import run


def test_inspect_prints_the_table_and_draws_it(adapter, tmp_path, shell, monkeypatch):
    figures, real = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or real(self, *a, **k))
    (tmp_path / "p.png").write_text("dear diary")
    said = f"plot file '{tmp_path}/p.png' was not written by minilora, so --overwrite does not replace it: "
    assert said in shell.refused(f"inspect {adapter} --plot {tmp_path}/p.png --overwrite")
    (tmp_path / "p.png").unlink()
    shell(f"inspect {adapter} --plot {tmp_path}/p.png")
    figures.clear()
    shown = shell(f"inspect {adapter} --plot {tmp_path}/p.png --overwrite")
    norms = [np.linalg.norm(lora.delta().astype(float)) for lora in load_adapter(adapter).values()]
    assert [line.split()[8] for line in shown.splitlines()[1:3]] == [f"{norm:.4g}" for norm in norms]
    assert shown.endswith(f"\n\nfigure written to {tmp_path / 'p.png'}\n")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    bars = figures[0].axes[0].patches
    np.testing.assert_allclose([bar.get_width() for bar in bars], norms, rtol=1e-6)
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == ["enc.fc", "head"]


@pytest.mark.parametrize("rank", [1, 7, 8, 9, 20])
def test_the_shares_of_eight_singular_values_are_shown(tmp_path, shell, rank):
    """Dots stand for more of them."""
    values = np.arange(rank, 0.0, -1)
    save_adapter(tmp_path, {"fc": LoRA(np.eye(rank, 25), np.eye(30, rank) * values, 3.0)})
    shares = [f"{share:.1f}%" for share in 100 * values**2 / (values**2).sum()]
    line = shell(f"inspect {tmp_path}").splitlines()[1]
    assert line.split()[9:] == [*shares[:8], *(["..."] if rank > 8 else [])]


@pytest.mark.parametrize(("count", "more"), [(24, ""), (25, ""), (25, "--all")])
def test_a_table_above_24_rows_has_one_for_each_kind(tmp_path, shell, count, more):
    """With the least and the largest norm, the mean share, and the sum of the parameters."""
    rng, layers = np.random.default_rng(0), {}
    for i in range(count):
        A, B = rng.standard_normal((2, 5)), rng.standard_normal((3, 2))
        layers |= {f"h.{i}.{name}": LoRA(A, B, 4.0) for name in ("q" if i else "k",)}
    save_adapter(tmp_path, layers)
    lines = shell(f"inspect {tmp_path} {more}").splitlines()[1:]
    if count == 24 or more:
        assert [line.split()[0] for line in lines] == [*layers, "total"]
        return
    deltas = [np.linalg.svd(2 * lora.lora_B @ lora.lora_A, compute_uv=False) for lora in layers.values()][1:]
    norms, shares = [np.linalg.norm(s) for s in deltas], np.mean([s[:2] ** 2 / (s**2).sum() for s in deltas], axis=0)
    assert lines[0].split()[0:3] == ["k", "x", "1"]
    ends = f"{24 * 16} {min(norms):.4g} to {max(norms):.4g} {100 * shares[0]:.1f}% {100 * shares[1]:.1f}%"
    assert " ".join(lines[1].split()) == f"q x 24 3 x 5 2 4 2 {ends}"
    assert lines[2].split() == ["total", f"{25 * 16}"]


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path, monkeypatch):
    save_adapter(tmp_path / "a", {"é.fc": LoRA(np.ones((1, 2)), np.ones((3, 1)), 2.0)})
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown := io.BytesIO(), encoding="ascii"))
    assert run(f"inspect {tmp_path}/a") == 0
    assert b"\\xe9.fc" in shown.getvalue()


def test_a_bases_own_weight_in_the_file_is_said(tmp_path, shell):
    """PEFT saves it beside an adapted embedding or head: it is no part of the adapter."""
    save_adapter(tmp_path / "a", {"lm_head": LoRA(np.ones((1, 2)), np.ones((3, 1)), 2.0)})
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.lm_head.base_layer.weight": np.ones((3, 2))}, path)
    assert "lm_head" in shell("inspect", tmp_path / "a")
    assert "also contains the base weight of 'lm_head', which is not loaded" in shell.err
    assert shell.err.count("\n") == 1
