r"""Chats as the text that a model reads, with the spans of the assistant's turns in it.

Let T(m_1 ... m_n) be the text that the model's chat template renders for n messages, and G the generation prompt, after
which the model answers. If m_i is from the assistant, its turn begins at the end of T(m_1 ... m_i-1) G and ends at the
end of T(m_1 ... m_i):

    T(m_1 ... m_i-1) G   <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n
    T(m_1 ... m_i)       <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n
    T(m_1 ... m_n)       <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>...
    the turn                                                                    Hello.<|im_end|>

Each of these texts must be a prefix of the next. Some templates write a message differently once another one follows,
or drop the model's reasoning from earlier turns; then the training text is not what the model sees when it answers.
Such a chat is refused, unless the template itself marks the assistant's turns with the tags {% generation %} and
{% endgeneration %}. In that case the text between the tags counts, as in transformers.

The text is encoded as a whole, as in transformers. A token counts if any of its characters is in a turn. A turn ends
with its end token, here <|im_end|>; a line break that the template writes after it does not count. The content of a
message is copied verbatim, so "<|im_end|>" in a message becomes the end token, also as in transformers.

A template that does not support tools silently ignores tool calls. A chat is therefore refused if any part of it has no
effect on the text.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..texts import short
from .files.chattemplate import ChatTemplate, Message
from .files.tokens import Tokenizer

Span = tuple[int, int]
"""A part of a text, as the index of its first character and the index after its last one."""
SPEAKER = "assistant"
"""The role of the model itself: only its turns count."""
ANSWER = {"role": SPEAKER, "content": "Yes."}
"""A placeholder answer."""
SYSTEM = ("system", "developer")
"""The roles of a message that instructs the model."""
ROLES, UNKNOWN = ("system", "user", "assistant", "tool", "developer"), "nobody-s-role"
"""The known roles, and one that no model knows."""
CALL_KEYS = ("id", "type", "index")
"""The keys of a tool call that only link it to other messages."""


def encode_chat(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer, tools: Sequence[Any] | None = None
) -> tuple[list[int], np.ndarray]:
    """Return the token ids of a chat, as in transformers, and which of them count as the assistant's, (n,) bool.

    Pass the messages through `checked_messages` first.
    """
    text, turns, tagged = _render(messages, template, tools)
    ids, places = tokenizer.tokens(text)
    counted = np.zeros(len(ids), bool)
    for start, stop in turns:
        tokens = tokens_of((start, stop), places)
        if not tagged:  # drop the whitespace that a template writes after an end token
            trimmed = tokens_of((start, start + len(text[start:stop].rstrip())), places)
            if trimmed.stop > trimmed.start and is_control(ids[trimmed.stop - 1], tokenizer):
                tokens = trimmed
        counted[tokens] = True
    return ids, counted


def write_chat(
    messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None = None
) -> tuple[str, list[Span]]:
    """Return a chat as transformers renders it, and the spans of the assistant's turns."""
    return _render(checked_messages(messages), template, tools)[:2]


def checked_messages(messages: Any) -> list[Message]:
    """Check that a chat contains something to learn, and return it with each content as a single text."""
    checked: list[Message] = []
    for i, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {i} is {short(message)}, expected an object with role and content")
        content, calls = _joined(message.get("content")), message.get("tool_calls")
        if not isinstance(content, str) and not (content is None and calls):
            raise ValueError(f"the content of message {i} is {short(content)}, expected text")
        if message["role"] == SPEAKER and not calls and not str(content).strip():
            raise ValueError(f"message {i}, from the {SPEAKER}, is empty: {short(content)}")
        checked.append({**message, "content": content} if "content" in message else message)
    if not checked:
        raise ValueError("its list of messages is empty")
    roles = sorted({message["role"] for message in checked})
    if SPEAKER not in roles:
        raise ValueError(
            f"no message is from the {SPEAKER}, so there is nothing to learn; the roles are {short(roles)}"
        )
    return checked


def system_of(messages: Sequence[Message]) -> str | None:
    """Return the system message at the start of a chat; None if there is none or it is empty."""
    first = messages[0] if messages else {}
    content = _joined(first.get("content")) if first.get("role") == SYSTEM[0] else None
    return content if isinstance(content, str) and content.strip() else None


def with_system(messages: Sequence[Message], system: str | None) -> list[Any]:
    """Return the chat, with this system message in front if it has none of its own."""
    own = bool(messages) and messages[0].get("role") in SYSTEM
    return [*messages] if own or not system else [{"role": SYSTEM[0], "content": system}, *messages]


def _joined(content: Any) -> Any:
    """Join the parts of a content without a separator if all of them are text; return any other content unchanged."""
    if isinstance(content, list) and content and all(map(_is_text, content)):
        return "".join(part["text"] for part in content)
    return content


