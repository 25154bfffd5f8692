"""A continuation is spelled as soon as it is whole letters, and from where the prompt ends as it is decoded."""

from minilora.language.continuation import spell


def composed(ids):
    """A decoder that composes e and its accent, as some tokenizers' normalisers do."""
    return "".join(chr(i) for i in ids).replace("e\u0301", "\u00e9")


def by_bytes(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def test_it_begins_where_the_prompt_ends_as_decoded_and_not_as_typed():
    before = [ord(letter) for letter in "cafe\u0301 "]
    assert [*spell([ord("x"), ord("y")], before, composed)] == ["x", "y"]


def test_a_letter_of_several_tokens_comes_whole():
    assert [*spell("a\u65e5b".encode(), b"prompt ", by_bytes)] == ["a", "\u65e5", "b"]


def test_nothing_is_spelled_of_a_letter_that_never_ends():
    assert [*spell("a\u65e5".encode()[:-1], b"", by_bytes)] == ["a"]
