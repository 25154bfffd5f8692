"""Files are opened and JSON is parsed with suspicion."""

import io

import pytest

from minilora import FileRefused
from minilora.guards import inputfiles
from minilora.guards.inputfiles import MOST_NESTED, parse_json, read_json


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a", "a\\b", "a\0b"])
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    with pytest.raises(FileRefused) as error:
        inputfiles.member(tmp_path, name)
    assert str(error.value) == f"'{tmp_path}': {name!r} is not the plain name of a file in this folder"
    assert inputfiles.member(tmp_path, "..a") == tmp_path / "..a"


def test_no_more_of_a_text_is_read_than_asked(tmp_path, monkeypatch):
    class Endless(io.BytesIO):
        def read(self, count=-1):
            assert 0 <= count <= 10
            return bytes(count)

    monkeypatch.setattr(inputfiles, "open_regular", lambda path: Endless())
    with pytest.raises(FileRefused, match="larger than the 9 bytes"):
        inputfiles.read_whole(tmp_path / "t", 9)


def test_a_text_that_cannot_be_read_names_the_file(tmp_path, monkeypatch):
    class Unreadable(io.BytesIO):
        def read(self, count=-1):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(inputfiles, "open_regular", lambda path: Unreadable())
    with pytest.raises(FileRefused) as error:
        inputfiles.read_whole(tmp_path / "t", 9)
    assert str(error.value) == f"'{tmp_path / 't'}': cannot be read: [Errno 5] Input/output error"


def test_json_is_read_up_to_a_size(tmp_path):
    path, text = tmp_path / "a.json", '{"é": [1, 2.5]}'
    path.write_text(text, encoding="utf-8")
    assert read_json(path, len(text.encode())) == {"é": [1, 2.5]}
    for at_most, wrong, reason in (
        (len(text), text, f"larger than the {len(text)} bytes that such a file can need"),
        (99, "[1]", "the file is a list of JSON, expected an object"),
        (99, '{"a": 1, "b": 2, "a": 3}', "the file is not sound JSON: the key 'a' stands twice"),
        (99, '{"a": NaN}', "the file is not sound JSON: NaN is not a number of JSON"),
        (99, '{"a": -Infinity}', "the file is not sound JSON: -Infinity is not a number of JSON"),
    ):
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(FileRefused) as error:
            read_json(path, at_most)
        assert str(error.value) == f"'{path}': {reason}"


@pytest.mark.parametrize("deep", [MOST_NESTED - 1, MOST_NESTED, 980, 100_000])
def test_json_that_nests_deeper_than_it_can_be_written_again_is_refused(tmp_path, deep):
    text = b'{"a": ' + b"[" * deep + b"]" * deep + b"}"
    if deep < MOST_NESTED:
        assert parse_json(tmp_path, text, "file")
    else:
        with pytest.raises(FileRefused, match=r"nests deeper than 100 levels|not sound JSON"):
            parse_json(tmp_path, text, "file")