def _is_text(part: Any) -> bool:
    """Return whether a part of a content is text and has no other keys."""
    known = isinstance(part, dict) and part.keys() == {"type", "text"}
    return known and part["type"] == "text" and isinstance(part["text"], str)


# --- the turns ------------------------------------------------------------------------------------------------------


def _render(
    messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None
) -> tuple[str, list[Span], bool]:
    """Return a chat's text, the spans of the assistant's turns in it, and whether the template itself marks them."""
    text, tagged = template.render_with_turns(messages, tools=tools)
    _check_roles(messages, template, tools, text)
    turns = tagged or _by_prefixes(messages, template, tools, text)
    _check_effects(messages, template, tools, text)
    return text, turns, bool(tagged)


def _by_prefixes(
    messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None, text: str
) -> list[Span]:
    """Return the spans of the assistant's turns, found by rendering the chat up to each of them."""
    turns = []
    for i, message in enumerate(messages):
        if message["role"] == SPEAKER:
            before = template.render(messages[:i], add_generation_prompt=True, tools=tools)
            after = _up_to_turn_end(messages[: i + 1], template, tools)
            for shorter, longer in ((before, after), (after, text)):
                if not longer.startswith(shorter):
                    raise ValueError(_changed_text(i, shorter, longer))
            turns.append((len(before), len(after)))
    return turns


def _up_to_turn_end(messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None) -> str:
    """Return the text of a chat up to the end of its last turn."""
    # If no answer follows, Phi-3's template writes <|endoftext|> after <|end|>: it ends the chat, not the turn.
    after, end = template.render(messages, tools=tools), template.tokens.get("eos_token")
    if not end or not after.endswith(end):
        return after
    followed = template.render(messages, add_generation_prompt=True, tools=tools)
    without = after.removesuffix(end)
    return without if followed.startswith(without) and not followed.startswith(after) else after


def _changed_text(i: int, shorter: str, longer: str) -> str:
    """Return an error message that shows where a template changes text that it wrote for fewer messages."""
    place = next((k for k, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(longer))
    then, now = (short(text[max(0, place - 20) : place + 40], 80) for text in (shorter, longer))
    return (
        f"the chat template changes the text before the end of message {i + 1} from {then} to {now} when more follows, "
        f"so the {SPEAKER}'s tokens cannot be identified"
    )


def tokens_of(part: Span, places: Sequence[Span]) -> slice:
    """Return the tokens that overlap a span; `places` are the spans of all tokens, see `Tokenizer.tokens`."""
    first = bisect_right([stop for _, stop in places], part[0])
    return slice(first, max(first, bisect_left([start for start, _ in places], part[1])))


def is_control(number: int, tokenizer: Tokenizer) -> bool:
    """Return whether a token is a control token without text, such as <|im_end|>."""
    return not tokenizer.decode([number]) and bool(tokenizer.spell([number]))


def _check_roles(messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None, text: str) -> None:
    """Require known roles if the template copies any word as a role, since a model knows only those."""
    for i, message in enumerate(messages):
        if message["role"] not in ROLES:
            other = [*messages[:i], {**message, "role": UNKNOWN}, *messages[i + 1 :]]
            if (_render_or_none(other, template, tools) or "").replace(UNKNOWN, message["role"]) == text:
                raise ValueError(
                    f"the role of message {i + 1} is {short(message['role'])}, which the chat template merely copies, "
                    f'expected one of {", ".join(ROLES)}: jq -c \'.messages[].role |= ({{"human": "user"}}[.] // .)\' '
                    "renames roles"
                )


# --- parts without an effect ------------------------------------------------------------------------------------------


def _check_effects(messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None, text: str) -> None:
    """Require that removing any part of a chat changes the text; otherwise the model could not learn that part."""
    # Removing a system message changes nothing if it equals the template's default, so contents are found by markers.
    seen = _contents_seen(messages, template, tools)
    for i, message in enumerate(messages):
        for what, changed in _without_each(message):
            if what == "content" and i in seen:
                continue
            if _render_or_none([*messages[:i], changed, *messages[i + 1 :]], template, tools) == text:
                raise ValueError(_no_effect(f"{what} of message {i + 1}"))
        if message["role"] != "tool" and not _appears_in(str(message.get("content") or ""), text):
            raise ValueError(
                f"the chat template writes only part of message {i + 1}, so the model cannot learn the rest: "
                f"{short(message['content'])}"
            )
    for i in range(len(tools or ())):
        if _render_or_none(messages, template, [*tools[:i], *tools[i + 1 :]]) == text:  # type: ignore[index]
            raise ValueError(_no_effect(f"tool {i + 1} of its tools"))


def _appears_in(content: str, text: str) -> bool:
    """Return whether a text contains a content or its JSON, ignoring surrounding whitespace and case."""
    content, text = content.strip().casefold(), text.casefold()
    return content in text or json.dumps(content)[1:-1] in text or json.dumps(content, ensure_ascii=False)[1:-1] in text


def _no_effect(what: str) -> str:
    """Return an error message about a part of a chat that the template ignores."""
    return (
        f"{what} is ignored by the chat template, so the model cannot learn it: remove it, or put it into the content"
    )


def _contents_seen(messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None) -> set[int]:
    """Return the indices of messages whose content is written, found by replacing each content with a marker."""
    marks = {i: f"<mark {i} of many>" for i, message in enumerate(messages) if message.get("content")}
    marked = [{**message, "content": marks[i]} if i in marks else message for i, message in enumerate(messages)]
    text = _render_or_none(marked, template, tools) or ""
    return {i for i, mark in marks.items() if mark in text}


def _render_or_none(messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Any] | None) -> str | None:
    """Return the text of a chat, or None if the template refuses it."""
    try:
        return template.render(messages, tools=tools)
    except ValueError:
        return None


