import json

import pytest

from minilora.conformance.golden import folder as writing
from minilora.conformance.golden.folder import CASES
from minilora.conformance.golden.mixtures.cases import MIXTURES
from minilora.conformance.golden.sessions import SESSIONS

FEW = ("all-linear", "rslora", "dora", "pissa-raw", "two-adapters", "modules-to-save", "bias-lora-only", "base-alone")
FEW += ("experts-old-names", "file-in-bfloat16", "alpha-missing")
"""Of the cases that have answers, those that the default run writes: an answer takes long."""


def written(folder, cases=CASES, mixtures=MIXTURES, sessions=SESSIONS):
    pytest.importorskip("gguf", reason="pip install -e '.[models]'")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writing, "CASES", cases)
        patched.setattr(writing, "MIXTURES", mixtures)
        patched.setattr(writing, "SESSIONS", sessions)
        writing.write(folder)
    return folder


def index_of(folder):
    return json.loads((folder / "index.json").read_text())


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    """A folder of golden adapters, as the command writes it, with `FEW` answers; no test changes it."""
    cases, mixtures = ([case for case in all if not case.answered or case.id in FEW] for all in (CASES, MIXTURES))
    return written(tmp_path_factory.mktemp("golden") / "golden", cases, mixtures)


@pytest.fixture(scope="session")
def index(golden):
    return index_of(golden)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The same with every case, for `long` tests."""
    return written(tmp_path_factory.mktemp("golden") / "golden")
