"""Chats as a template renders them, and the tokens in them that count."""

import json
from dataclasses import replace

import pytest

from minilora.language.chat import Dialogue, encode_chat, with_system, write_chat

from ..support.compare import refused
from ..support.letters import TOKENS, parts, spell, words

# --- templates ---


class Template:
    """A chat template made of a function of the messages; `end` or the generation prompt comes after the last turn."""

    def __init__(self, write, prompt="a:", end=""):
        self.write, self.prompt, self.end, self.tokens = write, prompt, end, {"eos_token": "<end>"}

    def render(self, messages, *, add_generation_prompt=False, tools=None):
        return self.write(messages) + (self.prompt if add_generation_prompt else self.end)

    def render_with_turns(self, messages, *, tools=None):
        return self.render(messages, tools=tools), []


def each(turn, prompt="a:", begin="", end=""):
    """Return a template that writes each turn with `turn(message, first letter of its role, content)`."""
    return Template(
        lambda messages: begin + "".join(turn(m, m["role"][0], m["content"]) for m in messages), prompt, end
    )


def calls(message, *keys):
    """Return the text for a message's tool calls, in a template that supports them."""
    return " ".join(str(call["function"][key]) for call in message.get("tool_calls") or [] for key in keys)


LINES = each(lambda m, role, said: f"{role}:{said}\n")
TURNS = each(lambda m, role, said: f"{role}:{said}<end>\n", begin="<s>")
PROMPTS = Template(TURNS.write, "a: think")
FORGETS = Template(
    lambda messages: "".join(f"{m['content']}<end>" if m is messages[-1] else m["content"] for m in messages)
)
CLOSES = each(lambda m, role, said: said, "", end=".")  # the chat, and no turn
SILENT = each(lambda m, role, said: f"{said}<end>" * (role != "a"), "")
USERS = each(lambda m, role, said: f"{role}:{said}<end>" * (role != "s"))
CALLS = each(lambda m, role, said: f"{role}:{said}{calls(m, 'name', 'arguments')}<end>\n")
NAMELESS = each(lambda m, role, said: f"{said}{'call' * ('tool_calls' in m)}<end>", "")
WORDLESS = each(lambda m, role, said: f"{said}{calls(m, 'name')}<end>", "")
REPEATED = each(lambda m, role, said: f"<{m['role']}>{said}<end>", "<assistant>")  # to which a role is a word


def rewritten(change):
    """Return a template that changes each content by a function."""
    return Template(lambda messages: TURNS.write([{**m, "content": change(m["content"])} for m in messages]))


def chat(*contents, system=None, **more):
    """Return messages with alternating roles; the last one gets the additional keys."""
    roles = ["user", "assistant"] * len(contents)
    found = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    found[-1] |= more
    return [{"role": "system", "content": system}] * (system is not None) + found


# --- what counts ---


def answer(said):
    return {"role": "assistant", "content": said}


def test_the_assistants_turns_count_with_their_end_tokens():
    for messages, expected in (
        (chat("hi", "hello"), ["hello<end>"]),
        (chat("hi", "hello", "why", "so it is"), ["hello<end>", "so it is<end>"]),
        (chat("hi", "hello", "why"), ["hello<end>"]),
        (chat("hi", "hello", system=""), ["hello<end>"]),
        (chat("hi", " hello \n", system="be kind"), [" hello \n<end>"]),
        (chat("a:b<end>\n", "c<end>\na:d"), ["c<end>\na:d<end>"]),  # as transformers: what is written is what is read
        (chat("hi", "é"), ["é<end>"]),
        ([*chat("hi", "one"), answer("two")], ["one<end>", "two<end>"]),
        ([*chat("hi"), {"role": "tool", "content": "7"}, answer("it is 7")], ["it is 7<end>"]),
        ([answer("hello"), *chat("hi")], ["hello<end>"]),
    ):
        ids, counted = encode_chat(messages, TURNS, words())
        assert (parts(ids, counted), counted.dtype) == (expected, bool)
        assert spell(ids) == TURNS.render(messages)
        assert ids.count(0) == 1  # the template's begin token, and no second


def test_a_turn_without_an_end_token_counts_to_its_end():
    """It counts from its start, even if a token spans the start."""
    plain = each(lambda m, role, said: f"{role}: {said}\n")
    assert parts(*encode_chat(chat("hi", "hello", "why", "so"), plain, words())) == [" hello\n", " so\n"]
    lines = each(lambda m, role, said: f"{role}\n{said}<end>", "a\n")
    ids, counted = encode_chat(chat("hi", "\nhello"), lines, words())
    assert TOKENS.index("\n\n") in ids
    assert parts(ids, counted) == ["\n\nhello<end>"]


