"""What a test beside torch may ask for by name."""

import pytest


@pytest.fixture
def double(monkeypatch):
    """The models of transformers compute in float64 throughout; as they are, norms, angles and routers do not."""
    from ..support.peers import stay_in_double

    stay_in_double(monkeypatch)
