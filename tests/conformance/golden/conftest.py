import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from minilora.conformance.golden import folder as writing
from minilora.conformance.golden.cases import CASES
from minilora.conformance.golden.sessions import SESSIONS

from . import foreign_reader

MIXTURES = [case for case in CASES if case.base.mixture]


def written(folder, cases=CASES, sessions=SESSIONS):
    pytest.importorskip("gguf", reason="pip install -e '.[models]'")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writing, "CASES", cases)
        patched.setattr(writing, "SESSIONS", sessions)
        writing.write_golden(folder)
    return folder


def index_of(folder):
    return json.loads((folder / "index.json").read_text())


def saved(arrays, path, metadata=None, dtype=None):
    save_file({name: np.ascontiguousarray(array, dtype) for name, array in arrays.items()}, path, metadata)
    return path


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


FORMS = ("all", "last", "probabilities", "last probabilities", "both", "some", "some of the last")


def as_given(form, z):
    """Logits (P, T, V) in each form in which a program may answer."""
    p, ids = log_softmax(z), np.argsort(-z, axis=-1)[..., :7]
    some = np.take_along_axis(p, ids, axis=-1)
    return {
        "all": {"logits": z}, "last": {"logits": z[:, -1]},
        "probabilities": {"log_probabilities": p}, "last probabilities": {"log_probabilities": p[:, -1]},
        "both": {"logits": z, "log_probabilities": p}, "some": {"log_probabilities": some, "ids": ids},
        "some of the last": {"log_probabilities": some[:, -1], "ids": ids[:, -1].astype(np.int32)},
    }[form]  # fmt: skip


def answer_all(golden, results, bug=None):
    """Write what the foreign reader answers to each case."""
    index = index_of(golden)
    results.mkdir()
    for case in index["cases"]:
        found = foreign_reader.answer(golden, index, case, bug)
        if found is not None:
            save_file({"logits": found}, results / f"{case['id']}.safetensors")
    return results


def pytest_collection_modifyitems(items):
    """Begin with these tests, so that one process has them all: the folder takes seconds to write."""
    items.sort(key=lambda item: "golden" not in item.nodeid)


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