def _without_each(message: Message) -> Iterator[tuple[str, Message]]:
    """Yield the name of each non-empty part of a message, with the message without that part."""
    for key, value in message.items():
        if key == "role" or value is None or not str(value).strip() or value in ([], {}):
            continue
        if key == "content":
            yield key, {**message, key: ""}
        else:
            yield f"the key {short(key)}", {name: part for name, part in message.items() if name != key}
    calls = message["tool_calls"] if isinstance(message.get("tool_calls"), list) else []
    for k, call in enumerate(calls):
        function: Any = call.get("function", call) if isinstance(call, dict) else None
        for key, value in function.items() if isinstance(function, dict) else ():
            if value and key not in CALL_KEYS:
                other = {**function, key: type(value)()}
                changed = {**call, "function": other} if "function" in call else other
                yield f"{key} of tool call {k + 1}", {**message, "tool_calls": [*calls[:k], changed, *calls[k + 1 :]]}


# --- prompts and dialogues ----------------------------------------------------------------------------------------


def encode_answering(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer, tools: Sequence[Any] | None = None
) -> tuple[list[int], frozenset[int]]:
    """Return the ids of a chat with the generation prompt, and the ids that end the answer."""
    text, end = template.render(messages, add_generation_prompt=True, tools=tools), set(tokenizer.end)
    ids = tokenizer.encode(text)
    try:
        answered, counted = encode_chat([*messages, ANSWER], template, tokenizer, tools)
    except ValueError:  # a template that is unusable for training may be usable here
        return ids, frozenset(end)
    last = answered[np.flatnonzero(counted)[-1]]
    return ids, frozenset(end | {last} if is_control(last, tokenizer) else end)


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what to show and when to stop."""

    ids: Sequence[int]  # the ids that the model reads
    text: str  # the text to show before the continuation
    text_ids: Sequence[int]  # the ids of this text
    end: Collection[int]  # the ids that end the continuation


def read_prompt(text: str, tokenizer: Tokenizer) -> Prompt:
    """Return the prompt for a text to continue."""
    ids = tokenizer.encode(text)
    return Prompt([*tokenizer.begin, *ids], text, ids, tokenizer.end)


def read_chat(
    messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer, tools: Sequence[Any] | None = None
) -> Prompt:
    """Return the prompt for the model to answer a chat. If the chat ends with an answer, that is dropped first."""
    asked = messages[:-1] if messages and messages[-1].get("role") == SPEAKER else messages
    asked = checked_messages([*asked, ANSWER])[:-1]
    if not asked:
        raise ValueError("there is no message to answer")
    if tools and template.render(asked, tools=tools) == template.render(asked):
        raise ValueError("the chat template ignores its tools: describe them in a message")
    ids, end = encode_answering(asked, template, tokenizer, tools or None)
    return Prompt(ids, "", [], end)


@dataclass
class Dialogue:
    """An interactive chat: the model reads each question after the conversation so far."""

    template: ChatTemplate
    tokenizer: Tokenizer
    messages: list[Message] = field(default_factory=list)  # so far, possibly with a system message first

    def ask(self, question: str) -> Prompt:
        """Append a question to the conversation, and return the prompt for the model to answer it."""
        asked = [*self.messages, {"role": "user", "content": question}]
        if asked[0]["role"] == SYSTEM[0] and self.template.render(asked[1:]) == self.template.render(asked):
            raise ValueError("the chat template ignores the system message: put it into the prompt")
        ids, end = encode_answering(asked, self.template, self.tokenizer)
        self.messages = asked
        return Prompt(ids, "", [], end)

    def answered(self, answer: str) -> None:
        """Append the model's answer to the conversation."""
        self.messages.append({"role": SPEAKER, "content": answer})
