"""The ids of a text, which do not depend on the pieces in which it is encoded, and their windows."""

import math
import re
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from minilora.language.text import (
    HELD_OUT,
    MAX_TEXT_BYTES,
    MOST_HELD_OUT_ROWS,
    is_held_out,
    read_text,
    token_ids,
    windows,
)

from ..support.compare import refused


@given(count=st.integers(3, 4000), length=st.integers(1, 40))
@example(count=4000, length=3)
@settings(max_examples=20)
def test_every_id_except_the_first_is_a_target_once(count, length):
    ids = list(range(count))  # each id is its own place
    n = (count - 1) // length
    if n < 2:
        with pytest.raises(ValueError, match=f"the text has {count} tokens, expected at least {2 * length + 1}"):
            windows(ids, length)
        return
    X, Y, X_held, Y_held = windows(ids, length)
    for x, y in ((X, Y), (X_held, Y_held)):
        assert x.shape[1] == length
        assert x.dtype == y.dtype == np.int64
        np.testing.assert_array_equal(y, x + 1)
        np.testing.assert_array_equal(np.diff(y, axis=1), 1)
    targets = np.concatenate([Y.reshape(-1), Y_held.reshape(-1)])
    held = -(-n // HELD_OUT)
    assert len(np.unique(targets)) == len(targets)  # none twice, and so none of those held out is trained on
    assert len(Y) == n - held
    assert len(Y_held) == min(held, MOST_HELD_OUT_ROWS)
    assert Y_held[-1, -1] == n * length  # the end of the text among them
    assert np.ptp(Y_held) >= 0.6 * np.ptp(targets) or held < 3  # all through the text


@pytest.mark.parametrize("share", ["1/10", "1/5", "0.05", "0.07", "1/3", "1/2"])
def test_a_share_of_the_rows_is_rounded_up_exactly(share):
    """A share of 0.07 of 100 rows is seven rows, although 100 * 0.07 is above 7 in floating point."""
    exact = Fraction(share)
    for n in range(1, 400):
        held = is_held_out(n, float(exact))
        assert held.sum() == math.ceil(n * exact), n
        assert held[-1]


def test_a_file_that_is_not_text_is_refused(tmp_path):
    for data, message in (
        (
            b"caf\xe9 au lait",
            "line 1 is not in UTF-8, as byte 0xe9 shows: .* iconv -f LATIN1 -t UTF-8 converts the file",
        ),
        (b"\xef\xbb\xbf\xc3\xa9\n\n\nna\xefve caf\xe9\n", "line 4 is not in UTF-8, as byte 0xef shows"),
        (b"", "': it contains no text$"),
        (b" \n\t", "': it contains no text$"),
        *(
            (
                f"{mark}a\u00e9".encode(code),
                "the text is in UTF-16, expected UTF-8: iconv -f UTF-16 -t UTF-8 converts it",
            )
            for code in ("utf-16-le", "utf-16-be")
            for mark in ("", "\ufeff")
        ),
    ):
        (tmp_path / "t").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_text(tmp_path / "t")


def test_a_text_is_read_as_it_is(tmp_path):
    text = "\ufeffcafé\r\n日本 \U0001f600"
    (tmp_path / "t").write_bytes(text.encode())
    assert read_text(tmp_path / "t") == text[1:]  # without the mark of byte order
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_text(path)


def test_invalid_ids_are_refused():
    for ids, options, error, message in (
        ([0.9] * 9, (4,), TypeError, "ids has dtype float64, expected integers"),
        (["1"] * 9, (4,), TypeError, "ids has dtype <U1, expected integers"),
        ([True] * 9, (4,), TypeError, "ids has dtype bool, expected integers"),
        ([1] * 8 + [-1], (4,), ValueError, "ids holds -1 at (8,), expected 0 to 9223372036854775806"),
        (range(8), (4,), ValueError, "the text has 8 tokens, expected at least 9: two windows of 4"),
        (range(4), (4, 0), ValueError, "the text has 4 tokens, expected at least 5: a window of 4"),
        (range(8), (0,), ValueError, "length must be at least 1, got 0"),
    ):
        with refused(message, error):
            windows(ids, *options)


def in_words(text):
    """Encode each run of letters, spaces or other characters as one token."""
    return [hash(word) % 1000 for word in re.findall(r"[a-z]+| +|[^a-z ]+", text)]


def in_pairs(text):
    """Encode pairs of characters, counted from the start, so that each pair depends on all earlier text."""
    return [ord(a) * 1000 + ord(b or "\1") for a, b in re.findall(r"(?s)(.)(.?)", text)]


def with_a_mark(text):
    """Encode with a marker in front, like tokenizers that prepend a space."""
    return [1, *(ord(letter) for letter in text)] if text else []


def of_runs(text):
    """Encode runs of equal characters by their length, so that a cut inside a run changes both sides."""
    return [1000 * len(run.group()) + ord(run.group()[0]) for run in re.finditer(r"(?s)(.)\1*", text)]


def by_lines(text):
    """Encode lines with their ends, but drop the text's trailing whitespace, as some tokenizers do."""
    return [hash(line) % 10_000 for line in re.findall(r"[^\n]*\n|[^\n]+$", text.rstrip())]


@pytest.fixture
def short_pieces(monkeypatch):
    for name, size in {"PIECE_CHARACTERS": 60, "CONTEXT": 24, "LONGEST_PIECE": 240}.items():
        monkeypatch.setattr(sys.modules["minilora.language.text"], name, size)


@pytest.mark.long
@given(
    words=st.lists(st.sampled_from(["a", "bb", " ", "  ", "\n", "cat", "é", "日本", ", ", "."]), min_size=1),
    times=st.integers(1, 200),
    encode=st.sampled_from([in_words, in_pairs, with_a_mark, of_runs, by_lines]),
)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_ids_of_pieces_are_those_of_the_whole(short_pieces, words, times, encode):
    text = "".join(words) * times
    asked = []

    def told(part):
        asked.append(len(part))
        return encode(part)

    try:
        found = token_ids(text, told)
    except ValueError:  # no place for a cut, which a mark alone always leaves
        assert encode is not with_a_mark
        assert len(text) > 240
    else:
        assert found == encode(text)
    assert max(asked) <= 240 + 24


def test_most_texts_are_encoded_in_short_pieces(short_pieces):
    asked = []

    def told(text):
        asked.append(len(text))
        return in_words(text)

    text = "the cat sat on the mat, and the dog sat on the log.\n" * 500
    assert token_ids(text, told) == in_words(text)
    assert max(asked) <= 60 + 24
    assert sum(asked) < 8 * len(text)


def test_a_tokenizer_of_another_model_is_refused():
    assert token_ids("ab", lambda text: [0, 4], 5) == [0, 4]
    with pytest.raises(ValueError, match="ids up to 5, expected below 5"):
        token_ids("ab", lambda text: [0, 5], 5)


def test_a_cut_that_changes_earlier_tokens_is_skipped(short_pieces):
    """A line break at the end of the text has its own token, so no line start is a safe cut."""

    def encode(part):
        return [*in_words(part.removesuffix("\n")), 1] if part.endswith("\n") else in_words(part)

    text = "the cat sat on the mat\n" * 50
    assert token_ids(text, encode) == encode(text)


def test_a_text_that_allows_no_cut_is_refused(short_pieces):
    assert token_ids("a" * 240, of_runs) == of_runs("a" * 240)
    place = "expected, within 240 characters from character 0 on, a position where the tokens on each side do not "
    for text, encode in (("a" * 500, of_runs), ("abc" * 100, in_pairs)):
        with refused(f"the text cannot be encoded in pieces: {place}depend on the other side", ValueError):
            token_ids(text, encode)
    with pytest.raises(ValueError, match="from character") as error:
        token_ids("ab" * 40 + "a" * 500, of_runs)  # the runs of one letter before it allow a cut anywhere
    assert 40 < int(re.search(r"from character (\d+) on", str(error.value))[1]) < 80


def test_a_cut_that_fails_later_is_refused(short_pieces):
    """The characters around the cut look safe, but the piece as a whole is encoded differently."""
    text = "cat dog " * 30

    def encode(part):
        return [len(part), *in_words(part)] if len(part) > 60 else in_words(part)

    with pytest.raises(ValueError, match="cannot be encoded in pieces"):
        token_ids(text, encode)


def test_a_share_is_held_out_as_in_whole_numbers():
    """Every (1 / share)-th row from the end: at 0.07 the 7th is the 100th; in floating point it would be the 99th."""
    for n in (1, 2, 10, 108, 1001):
        for hundredths in range(1, 51):
            held = is_held_out(n, hundredths / 100)
            expected = {100 * k // hundredths for k in range(-(-n * hundredths // 100))}
            assert {*np.flatnonzero(held[::-1]).tolist()} == expected
    assert len(windows(range(5), 4, 0)[0]) == 1  # where nothing is held out one window is enough


def test_a_text_is_read_up_to_a_size(tmp_path):
    """A sparse file takes no room on the disk, and would take it in memory."""
    with open(tmp_path / "t", "wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)
    with refused(f"'{tmp_path / 't'}': larger than {MAX_TEXT_BYTES} bytes, the limit for such a file"):
        read_text(tmp_path / "t")
