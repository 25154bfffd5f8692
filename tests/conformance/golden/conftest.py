import json

import pytest
from safetensors.numpy import save_file

from minilora.conformance.golden import folder as writing
from minilora.conformance.golden.cases import CASES
from minilora.conformance.golden.sessions import SESSIONS

from . import foreign_reader

MIXTURES = [case for case in CASES if case.base.mixture]
FOUND = CASES[next(i for i, case in enumerate(CASES) if case.stored) : -len(MIXTURES)]
"""The cases of files as they are found: in half precision, with keys that are missing, under other names."""


def written(folder, cases=CASES, sessions=SESSIONS):
    pytest.importorskip("gguf", reason="pip install -e '.[models]'")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writing, "CASES", cases)
        patched.setattr(writing, "SESSIONS", sessions)
        writing.write_golden(folder)
    return folder


def index_of(folder):
    return json.loads((folder / "index.json").read_text())


def answer_all(golden, results, bug=None):
    """Write what the foreign reader answers to each case."""
    index = index_of(golden)
    results.mkdir()
    for case in index["cases"]:
        found = foreign_reader.answer(golden, index, case, bug)
        if found is not None:
            save_file({"logits": found}, results / f"{case['id']}.safetensors")
    return results


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    """A folder of golden adapters, as the command writes it; no test changes it."""
    return written(tmp_path_factory.mktemp("golden") / "golden")


@pytest.fixture(scope="session")
def index(golden):
    return index_of(golden)


@pytest.fixture(scope="session")
def right(golden, tmp_path_factory):
    """The foreign reader's answers to each case; no test changes them."""
    return answer_all(golden, tmp_path_factory.mktemp("right") / "results")