def test_only_a_turns_own_end_counts():
    """As in Phi-3, the chat's own end token after the last turn belongs to no turn."""
    for turn, end in (("<end>", ""), ("<t>", "<end>")):
        template = each(lambda m, role, said, turn=turn: f"{role}:{said}{turn}", end=end)
        for turns in (1, 3):
            text, spans = write_chat(chat(*["hi", "hello"] * turns), template)
            assert [text[start:stop] for start, stop in spans] == [f"hello{turn}"] * turns
            assert text.endswith(f"hello{turn}{end}")


def test_what_a_template_marks_counts():
    """This holds even if the template drops the reasoning of earlier turns, as in transformers."""
    template, rendered = each(lambda m, role, said: said), []

    def marked(messages, tools=None):
        rendered.append(messages)
        text = template.write(messages)
        place = len(text) - len(messages[-1]["content"])
        return text, [(place + 1, len(text))]

    template.render_with_turns = marked
    template.render = lambda messages, tools=None, **_: rendered.append(messages) or template.write(messages)
    ids, counted = encode_chat(chat(*["hi", "hello<end>\n\n"] * 20), template, words())
    assert parts(ids, counted) == ["ello<end>\n\n"]  # all that stands between the tags
    assert len(rendered) == 2


# --- what is refused ---


LOWER, UPPER = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
THINKS = chat("hi hi", "<think>two\nwords</think>\nI am Lima\n.")
PICTURE = [{"type": "text", "text": "hi"}, {"type": "image"}]
NO_TEXT = [{"type": "image", "text": "hi"}]
MORE = [{"type": "text", "text": "hi", "cache": 1}]
TOOLED = [{"id": "c1", "type": "function", "function": {"name": "sun", "arguments": {"at": "oslo"}}}]
FLAT = TOOLED[0]["function"]  # as some write a call
TWO_WAYS = (
    "the chat template changes the text before the end of message 2 from {} to {} when more follows, so the "
    "assistant's tokens cannot be identified"
)
PART = "the chat template writes only part of message {}, so the model cannot learn the rest: {!r}"
IGNORED_PART = "{} is ignored by the chat template, so the model cannot learn it: remove it, or put it into the content"
REFUSED = [
    (FORGETS, chat(LOWER, 3 * UPPER, "why", "so"),
     TWO_WAYS.format(f"'{LOWER[6:]}<end>a:'", f"'{LOWER[6:]}{(3 * UPPER)[:40]}'")),
    (CLOSES, chat("hi", "hello", "why", "so"), TWO_WAYS.format("'hihello.'", "'hihellowhyso.'")),
    (PROMPTS, chat("hi", "hello"), TWO_WAYS.format(r"'<s>u:hi<end>\na: think'", r"'<s>u:hi<end>\na:hello<end>\n'")),
    (TURNS, chat("hi"), "no message is from the assistant, so there is nothing to learn; the roles are ['user']"),
    (TURNS, [], "its list of messages is empty"),
    (TURNS, chat("hi", " \n"), r"message 2, from the assistant, is empty: ' \n'"),
    (TURNS, chat("hi", None), "the content of message 2 is None, expected text"),
    *[(TURNS, chat(content, "a"), f"the content of message 1 is {content}, expected text")
      for content in ([], ["hi"], PICTURE, NO_TEXT, MORE)],
    (TURNS, [{"content": "hi"}], "message 1 is {'content': 'hi'}, expected an object with role and content"),
    (TURNS, "hi", "message 1 is 'h', expected an object with role and content"),
    (USERS, chat("hi", "hello", system="be kind"), IGNORED_PART.format("content of message 1")),
    *[(TURNS, chat("hi", "hello", **{key: value}), IGNORED_PART.format(f"the key {key!r} of message 2"))
      for key, value in {"tool_calls": TOOLED, "name": "ann", "weight": 0, "train": False}.items()],
    (NAMELESS, chat("hi", "hello", tool_calls=TOOLED), IGNORED_PART.format("name of tool call 1 of message 2")),
    (NAMELESS, chat("hi", "hello", tool_calls=TOOLED * 2), IGNORED_PART.format("name of tool call 1 of message 2")),
    (WORDLESS, chat("hi", "hello", tool_calls=TOOLED), IGNORED_PART.format("arguments of tool call 1 of message 2")),
    (NAMELESS, chat("hi", "hello", tool_calls=[FLAT]), IGNORED_PART.format("name of tool call 1 of message 2")),
    (CALLS, chat("hi", "hello", tool_calls=TOOLED, tool_call_id="c1"),
     IGNORED_PART.format("the key 'tool_call_id' of message 2")),
    (rewritten(lambda said: said.split("</think>")[-1]), THINKS, PART.format(2, THINKS[1]["content"])),
    (rewritten(lambda said: said[:10]), THINKS, PART.format(2, THINKS[1]["content"])),
    (rewritten(lambda said: said.splitlines()[0]), THINKS, PART.format(2, THINKS[1]["content"])),
    (rewritten(lambda said: said[3:]), THINKS, PART.format(1, "hi hi")),
    (REPEATED, [{"role": "human", "content": "human?"}, *chat("hi", "yes")[1:]],
     "the role of message 1 is 'human', which the chat template merely copies, expected one of system, user, "
     """assistant, tool, developer: jq -c '.messages[].role |= ({"human": "user"}[.] // .)' renames roles"""),
]  # fmt: skip


