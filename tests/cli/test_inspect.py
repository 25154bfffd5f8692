"""``minilora inspect``."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file

from minilora import LoRA, load_adapter, save_adapter
from minilora.cli import main

ROOT = Path(__file__).parents[2]


def drawn(monkeypatch):
    """Let figures be remembered when they are saved."""
    figures, real = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or real(self, *a, **k))
    return figures


def test_inspect_prints_the_table_and_draws_it(adapter, tmp_path, capsys, monkeypatch):
    figures = drawn(monkeypatch)
    assert main(["inspect", str(adapter), "--plot", str(tmp_path / "p.png")]) == 0
    head, enc, top, total, _, written = capsys.readouterr().out.splitlines()
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


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path):
    save_adapter(tmp_path / "a", {"é.fc": LoRA(np.ones((1, 2)), np.ones((3, 1)), 2.0)})
    command = [sys.executable, "-m", "minilora", "inspect", str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\xe9.fc" in done.stdout


def test_a_base_s_own_weight_in_the_file_is_said(tmp_path, capsys):
    """PEFT saves it beside an adapted embedding or head: it is no part of the adapter."""
    save_adapter(tmp_path / "a", {"lm_head": LoRA(np.ones((1, 2)), np.ones((3, 1)), 2.0)})
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.lm_head.base_layer.weight": np.ones((3, 2))}, path)
    assert main(["inspect", str(tmp_path / "a")]) == 0
    out, err = capsys.readouterr()
    assert "lm_head" in out
    assert "also holds the base's own weight of 'lm_head', which is not loaded" in err
    assert err.count("\n") == 1
