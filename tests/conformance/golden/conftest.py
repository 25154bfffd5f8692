import json

import pytest

from minilora.conformance.golden import folder as writing
from minilora.conformance.golden.cases import CASES
from minilora.conformance.golden.sessions import SESSIONS

FEW = ("all-linear", "rslora", "dora", "pissa-raw", "two-adapters", "modules-to-save", "bias-lora-only", "base-alone")
FEW += ("experts-old-names", "file-in-bfloat16", "alpha-missing")
"""Of the cases that have answers, those that the default run writes: an answer takes long."""


MIXTURES = [case for case in CASES if case.base.mixture]
FOUND = CASES[next(i for i, case in enumerate(CASES) if case.stored) : -len(MIXTURES)]
"""The cases of files as they are found: in half precision, with keys that are missing, under other names."""


def written(folder, cases=CASES, sessions=SESSIONS):
    pytest.importorskip("gguf", reason="pip install -e '.[models]'")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writing, "CASES", cases)
        patched.setattr(writing, "SESSIONS", sessions)
        writing.write(folder)
    return folder


def index_of(folder):
    return json.loads((folder / "index.json").read_text())


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    """A folder of golden adapters, as the command writes it, with `FEW` answers; no test changes it."""
    cases = [case for case in CASES if not case.answered or case.id in FEW]
    return written(tmp_path_factory.mktemp("golden") / "golden", cases)


@pytest.fixture(scope="session")
def index(golden):
    return index_of(golden)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The same with every case, for `long` tests."""
    return written(tmp_path_factory.mktemp("golden") / "golden")
