import json

import pytest

from minilora.conformance.golden import folder as writing


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    """A folder of golden adapters, as the command writes it; no test changes it."""
    pytest.importorskip("gguf", reason="pip install -e '.[models]'")
    folder = tmp_path_factory.mktemp("golden") / "golden"
    writing.write(folder)
    return folder


@pytest.fixture(scope="session")
def index(golden):
    return json.loads((golden / "index.json").read_text())
