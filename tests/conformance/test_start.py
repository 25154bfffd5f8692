"""``minilora conformance --start``: each file says what to fill in, and passes with a right LoRA filled in."""

import re
import sys
from pathlib import Path

import pytest

import minilora
from minilora import cli
from minilora.cli.judge import START_FILES
from minilora.conformance import CannotRun, check
from minilora.conformance.checking.child import imported

FOLDER = Path(minilora.__file__).parent / "conformance" / "start"
MINE = {
    "numpy": "",
    "class": """
import numpy as np

class MyLoRALinear:
    def __init__(self, n_in, n_out, rank, alpha):
        self.s = alpha / rank
    def forward(self, x):
        self.x, self.h = x, x @ self.A.T
        y = x @ self.weight.T + self.s * (self.h @ self.B.T if not self.folded else 0 * x[..., :1])
        return y if self.bias is None else y + self.bias
    folded = False
    def backward(self, dy):
        dh = self.s * dy @ self.B
        self.grad_A, self.grad_B = dh.T @ self.x, self.s * dy.T @ self.h
        return dy @ self.weight + dh @ self.A
    def merge(self):
        if not self.folded:
            self.before, self.weight, self.folded = self.weight, self.weight + self.s * self.B @ self.A, True
    def unmerge(self):
        if self.folded:
            self.weight, self.folded = self.before, False
""",
    "torch": """
import torch

class MyLoRALinear(torch.nn.Linear):
    def __init__(self, n_in, n_out, r, alpha, bias):
        super().__init__(n_in, n_out, bias)
        self.lora_A, self.lora_B = (torch.nn.Parameter(torch.zeros(s)) for s in ((r, n_in), (n_out, r)))
        self.scaling = alpha / r
    def forward(self, x):
        return super().forward(x) + self.scaling * x @ self.lora_A.T @ self.lora_B.T
    def merge(self):
        self.weight.data += self.scaling * (self.lora_B @ self.lora_A).detach()
""",
    "peft": "",
    "jax": """
def my_lora(params, x, scaling):
    y = x @ params["kernel"].T + scaling * x @ params["A"].T @ params["B"].T
    return y if params["bias"] is None else y + params["bias"]
""",
    "mlx": """
import mlx.nn as nn

class MyLoRALinear(nn.Module):
    def __init__(self, n_in, n_out, r, scale):
        super().__init__()
        self.scale = scale
    def __call__(self, x):
        y = x @ self.weight.T + self.scale * (x @ self.lora_a) @ self.lora_b
        return y if self.bias is None else y + self.bias
""",
}
"""A package with a right LoRA, such as users have."""
OFFERED = {
    "numpy": {"forward", "slope", "merge", "start"},
    "class": {"forward", "slope", "merge", "merged and back"},
    "torch": {"forward", "slope", "merge"},
    "peft": {"forward", "slope", "merge", "start"},
    "jax": {"forward", "slope"},
    "mlx": {"forward", "slope"},
}
FILLED_IN = ("numpy", "class", *(pytest.param(k, marks=pytest.mark.peers) for k in ("torch", "peft", "jax", "mlx")))


def filled_in(text):
    """Replace the lines that raise by the commented example, and import the package."""
    text = re.sub(r"(?m)^ +raise NotImplementedError\(.*\n((?: +#.*\n)+)", lambda m: m[1].replace("# ", ""), text)
    text = text.replace("# from my_package", "from my_package")
    return re.sub(r"(?m)^# (def merge|    )", r"\1", text)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("my_lora", "my_package"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", FILLED_IN)
@pytest.mark.filterwarnings("ignore")
def test_a_right_lora_that_is_filled_in_passes(folder, kind):
    if kind not in ("numpy", "class"):
        pytest.importorskip("mlx.core" if kind == "mlx" else kind)
    (folder / "my_package.py").write_text(MINE[kind], encoding="utf-8")
    text = FOLDER.joinpath(f"{kind}.txt").read_text(encoding="utf-8")
    (folder / "my_lora.py").write_text(filled_in(text), encoding="utf-8")
    assert "NotImplementedError" not in filled_in(text)
    report = check(imported("my_lora.py"))
    assert report.passed, str(report)
    assert {claim for claim, verdict in report.claims.items() if verdict == "ok"} >= OFFERED[kind]


@pytest.mark.parametrize("kind", [k for k in FILLED_IN if k != "peft" and getattr(k, "values", None) != ("peft",)])
def test_a_file_says_what_is_still_to_fill_in(folder, kind):
    if kind not in ("numpy", "class"):
        pytest.importorskip("mlx.core" if kind == "mlx" else kind)
    assert cli.main(["conformance", "--start", kind, "-o", "my_lora.py"]) == 0
    lines = (folder / "my_lora.py").read_text(encoding="utf-8").splitlines()
    with pytest.raises(CannotRun) as refused:
        check(imported("my_lora.py"))
    what = {"numpy": "forward", "class": "layer", "torch": "layer"}.get(kind, "apply")
    line = next(number for number, text in enumerate(lines, start=1) if "raise NotImplementedError" in text)
    assert f"forward raises NotImplementedError: fill in `{what}` (" in str(refused.value)
    assert str(refused.value).endswith(f", in my_lora.py, line {line}")


def test_unused_functions_are_to_be_deleted(folder):
    text = FOLDER.joinpath("numpy.txt").read_text(encoding="utf-8")
    first, rest = text.split("def backward")
    (folder / "my_lora.py").write_text(f"{filled_in(first)}def backward{rest}", encoding="utf-8")
    report = check(imported("my_lora.py"))
    assert report.claims["forward"] == "ok"
    for claim, function in (("slope", "backward"), ("merge", "merge"), ("start", "init")):
        assert report.claims[claim].startswith(
            f"{function} raises NotImplementedError: fill in `{function}`, or delete"
        )


def test_each_kind_has_its_file_printed(folder, capsys):
    assert {f"{kind}.txt" for kind in START_FILES} == {file.name for file in FOLDER.iterdir()}
    for kind in START_FILES:
        text = FOLDER.joinpath(f"{kind}.txt").read_text(encoding="utf-8")
        assert cli.main(["conformance", "--start", kind]) == 0
        assert capsys.readouterr().out == text
        assert max(map(len, text.splitlines())) <= 120
        compile(text, kind, "exec")


def test_a_start_judges_nothing(folder, shell):
    said = "--start only creates a file and judges nothing, expected no implementation with it"
    assert shell.refused("conformance mine.py --start jax") == said
    assert shell.refused("conformance --start jax --dtype float64") == said.replace("implementation", "dtype")
