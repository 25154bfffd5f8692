"""Pages run before Sphinx reads them: what they print is kept, and a cell that fails stops the build by its page."""

import re
import sys
from pathlib import Path

import pytest

WHY = "the site's tools are not installed: pip install -e '.[docs]'"
jupyter_cache = pytest.importorskip("jupyter_cache", reason=WHY)
config = pytest.importorskip("myst_nb.core.config", reason=WHY)
markdown = pytest.importorskip("myst_parser.config.main", reason=WHY)

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

import running  # noqa: E402

HEAD = "---\nfile_format: mystnb\nkernelspec:\n  name: python3\n  display_name: Python 3\n---\n\n# A page\n\n"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs a page of one cell, and returns what is kept of all pages."""
    monkeypatch.setattr(running, "DOCS", tmp_path)
    cache = jupyter_cache.get_cache(tmp_path / "executed")
    settings = {"execution_mode": "cache", "execution_cache_path": str(tmp_path / "executed")}
    options = config.NbParserConfig(**settings, execution_raise_on_error=True, execution_timeout=60)

    def go(code):
        (tmp_path / "page.md").write_text(f"{HEAD}```{{code-cell}} ipython3\n{code}\n```\n", encoding="utf-8")
        running.run("page", markdown.MdParserConfig(), options)
        return [cache.get_cache_bundle(record.pk).nb for record in cache.list_cache_records()]

    return go


@pytest.mark.site
def test_what_a_page_prints_is_kept_under_what_it_reads(run, monkeypatch):
    (notebook,) = run("print(6 * 7)")
    assert notebook.cells[0].outputs[0].text == "42\n"
    assert re.fullmatch(r"Python 3, [0-9a-f]{16}", notebook.metadata.kernelspec.display_name)
    assert len(run("print(6 * 7)")) == 1  # it has not run again
    monkeypatch.setattr(running, "inputs", lambda text: "something else is read")
    assert len(run("print(6 * 7)")) == 2


@pytest.mark.site
def test_a_failing_cell_is_named_with_its_page(run):
    with pytest.raises(running.FailedPage, match=r"(?s)^page\.md: .*1 / 0.*ZeroDivisionError"):
        run("1 / 0")
