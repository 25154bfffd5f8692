"""A prompt as a model reads it, and its continuation as text, as soon as it is whole letters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .chat import encode_question
from .chattemplate import load_template
from .text import token_ids
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """What a model is to go on from."""

    ids: Sequence[int]  # what it reads
    text: str  # what is shown before the continuation
    text_ids: Sequence[int]  # those of the ids that stand for this text
    end: Collection[int]  # the ids that end the continuation


def read_prompt(text: str, tokenizer: Tokenizer) -> Prompt:
    """Return a text that is to be continued."""
    ids = token_ids(text, tokenizer.encode)
    return Prompt([*tokenizer.begin, *ids], text, ids, tokenizer.end)


def read_question(message: str, model: Path, tokenizer: Tokenizer, system: str | None = None) -> Prompt:
    """Return a user's message that the model is to answer, behind a system message if any; the answer is shown alone.

    Raises
    ------
    ValueError
        If the model has no chat template, or it refuses the message.
    """
    with load_template(model) as template:
        ids, end = encode_question(message, template, tokenizer, system)
    return Prompt(ids, "", [], end)


def spell(ids: Iterable[int], before: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """Yield the text that ids add to those before them, piece by piece.

    The bytes of a letter may come in several tokens: they are held back until the letter is whole.
    """
    all_ids = list(before)
    done = len(decode(all_ids))
    for token in ids:
        all_ids.append(token)
        text = decode(all_ids)
        if not text.endswith("\ufffd"):
            yield text[done:]
            done = len(text)
