"""A report is written whole, or not at all."""

import os

import pytest

from minilora.conformance.checking.report import save_json


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX's")
def test_a_report_that_finds_no_place_leaves_the_old_one(tmp_path):
    import resource

    (tmp_path / "r.json").write_text("{}")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_json(tmp_path / "r.json", text="x" * 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("r.json", "{}")]
