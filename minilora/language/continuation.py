"""A prompt as a model reads it, and its continuation as text, as soon as it is whole letters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from .chat import SPEAKER, Message, encode_question
from .chattemplate import ChatTemplate
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


@dataclass
class Dialogue:
    """A chat at the prompt: the model reads each question behind all that was said before."""

    template: ChatTemplate
    tokenizer: Tokenizer
    system: str | None = None  # a message that stands first
    messages: list[Message] = field(default_factory=list)  # the others so far

    def ask(self, question: str) -> Prompt:
        """Return a user's message that the model is to answer; the answer is shown alone.

        Raises
        ------
        ValueError
            If the template refuses the message, or writes nothing of the system's.
        """
        ids, end = encode_question(question, self.template, self.tokenizer, self.system, self.messages)
        self.messages.append({"role": "user", "content": question})
        return Prompt(ids, "", [], end)

    def answered(self, answer: str) -> None:
        """Take what the model said as the next message."""
        self.messages.append({"role": SPEAKER, "content": answer})


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
