r"""From a chat to the text that a model reads, and the places in it where the model speaks.

Let T(m_1 ... m_n) be the text that the model's template makes of n messages, and G what T adds to it to let the model
speak. If m_i is the assistant's, its turn begins where T(m_1 ... m_i-1) G ends, and ends where T(m_1 ... m_i) ends:

    T(m_1 ... m_i-1) G   <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n
    T(m_1 ... m_i)       <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n
    T(m_1 ... m_n)       <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>...
    the turn                                                                    Hello.<|im_end|>

This holds if each is a prefix of the next. Some templates write a message otherwise once another follows, or leave out
what the model thought in earlier turns: what they show in training is not what the model sees when it answers. Such a
chat is refused. But a template may say itself where the model speaks, by the tags {% generation %} and
{% endgeneration %}: then what stands between them counts, as in transformers.

The text is then encoded whole, as transformers does. A token counts if it holds letters of a turn. A turn is over with
its end token, here <|im_end|>: a line break that the template writes behind it does not count. Whatever a message says
goes into the text as it is, so that "<|im_end|>" within one becomes the end token, also as in transformers.

A template that knows no tools writes nothing of a tool call. A chat of which something leaves no trace in the text is
therefore refused.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..texts import short
from .files.chattemplate import ChatTemplate
from .files.tokens import Tokenizer

Message = Mapping[str, Any]
Span = tuple[int, int]
"""The place of a part of a text: its first letter, and the one behind its last."""
SPEAKER = "assistant"
"""The role whose turns are the model's."""
ANSWER = {"role": SPEAKER, "content": "Yes."}
"""An answer such as one that is to come."""
SYSTEM = ("system", "developer")
"""The roles of a message that says what the model is to be."""
ROLES, UNKNOWN = ("system", "user", "assistant", "tool", "developer"), "nobody-s-role"
"""The roles that models are trained with, and one that none is."""


def encode_chat(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer, tools: Sequence[Any] | None = None
) -> tuple[list[int], np.ndarray]:
    """Return the token ids of a chat, those of transformers, and which are of the assistant's turns, (n,) bool.

    The messages are as `checked_messages` returns them.
    """
    text, turns, tagged = _written(messages, template, tools)
    ids, places = tokenizer.tokens(text)
    counted = np.zeros(len(ids), bool)
    for start, stop in turns:
        tokens = tokens_of((start, stop), places)
        if not tagged:  # without the blank that a template writes behind an end token
            through = tokens_of((start, start + len(text[start:stop].rstrip())), places)
            if through.stop > through.start and is_control(ids[through.stop - 1], tokenizer):
                tokens = through
        counted[tokens] = True
    return ids, counted


def write_chat(
    messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None = None
) -> tuple[str, list[Span]]:
    """Return a chat as transformers writes it, and where each of the assistant's turns begins in it and is over."""
    return _written(checked_messages(messages), template, tools)[:2]


def checked_messages(messages: Any) -> list[Message]:
    """Return a chat that has something to learn, each content in parts of text as one text."""
    checked: list[Message] = []
    for i, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {i} is {short(message)}, expected an object with role and content")
        content, calls = _joined(message.get("content")), message.get("tool_calls")
        if not isinstance(content, str) and not (content is None and calls):
            raise ValueError(f"the content of message {i} is {short(content)}, expected a text")
        if message["role"] == SPEAKER and not calls and not str(content).strip():
            raise ValueError(f"message {i} is an empty answer of the {SPEAKER}'s: {short(content)}")
        checked.append({**message, "content": content} if "content" in message else message)
    roles = sorted({message["role"] for message in checked})
    if SPEAKER not in roles:
        raise ValueError(f"no message is the {SPEAKER}'s: there is nothing to learn. The roles are {short(roles)}")
    return checked


def system_of(messages: Sequence[Message]) -> str | None:
    """Return the system message with which a chat begins; None where it begins otherwise, or that says nothing."""
    first = messages[0] if messages else {}
    content = _joined(first.get("content")) if first.get("role") == SYSTEM[0] else None
    return content if isinstance(content, str) and content.strip() else None


def with_system(messages: Sequence[Message], system: str | None) -> list[Any]:
    """Return a chat that begins with a system message: its own, or this one."""
    own = bool(messages) and messages[0].get("role") in SYSTEM
    return [*messages] if own or not system else [{"role": SYSTEM[0], "content": system}, *messages]


def _joined(content: Any) -> Any:
    """Return a content whose parts are all texts as one text, with nothing between them; any other as it is."""
    if isinstance(content, list) and content and all(map(_is_text, content)):
        return "".join(part["text"] for part in content)
    return content


