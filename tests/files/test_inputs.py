"""Only regular files of the folder are opened, and JSON has one type."""

import os

import msgspec
import pytest

from minilora import FileRefused
from minilora.files.inputs import member, open_regular, parse_json, read_json, read_start, read_whole


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a", "a\\b", "a\0b"])
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    with pytest.raises(FileRefused) as error:
        member(tmp_path, name)
    assert str(error.value) == f"'{tmp_path}': {name!r} is not the plain name of a file in this folder"
    assert member(tmp_path, "..a") == tmp_path / "..a"


@pytest.mark.parametrize(("name", "reason"), [
    ("pipe", "not a regular file"),
    ("link to the pipe", "not a regular file"),
    ("folder", "not a regular file"),
    ("missing", "No such file or directory"),
])  # fmt: skip
@pytest.mark.parametrize("read", [open_regular, read_whole, read_json, lambda path: read_start(path, 4)])
def test_nothing_but_a_regular_file_is_opened(tmp_path, name, reason, read):
    """Neither is a pipe waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link to the pipe").symlink_to("pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileRefused) as error:
        read(tmp_path / name)
    assert str(error.value) == f"'{tmp_path / name}': {reason}"


def test_a_file_is_read_up_to_a_size(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_whole(tmp_path / "a") == read_whole(tmp_path / "a", 5) == b"12345"
    assert read_start(tmp_path / "a", 2) == b"12"
    with pytest.raises(FileRefused, match=r"larger than the 4 bytes that such a file can need$"):
        read_whole(tmp_path / "a", 4)


class Point(msgspec.Struct):
    x: int


@pytest.mark.parametrize("text", [
    "[1]", '{"x": NaN}', '{"x": -Infinity}', '{"x": 1e999}', '{"x": 1', "", "\ufeff{}", '{"x": ' + "[" * 9999,
    '{"x": "\\ud800"}',
])  # fmt: skip
def test_what_is_no_sound_object_of_json_is_refused_in_one_line(tmp_path, text):
    for kind in (dict, Point):
        with pytest.raises(FileRefused, match=r"^'a\.json': [^\n]+$"):
            parse_json("a.json", text, kind)


def test_json_has_the_type_that_is_asked_for(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"x": 3, "é": [1, 2.5]}', encoding="utf-8")
    assert read_json(path) == {"x": 3, "é": [1, 2.5]}
    assert read_json(path, Point) == Point(3)
    path.write_text('{"x": "3"}')
    with pytest.raises(FileRefused) as error:
        read_json(path, Point)
    assert str(error.value) == f"'{path}': Expected `int`, got `str` - at `$.x`"
    with pytest.raises(FileRefused, match=r"^'a': line 7: JSON is malformed: .*"):
        parse_json("a", "{x", what="line 7")
