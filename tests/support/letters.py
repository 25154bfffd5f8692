"""A tokenizer whose tokens are letters, two control tokens, and a blank line."""

import re

from minilora.language.files.tokens import Tokenizer

PIECES = re.compile(r"<\w+>|\n\n|(?s:.)")
TOKENS: list[str] = ["<s>", "<end>", *"\n abcdefghijklmnopqrstuvwxyz0123456789Y.?:é", "\n\n"]


def spell(ids):
    return "".join(TOKENS[i] for i in ids)


def words(begin=(), last=(1,)):
    def tokens(text):
        pieces = [*PIECES.finditer(text)]
        return [TOKENS.index(piece.group()) for piece in pieces], [piece.span() for piece in pieces]

    return Tokenizer(
        encode=lambda text: tokens(text)[0],
        decode=lambda ids: re.sub(r"<\w+>", "", spell(ids)),
        begin=begin,
        end=frozenset(last),
        last=last,
        tokens=tokens,
        spell=spell,
    )


def parts(ids, counted):
    """Return the tokens that count, run by run."""
    runs, before = [], False
    for token, counts in zip(ids, counted, strict=True):
        if counts:
            runs = [*runs[:-1], runs[-1] + TOKENS[token]] if before else [*runs, TOKENS[token]]
        before = counts
    return runs