def _is_text(part: Any) -> bool:
    """Return whether a part of a content is a text, and says nothing else."""
    known = isinstance(part, dict) and part.keys() == {"type", "text"}
    return known and part["type"] == "text" and isinstance(part["text"], str)


# --- the turns ------------------------------------------------------------------------------------------------------


def _written(
    messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None
) -> tuple[str, list[Span], bool]:
    """Return a chat as a text, where each turn begins and ends in it, and whether the template itself says so."""
    text, tagged = template.render_with_turns(messages, tools=tools)
    _check_roles(messages, template, tools, text)
    turns = tagged or _by_prefixes(messages, template, tools, text)
    _check_traces(messages, template, tools, text)
    return text, turns, bool(tagged)


def _by_prefixes(
    messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None, text: str
) -> list[Span]:
    """Return where each of the assistant's turns begins and ends in a text, from what the template writes of fewer."""
    turns = []
    for i, message in enumerate(messages):
        if message["role"] == SPEAKER:
            before = template.render(messages[:i], add_generation_prompt=True, tools=tools)
            after = _up_to_the_end(messages[: i + 1], template, tools)
            for shorter, longer in ((before, after), (after, text)):
                if not longer.startswith(shorter):
                    raise ValueError(_in_two_ways(i, shorter, longer))
            turns.append((len(before), len(after)))
    return turns


def _up_to_the_end(messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None) -> str:
    """Return what a template writes up to the end of a turn."""
    # Phi-3's writes <|endoftext|> behind <|end|> where no answer is to follow: that ends the chat, and no turn.
    after, end = template.render(messages, tools=tools), template.tokens.get("eos_token")
    if not end or not after.endswith(end):
        return after
    followed = template.render(messages, add_generation_prompt=True, tools=tools)
    without = after.removesuffix(end)
    return without if followed.startswith(without) and not followed.startswith(after) else after


