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
{% endgeneration %}: then what stands between them counts, as in transformers, and the template runs once.

The text is then encoded whole, as transformers does. A token counts if it holds letters of a turn. A turn is over with
its end token, here <|im_end|>: a line break that the template writes behind it does not count. Whatever a message says
goes into the text as it is, so that "<|im_end|>" within one becomes the end token, also as in transformers.

A template that knows no tools writes nothing of a tool call. A chat of which something leaves no trace in the text is
therefore refused, see `check_traces`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..checks import short
from .chattemplate import ChatTemplate
from .tokenizer import Tokenizer

Message = Mapping[str, Any]
SPEAKER = "assistant"
"""The role whose turns are the model's."""


def write_chat(
    messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """Return a chat as a text, and where each of the assistant's turns begins and ends in it.

    Parameters
    ----------
    messages : sequence of mappings
        Each with "role" and "content".
    template : ChatTemplate
        The model's.
    tools : sequence, optional
        What the template is told of tools.

    Returns
    -------
    text : str
        As transformers' ``apply_chat_template(..., tokenize=False)`` writes it.
    turns : list of (int, int)
        Places of letters, the second behind the turn's last.

    Raises
    ------
    ValueError
        If the messages are none, if no turn is the assistant's or one is empty, or if the template refuses them or
        writes them otherwise once another follows, or leaves out something that they or the tools say.
    """
    text, turns, _ = _written(checked_messages(messages), template, tools)
    return text, turns


def _written(
    messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None
) -> tuple[str, list[tuple[int, int]], bool]:
    """Return a chat as a text, where each turn begins and ends in it, and whether the template itself says so."""
    text, tagged = _whole(messages, template, tools)
    turns = tagged or _by_prefixes(messages, template, tools, text)
    check_traces(messages, template, tools, text)
    return text, turns, bool(tagged)


def _by_prefixes(
    messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None, text: str
) -> list[tuple[int, int]]:
    """Return where each of the assistant's turns begins and ends in a text, from what the template writes of fewer."""
    turns = []
    for i, message in enumerate(messages):
        if message["role"] == SPEAKER:
            before = template.render(messages[:i], add_generation_prompt=True, tools=tools)
            after = _ended(messages[: i + 1], template, tools, text if i + 1 == len(messages) else None)
            for shorter, longer in ((before, after), (after, text)):
                if not longer.startswith(shorter):
                    raise ValueError(_no_prefix(i, shorter, longer))
            if before == after:
                raise ValueError(f"the chat template writes nothing of message {i + 1}, the {SPEAKER}'s")
            turns.append((len(before), len(after)))
    return turns


def _ended(messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None, text: str | None) -> str:
    """Return what a template writes up to the end of a turn.

    Some write an end of their own behind the last message, where no answer is to follow: Phi-3's writes <|endoftext|>
    behind <|end|> there. It ends the chat and no turn, so that it is left away. `text` is what it writes, where that is
    known.
    """
    after, end = text or template.render(messages, tools=tools), template.tokens.get("eos_token")
    if not end or not after.endswith(end):
        return after
    followed = template.render(messages, add_generation_prompt=True, tools=tools)
    without = after.removesuffix(end)
    return without if followed.startswith(without) and not followed.startswith(after) else after


def _whole(
    messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None
) -> tuple[str, list[tuple[int, int]]]:
    """Return what the template makes of a chat, and the turns that it marks. Some fail on a content that is null."""
    try:
        return template.render_with_turns(messages, tools=tools)
    except ValueError as error:
        empty = [i for i, message in enumerate(messages, start=1) if message.get("content") is None]
        if not empty:
            raise
        raise ValueError(f'{error}. The content of message {empty[0]} is null: many templates expect ""') from error


def _no_prefix(i: int, shorter: str, longer: str) -> str:
    """Say where a template goes back on what it wrote."""
    place = next((k for k, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(longer))
    then, now = (short(text[max(0, place - 20) : place + 40], 80) for text in (shorter, longer))
    return (
        f"the chat template writes what stands before the end of message {i + 1} in two ways: {then} and, once more "
        f"follows, {now}. So it cannot be said which tokens are the {SPEAKER}'s"
    )


def checked_messages(messages: Any) -> list[Message]:
    """Return messages, a content in parts of text as one text; refuse what is no chat, or has nothing to learn."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages is {short(messages)}, expected a list of messages")
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


def _joined(content: Any) -> Any:
    """Return a content whose parts are all texts as one text, with nothing between them; any other as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts: list[Any] = [part["text"] for part in content if isinstance(part, dict) and part.keys() == {"type", "text"}]
    whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
    whole = whole and all(part["type"] == "text" for part in content)
    return "".join(texts) if whole else content


# --- what leaves no trace -------------------------------------------------------------------------------------------


def check_traces(messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None, text: str) -> None:
    """Refuse a chat of which the template leaves something out: the model would not learn it, and nobody would notice.

    The chat is written once more without each key of a message but its role (the contents all at once, a mark in the
    place of each; one by one only those whose mark is missing), without each tool call, without a call's
    name and its arguments, and without each tool. Where the text stays the same, nothing of it is in there. A value
    that says nothing, such as null or an empty list, may be left out.

    Parameters
    ----------
    messages, template, tools
        As `write_chat` takes them.
    text : str
        What the template makes of all of them.

    Raises
    ------
    ValueError
        If something leaves no trace in the text.
    """
    seen = _contents_seen(messages, template, tools)
    for i, message in enumerate(messages):
        for what, changed in _without(message):
            if what == "content" and i in seen:
                continue
            if _same([*messages[:i], changed, *messages[i + 1 :]], template, tools, text):
                raise ValueError(_no_trace(f"{what} of message {i + 1}"))
    for i in range(len(tools or ())):
        if _same(messages, template, [*tools[:i], *tools[i + 1 :]], text):  # type: ignore[index]
            raise ValueError(_no_trace(f"tool {i + 1} of its tools"))


def _no_trace(what: str) -> str:
    return (
        f"{what} leaves no trace in what the chat template writes, so the model cannot learn it: take it out, or say "
        "it in the content"
    )


def _same(messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None, text: str) -> bool:
    """Return whether the template writes this text of a chat; one that it cannot write is another."""
    try:
        return template.render(messages, tools=tools) == text
    except ValueError:
        return False


def _contents_seen(messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None) -> set[int]:
    """Return the messages of which the content is surely in the text: one chat with a mark in each shows them."""
    marks = {i: f"<mark {i} of many>" for i, message in enumerate(messages) if message.get("content")}
    try:
        marked = [{**message, "content": marks[i]} if i in marks else message for i, message in enumerate(messages)]
        text = template.render(marked, tools=tools)
    except ValueError:
        return set()
    return {i for i, mark in marks.items() if mark in text}


def _without(message: Message) -> Iterator[tuple[str, Message]]:
    """Yield the names of what a message says, and the message without it."""
    for key, value in message.items():
        if key == "role" or value is None or value in ("", [], {}):
            continue
        if key == "content":
            if str(value).strip():
                yield key, {**message, key: ""}
            continue
        yield f"the key {short(key)}", {name: part for name, part in message.items() if name != key}
        if key == "tool_calls" and isinstance(value, list):
            yield from _without_calls(message, value)


def _without_calls(message: Message, calls: Sequence[Any]) -> Iterator[tuple[str, Message]]:
    for k, call in enumerate(calls):
        if len(calls) > 1:
            yield f"tool call {k + 1}", {**message, "tool_calls": [*calls[:k], *calls[k + 1 :]]}
        function = call.get("function", call) if isinstance(call, dict) else None
        for key in ("name", "arguments"):
            if isinstance(function, dict) and function.get(key):
                other = {**function, key: "" if isinstance(function[key], str) else {}}
                changed = {**call, "function": other} if "function" in call else other
                yield f"{key} of tool call {k + 1}", {**message, "tool_calls": [*calls[:k], changed, *calls[k + 1 :]]}


def tokens_of(part: tuple[int, int], places: Sequence[tuple[int, int]]) -> slice:
    """Return the tokens that hold letters of a part of a text.

    Parameters
    ----------
    part : (int, int)
        The letter where the part begins, and the one where it is over.
    places : sequence of (int, int)
        The same of each token, as `Tokenizer.tokens` gives them.
    """
    first = bisect_right([stop for _, stop in places], part[0])
    return slice(first, max(first, bisect_left([start for start, _ in places], part[1])))


def encode_chat(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer, tools: Sequence[Any] | None = None
) -> tuple[list[int], np.ndarray]:
    """Return the token ids of a chat, and which of them the loss counts: the assistant's turns with their end tokens.

    Parameters
    ----------
    messages, template, tools
        As `write_chat` takes them.
    tokenizer : Tokenizer
        The model's.

    Returns
    -------
    ids : list of int
        What transformers makes of the chat. There is a begin token if the template writes one, and no second.
    counted : numpy.ndarray, shape (len(ids),), bool
        Which ones count.

    Raises
    ------
    ValueError
        As `write_chat` does.
    """
    return encode_checked(checked_messages(messages), template, tokenizer, tools)


def encode_checked(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer, tools: Sequence[Any] | None = None
) -> tuple[list[int], np.ndarray]:
    """Do what `encode_chat` does with messages that `checked_messages` returned."""
    text, turns, tagged = _written(messages, template, tools)
    ids, places = tokenizer.tokens(text)
    counted = np.zeros(len(ids), bool)
    for turn in turns:
        counted[tokens_of(turn, places) if tagged else _tokens_of_turn(turn, text, ids, places, tokenizer)] = True
    return ids, counted


def _tokens_of_turn(
    turn: tuple[int, int], text: str, ids: list[int], places: Sequence[tuple[int, int]], tokenizer: Tokenizer
) -> slice:
    """Return a turn's tokens, without the blank that a template writes behind an end token."""
    start, stop = turn
    through = tokens_of((start, start + len(text[start:stop].rstrip())), places)
    ends = through.stop > through.start and is_control(ids[through.stop - 1], tokenizer)
    return through if ends else tokens_of(turn, places)


def is_control(number: int, tokenizer: Tokenizer) -> bool:
    """Return whether a token stands for no text, as <|im_end|> does."""
    return not tokenizer.decode([number]) and bool(tokenizer.spell([number]))


def encode_question(
    question: str,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    system: str | None = None,
    before: Sequence[Message] = (),
) -> tuple[list[int], frozenset[int]]:
    """Return the ids of a user's message with what lets the model answer, and the tokens that end the answer.

    The end tokens are the model's, and the one with which the template ends a turn.

    Parameters
    ----------
    question : str
        The message.
    template, tokenizer : ChatTemplate, Tokenizer
        The model's.
    system : str, optional
        A system message that stands first.
    before : sequence of mappings
        The messages of the dialogue so far.

    Raises
    ------
    ValueError
        If the template refuses a message, or writes nothing of the system's.
    """
    messages: list[Message] = [*before, {"role": "user", "content": question}]
    if system is not None:
        without, messages = messages, [{"role": "system", "content": system}, *messages]
        if template.render(without) == template.render(messages):
            raise ValueError("the chat template writes nothing of a system message: say it in the prompt")
    ids, end = tokenizer.encode(template.render(messages, add_generation_prompt=True)), set(tokenizer.end)
    try:
        answered, counted = encode_chat([*messages, {"role": SPEAKER, "content": "Yes."}], template, tokenizer)
    except ValueError:  # a template that cannot be trained with can still ask
        return ids, frozenset(end)
    last = answered[np.flatnonzero(counted)[-1]]
    return ids, frozenset(end | {last} if is_control(last, tokenizer) else end)
