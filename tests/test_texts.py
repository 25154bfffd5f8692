"""Text for a terminal and for errors: printable, in one line, and named by what was looked at."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.texts import FileRefused, hub_hint, named, printable, reading, short


@given(text=st.text(st.characters(), max_size=300))
def test_a_text_is_printable_and_stays_where_it_was(text):
    shown = printable(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\x00\x7f\x9b", r"\x00\x7f\x9b"),
        ("\u202e\u2028", r"\u202e\u2028"),
        ("\udcff", r"\udcff"),
        ("é 漢", "é 漢"),
        ("é\n漢", r"é\n漢"),
    ],
)
def test_control_characters_are_escaped(text, shown):
    assert printable(text) == shown


def test_a_long_text_keeps_its_beginning_and_its_end():
    assert printable("a" * 1200) == "a" * 1200
    assert printable("a" * 700 + "b" * 700) == "a" * 597 + " ... " + "b" * 597
    assert printable("abcdefghijkl", 10) == "ab ... kl"
    assert short("a" * 198) == "'" + "a" * 198 + "'"
    shown = short("a" * 10**6 + "b" * 10**6)
    assert shown == "'" + "a" * 96 + " ... " + "b" * 96 + "'"
    assert len(short(["a"] * 10**4)) <= 200
    assert short(7) == "7"
    assert short("\n") == r"'\n'"


def test_an_error_names_the_file_and_the_reason():
    assert str(FileRefused("a/b", "no\x07good")) == r"'a/b': no\x07good"
    assert len(str(FileRefused("a", "x" * 10**6))) <= 1200
    with pytest.raises(FileRefused, match=r"^'a': RuntimeError$"), reading("a"):
        raise RuntimeError  # without a word


def test_a_hint_is_given_for_a_hubs_name_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert "download it" in hub_hint(Path("owner/model"))
    for other in (Path("here/model"), Path("a/b/c"), Path("model"), tmp_path / "owner"):
        assert hub_hint(other) == ""


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("no"), ValueError, "q: no"),
        (TypeError("no"), TypeError, "q: no"),
        (np.linalg.LinAlgError("no"), ValueError, "q: no"),
        (UnicodeDecodeError("utf-8", b"a", 0, 1, "no"), ValueError, "q: 'utf-8' codec can't decode byte 0x61"),
        (FileRefused("f", "no"), FileRefused, "'f': no"),
        (KeyError("no"), KeyError, "'no'"),
    ],
)
def test_an_error_is_named_by_what_was_looked_at(error, kind, message):
    with pytest.raises(kind) as caught, named("q"):
        raise error
    assert type(caught.value) is kind
    assert str(caught.value).startswith(message)
