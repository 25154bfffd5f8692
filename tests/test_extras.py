"""A package that is missing is named, with what needs it and the command that installs its extra."""

import sys

import pytest

from minilora.extras import MissingPackage, install, needed, requiring


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    assert needed("json", "a test").loads("[1]") == [1]
    for module in ("tqdm", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingPackage) as error:
            needed(module, "such a bar")
        said = f"such a bar needs tqdm (import of {module} halted; None in sys.modules): {install('files')}"
        assert str(error.value) == said


def test_another_import_error_is_not_ours():
    for name in ("no_such_package", None):
        with pytest.raises(ImportError, match=r"^as it was$") as error, requiring("a test"):
            raise ImportError("as it was", name=name)
        assert not isinstance(error.value, MissingPackage)


def test_the_innermost_need_is_the_one_that_is_named():
    said = r"^the file needs tqdm \(gone\): .*\[files\]"
    with pytest.raises(MissingPackage, match=said), requiring("the command", "models"), requiring("the file"):
        raise ImportError("gone", name="tqdm.auto")
    said = r"^the command needs tqdm \(gone\): .*\[models\]"
    with pytest.raises(MissingPackage, match=said), requiring("the command", "models"):
        raise ImportError("gone", name="tqdm")