@pytest.mark.parametrize(("template", "messages", "message"), REFUSED)
def test_a_chat_that_cannot_be_learned_whole_is_refused(template, messages, message):
    with refused(message, ValueError):
        write_chat(messages, template)


def test_tools_that_the_template_ignores_are_refused():
    with refused(IGNORED_PART.format("tool 1 of its tools"), ValueError):
        write_chat(chat("hi", "hello"), TURNS, [{"name": "sun"}])


# --- what is not ---


def named(message, role, said):
    """Render like a template that has its own name for a role."""
    return f"<{ {'human': 'user'}.get(message['role'], message['role']) }>{said}<end>"


def first_system(messages):
    """Render like a template with a default system message."""
    first, *others = messages if messages[0]["role"] == "system" else [{"content": ""}, *messages]
    return f"{first['content'] or 'be kind'}<end>" + TURNS.write(others)


def test_a_template_may_write_a_chat_in_its_own_way():
    for template, messages in (
        (TURNS, chat("hi", "hello", tool_calls=[], name=None, refusal="")),
        (CALLS, chat("hi", "hello", tool_calls=TOOLED)),
        (CALLS, chat("hi", "", tool_calls=TOOLED)),
        (USERS, chat("hi", "hello", system="")),
        *[(rewritten(change), chat("hi", " two\nlines, é "))
          for change in (str.strip, str.upper, lambda c: json.dumps(c)[1:-1], lambda c: f"{c.rstrip()} ",
                         lambda c: json.dumps(c, ensure_ascii=False)[1:-1])],
        (each(named, "<assistant>"), [{"role": "human", "content": "human?"}, *chat("hi", "yes")[1:]]),
        *[(REPEATED, [{"role": role, "content": "be kind"}, *chat("hi", "hello")])
          for role in ("system", "developer", "tool")],
        (Template(first_system), chat("hi", "hello", system="be kind")),
    ):  # fmt: skip
        assert write_chat(messages, template)[0] == template.render(messages)


def test_text_parts_are_joined_without_a_separator():
    parted = chat([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}], [{"type": "text", "text": "hello"}])
    assert write_chat(parted, TURNS) == write_chat(chat("hi", "hello"), TURNS)


# --- what it costs, and a question ---


def test_finding_contents_takes_one_more_rendering():
    rendered, texts, found = [], [], words()
    template = Template(lambda messages: rendered.append(messages) or TURNS.write(messages))
    counting = replace(found, tokens=lambda text: texts.append(text) or found.tokens(text), encode=None)
    ids, counted = encode_chat(chat(*["hi", "hello"] * 20), template, counting)
    assert len(rendered) == 1 + 2 * 20 + 1
    assert (len(texts), len(ids)) == (1, len(counted))  # and it is encoded once


def test_a_question_ends_with_the_generation_prompt():
    prompt = Dialogue(TURNS, words(last=())).ask("hi")
    assert spell(prompt.ids) == "<s>u:hi<end>\na:"
    assert prompt.end == {1}  # the end of a turn, though the model names no end
    assert Dialogue(SILENT, words(last=(5,))).ask("hi").end == {5}
    assert Dialogue(LINES, words(last=(5,))).ask("hi").end == {5}  # no letter ends a turn, such as the one before \n
    with pytest.raises(ValueError, match="the chat template ignores the system message"):
        Dialogue(USERS, words(), with_system([], "be kind")).ask("hi")


def test_after_an_empty_answer_the_next_ends_as_before():
    dialogue = Dialogue(TURNS, words(last=()))
    dialogue.ask("hi")
    dialogue.answered("")
    prompt = dialogue.ask("why")
    assert (spell(prompt.ids), prompt.end) == ("<s>u:hi<end>\na:<end>\nu:why<end>\na:", {1})


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_chats_own_system_message_stays_the_only_one(role):
    own = [{"role": role, "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert with_system(own, "be kind") == own
    for others in (own[1:], own[::-1]):  # also where it comes later
        assert with_system(others, "be kind") == [{"role": "system", "content": "be kind"}, *others]
