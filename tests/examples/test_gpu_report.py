"""The script that will measure a GPU, run as far as a machine without one can."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from minilora import get_backend

PATH = Path(__file__).parents[2] / "examples" / "gpu_report.py"


@pytest.fixture(scope="module")
def report():
    spec = spec_from_file_location("gpu_report", PATH)
    module = module_from_spec(spec)
    sys.modules["gpu_report"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_report"]


def small(report):
    linear = {"n": 64, "in_features": 6, "out_features": 5, "batch_size": 16, "epochs": 1}
    others = {"images": 2, "pixels": 4, "ids": 5, "vocabulary": 9, "windows": 2, "length": 3, "blocks": 1}
    return report.Sizes(**linear, **others)


def test_the_report_has_each_library_and_each_figure(report, standin):
    sizes = small(report)
    table = report.columns([get_backend("numpy"), standin], sizes)
    page = report.page(table, sizes, report.machine(standin))
    assert list(table) == ["minilora, numpy", "minilora, cupy"]
    assert len({len(cells) for cells in table.values()}) == 1
    assert table["minilora, numpy"][-1] == table["minilora, cupy"][-1], "both train to the same loss"
    for expected in (
        "- GPU: the device that is not there",
        "- CuPy: 14.2.0",
        "| base, 1 epochs |",
        *report.KINDS,
        *report.OTHERS,
    ):
        assert expected in page


def test_no_report_is_written_without_a_gpu(report, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert report.main([str(tmp_path / "report.md")]) == 2
    assert "no report: CuPy is not installed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert report.main([]) == 2


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_torchs_steps_run(report):
    pytest.importorskip("torch")
    sizes = small(report)
    for kind in report.KINDS:
        assert report.milliseconds(report.torch_epoch("cpu", kind, sizes), repeats=2) > 0
    for kind in report.OTHERS:
        assert report.milliseconds(report.torch_step("cpu", kind, sizes), repeats=2) > 0