def _in_two_ways(i: int, shorter: str, longer: str) -> str:
    """Say where a template goes back on what it wrote."""
    place = next((k for k, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(longer))
    then, now = (short(text[max(0, place - 20) : place + 40], 80) for text in (shorter, longer))
    return (
        f"the chat template writes what stands before the end of message {i + 1} in two ways: {then} and, once more "
        f"follows, {now}. So it cannot be said which tokens are the {SPEAKER}'s"
    )


def tokens_of(part: Span, places: Sequence[Span]) -> slice:
    """Return the tokens that hold letters of a part of a text; `places` are those of all, see `Tokenizer.tokens`."""
    first = bisect_right([stop for _, stop in places], part[0])
    return slice(first, max(first, bisect_left([start for start, _ in places], part[1])))


def is_control(number: int, tokenizer: Tokenizer) -> bool:
    """Return whether a token stands for no text, as <|im_end|> does."""
    return not tokenizer.decode([number]) and bool(tokenizer.spell([number]))


def _check_roles(messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None, text: str) -> None:
    """Require roles that the template knows, where it would merely repeat any word: the model knows none but these."""
    for i, message in enumerate(messages):
        if message["role"] not in ROLES:
            other = [*messages[:i], {**message, "role": UNKNOWN}, *messages[i + 1 :]]
            if (_writes(other, template, tools) or "").replace(UNKNOWN, message["role"]) == text:
                raise ValueError(
                    f"the role of message {i + 1} is {short(message['role'])}, which the chat template merely repeats, "
                    f'expected one of {", ".join(ROLES)}: jq -c \'.messages[].role |= ({{"human": "user"}}[.] // .)\' '
                    "renames roles"
                )


# --- what leaves no trace -------------------------------------------------------------------------------------------


def _check_traces(messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None, text: str) -> None:
    """Require that without any part of a chat the text is another one: else the model would not learn that part."""
    # Marks find all contents at once: a system message may also say what the template would write without one.
    seen = _contents_seen(messages, template, tools)
    for i, message in enumerate(messages):
        for what, changed in _without_each(message):
            if what == "content" and i in seen:
                continue
            if _writes([*messages[:i], changed, *messages[i + 1 :]], template, tools) == text:
                raise ValueError(_no_trace(f"{what} of message {i + 1}"))
        if message["role"] != "tool" and not _stands_in(str(message.get("content") or ""), text):
            raise ValueError(
                f"the chat template writes a part of message {i + 1} only, so the model cannot learn the rest: "
                f"{short(message['content'])}"
            )
    for i in range(len(tools or ())):
        if _writes(messages, template, [*tools[:i], *tools[i + 1 :]]) == text:  # type: ignore[index]
            raise ValueError(_no_trace(f"tool {i + 1} of its tools"))


def _stands_in(content: str, text: str) -> bool:
    """Return whether a content is in a text, but for blanks around it and cases of letters, or as JSON has it."""
    content, text = content.strip().casefold(), text.casefold()
    return content in text or json.dumps(content)[1:-1] in text or json.dumps(content, ensure_ascii=False)[1:-1] in text


def _no_trace(what: str) -> str:
    return (
        f"{what} leaves no trace in what the chat template writes, so the model cannot learn it: take it out, or say "
        "it in the content"
    )


def _contents_seen(messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None) -> set[int]:
    """Return the messages of which the content is surely in the text: one chat with a mark in each shows them."""
    marks = {i: f"<mark {i} of many>" for i, message in enumerate(messages) if message.get("content")}
    marked = [{**message, "content": marks[i]} if i in marks else message for i, message in enumerate(messages)]
    text = _writes(marked, template, tools) or ""
    return {i for i, mark in marks.items() if mark in text}


def _writes(messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None) -> str | None:
    """Return what the template writes of a chat, or None where it refuses it."""
    try:
        return template.render(messages, tools=tools)
    except ValueError:
        return None


def _without_each(message: Message) -> Iterator[tuple[str, Message]]:
    """Yield the name of each thing that a message says, and the message without it."""
    for key, value in message.items():
        if key == "role" or value is None or not str(value).strip() or value in ([], {}):
            continue  # it says nothing
        if key == "content":
            yield key, {**message, key: ""}
        else:
            yield f"the key {short(key)}", {name: part for name, part in message.items() if name != key}
    calls = message["tool_calls"] if isinstance(message.get("tool_calls"), list) else []
    for k, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        for key in ("name", "arguments"):
            if isinstance(function, dict) and function.get(key):
                other = {**function, key: type(function[key])()}
                changed = {**call, "function": other} if "function" in call else other
                yield f"{key} of tool call {k + 1}", {**message, "tool_calls": [*calls[:k], changed, *calls[k + 1 :]]}


# --- a question, and a dialogue -------------------------------------------------------------------------------------


def encode_answering(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer, tools: Sequence[Any] | None = None
) -> tuple[list[int], frozenset[int]]:
    """Return the ids of a chat with what lets the model answer, and the tokens that end the answer."""
    text, end = template.render(messages, add_generation_prompt=True, tools=tools), set(tokenizer.end)
    ids = tokenizer.encode(text)
    try:
        answered, counted = encode_chat([*messages, ANSWER], template, tokenizer, tools)
    except ValueError:  # a template that cannot be trained with can still ask
        return ids, frozenset(end)
    last = answered[np.flatnonzero(counted)[-1]]
    return ids, frozenset(end | {last} if is_control(last, tokenizer) else end)


@dataclass(frozen=True)
class Prompt:
    """What a model is to go on from."""

    ids: Sequence[int]  # what it reads
    text: str  # what is shown before the continuation
    text_ids: Sequence[int]  # those of the ids that stand for this text
    end: Collection[int]  # the ids that end the continuation


def read_prompt(text: str, tokenizer: Tokenizer) -> Prompt:
    """Return a text that is to be continued."""
    ids = tokenizer.encode(text)
    return Prompt([*tokenizer.begin, *ids], text, ids, tokenizer.end)


def read_chat(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer, tools: Sequence[Any] | None = None
) -> Prompt:
    """Return a chat whose last message the model is to answer; where that is an answer already, the one before it."""
    asked = messages[:-1] if messages and messages[-1].get("role") == SPEAKER else messages
    asked = checked_messages([*asked, ANSWER])[:-1]
    if not asked:
        raise ValueError("its messages ask nothing")
    if tools and template.render(asked, tools=tools) == template.render(asked):
        raise ValueError("the chat template writes nothing of its tools: say it in a message")
    ids, end = encode_answering(asked, template, tokenizer, tools or None)
    return Prompt(ids, "", [], end)


@dataclass
class Dialogue:
    """A chat at the prompt: the model reads each question behind all that was said before."""

    template: ChatTemplate
    tokenizer: Tokenizer
    messages: list[Message] = field(default_factory=list)  # so far; a system message may stand first

    def ask(self, question: str) -> Prompt:
        """Return a user's message that the model is to answer; the answer is shown alone."""
        asked = [*self.messages, {"role": "user", "content": question}]
        if asked[0]["role"] == SYSTEM[0] and self.template.render(asked[1:]) == self.template.render(asked):
            raise ValueError("the chat template writes nothing of a system message: say it in the prompt")
        ids, end = encode_answering(asked, self.template, self.tokenizer)
        self.messages = asked
        return Prompt(ids, "", [], end)

    def answered(self, answer: str) -> None:
        """Take what the model said as the next message."""
        self.messages.append({"role": SPEAKER, "content": answer})
