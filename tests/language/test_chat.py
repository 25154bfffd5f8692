"""A chat as the model's template writes it, and the tokens in it that count."""

import json
from dataclasses import replace
from typing import ClassVar

import pytest

from minilora.language.chat import Dialogue, encode_chat, with_system, write_chat
from minilora.language.chattemplate import ChatTemplate

from ..support.letters import TOKENS, parts, spell, words


class Template:
    """A chat template, as a function."""

    tokens: ClassVar = {}

    def __init__(self, write, prompt="a:"):
        self.write, self.prompt = write, prompt

    def render(self, messages, *, add_generation_prompt=False, tools=None):
        return self.write(messages) + self.prompt * add_generation_prompt

    def render_with_turns(self, messages, *, tools=None):
        return self.render(messages, tools=tools), []


TURNS = Template(lambda messages: "<s>" + "".join(f"{m['role'][0]}:{m['content']}<end>\n" for m in messages))

LINES = Template(lambda messages: "".join(f"{m['role'][0]}:{m['content']}\n" for m in messages))


def chat(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    found = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}] * (system is not None) + found


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (chat("hi", "hello"), ["hello<end>"]),
        (chat("hi", "hello", "why", "so it is"), ["hello<end>", "so it is<end>"]),
        (chat("hi", "hello", "why"), ["hello<end>"]),
        (chat("hi", "hello", system=""), ["hello<end>"]),
        (chat("hi", " hello \n", system="be kind"), [" hello \n<end>"]),
        (chat("a:b<end>\n", "c<end>\na:d"), ["c<end>\na:d<end>"]),  # as transformers: what is written is what is read
        (chat("hi", "é"), ["é<end>"]),
        ([*chat("hi", "one"), {"role": "assistant", "content": "two"}], ["one<end>", "two<end>"]),
        (
            [*chat("hi"), {"role": "tool", "content": "7"}, {"role": "assistant", "content": "it is 7"}],
            ["it is 7<end>"],
        ),
        ([{"role": "assistant", "content": "hello"}, *chat("hi")], ["hello<end>"]),
    ],
)
def test_the_assistants_turns_count_with_their_end_tokens(messages, expected):
    ids, counted = encode_chat(messages, TURNS, words())
    assert parts(ids, counted) == expected
    assert spell(ids) == TURNS.render(messages)
    assert ids.count(0) == 1  # the template's begin token, and no second


def test_a_turn_without_an_end_token_counts_to_its_end():
    plain = Template(lambda messages: "".join(f"{m['role'][0]}: {m['content']}\n" for m in messages), "a:")
    assert parts(*encode_chat(chat("hi", "hello", "why", "so"), plain, words())) == [" hello\n", " so\n"]


def test_a_token_across_a_turns_beginning_counts():
    lines = Template(lambda messages: "".join(f"{m['role'][0]}\n{m['content']}<end>" for m in messages), "a\n")
    ids, counted = encode_chat(chat("hi", "\nhello"), lines, words())
    assert TOKENS.index("\n\n") in ids
    assert parts(ids, counted) == ["\n\nhello<end>"]


FORGETS = Template(
    lambda messages: "".join(f"{m['content']}<end>" if m is messages[-1] else m["content"] for m in messages)
)


PROMPTS = Template(TURNS.write, "a: think")


LOWER, UPPER = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SILENT = Template(lambda messages: "".join(f"{m['content']}<end>" for m in messages if m["role"] != "assistant"), "")


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (
            chat(LOWER, 3 * UPPER, "why", "so"),
            FORGETS,
            f"writes what stands before the end of message 2 in two ways: '{LOWER[6:]}<end>a:' and, once more follows, "
            f"'{LOWER[6:]}{(3 * UPPER)[:40]}'. So it cannot be said which tokens are the assistant's",
        ),
        (chat("hi", "hello"), PROMPTS, "of message 2 in two ways: .*a: think' and, once more follows, .*a:hello<end>"),
        (chat("hi", "hello"), SILENT, "writes nothing of message 2, the assistant's"),
        (chat("hi"), TURNS, "no message is the assistant's: there is nothing to learn"),
        (chat("hi", " \n"), TURNS, r"message 2 is an empty answer of the assistant's: ' \\n'"),
        (chat("hi", None), TURNS, "the content of message 2 is None, expected a text"),
        (chat(["hi"], "a"), TURNS, r"the content of message 1 is \['hi'\], expected a text"),
        (chat([{"type": "text", "text": "hi"}, {"type": "image"}], "a"), TURNS, "the content of message 1 is .*image"),
        (chat([{"type": "image", "text": "hi"}], "a"), TURNS, "the content of message 1 is .*image"),
        (
            chat([{"type": "text", "text": "hi", "cache": 1}], "a"),
            TURNS,
            "the content of message 1 is .*expected a text",
        ),
        ([{"content": "hi"}], TURNS, "message 1 is {'content': 'hi'}, expected an object with role and content"),
        ([], TURNS, r"no message is the assistant's: there is nothing to learn. The roles are \[\]"),
        ("hi", TURNS, "message 1 is 'h', expected an object with role and content"),
    ],
)
def test_a_chat_whose_turns_cannot_be_told_is_refused(messages, template, message):
    with pytest.raises(ValueError, match=message):
        write_chat(messages, template)


def test_parts_that_are_texts_are_joined_with_nothing_between():
    parted = chat([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}], [{"type": "text", "text": "hello"}])
    assert write_chat(parted, TURNS) == write_chat(chat("hi", "hello"), TURNS)


def of_call(message):
    """What a template that knows tool calls writes of one."""
    return "".join(
        f"call {c['function']['name']} {c['function']['arguments']}" for c in message.get("tool_calls") or []
    )


CALLS = Template(lambda messages: "".join(f"{m['role'][0]}:{m['content']}{of_call(m)}<end>\n" for m in messages))
NAMELESS = Template(
    lambda messages: "".join(f"{m['content']}{'call' * ('tool_calls' in m)}<end>" for m in messages), ""
)
WORDLESS = Template(
    lambda messages: "".join(
        m["content"] + "".join(c["function"]["name"] for c in m.get("tool_calls", ())) + "<end>" for m in messages
    ),
    "",
)
USERS = Template(
    lambda messages: "".join(f"{m['role'][0]}:{m['content']}<end>" for m in messages if m["role"] != "system")
)
TOOLED = [{"id": "c1", "type": "function", "function": {"name": "sun", "arguments": {"at": "oslo"}}}]


@pytest.mark.parametrize(
    ("template", "more", "tools", "message"),
    [
        (TURNS, {"tool_calls": TOOLED}, None, "the key 'tool_calls' of message 2 leaves no trace"),
        (TURNS, {"name": "ann"}, None, "the key 'name' of message 2 leaves no trace"),
        (TURNS, {"weight": 0}, None, "the key 'weight' of message 2 leaves no trace"),
        (TURNS, {"train": False}, None, "the key 'train' of message 2 leaves no trace"),
        (NAMELESS, {"tool_calls": TOOLED}, None, "name of tool call 1 of message 2 leaves no trace"),
        (NAMELESS, {"tool_calls": TOOLED * 2}, None, "name of tool call 1 of message 2 leaves no trace"),
        (WORDLESS, {"tool_calls": TOOLED}, None, "arguments of tool call 1 of message 2 leaves no trace"),
        (TURNS, {}, [{"name": "sun"}], "tool 1 of its tools leaves no trace"),
        (TURNS, {"tool_calls": [], "name": None, "refusal": ""}, None, None),
        (CALLS, {"tool_calls": TOOLED}, None, None),
        (CALLS, {"tool_calls": TOOLED, "tool_call_id": "c1"}, None,
         "the key 'tool_call_id' of message 2 leaves no tra"),
    ],
)  # fmt: skip
def test_what_leaves_no_trace_is_refused_by_its_key(template, more, tools, message):
    messages = chat("hi", "hello")
    messages[1] |= more
    if message is None:
        assert write_chat(messages, template, tools)[0] == template.render(messages)
    else:
        with pytest.raises(ValueError, match=f"^{message}"):
            write_chat(messages, template, tools)


def test_a_message_that_a_template_passes_over_is_refused():
    with pytest.raises(ValueError, match=r"^content of message 1 leaves no trace in what the chat template writes"):
        write_chat(chat("hi", "hello", system="be kind"), USERS)
    assert write_chat(chat("hi", "hello", system=""), USERS)


@pytest.mark.parametrize(
    "cut", [lambda c: c.split("</think>")[-1], lambda c: c[:10], lambda c: c.splitlines()[0], lambda c: c[3:]]
)
def test_a_template_that_cuts_a_part_of_a_message_is_refused(cut):
    template = Template(lambda messages: TURNS.write([{**m, "content": cut(m["content"])} for m in messages]))
    with pytest.raises(
        ValueError, match=r"^the chat template writes a part of message [12] only, so the model cannot learn"
    ):
        write_chat(chat("hi hi", "<think>two\nwords</think>\nI am Lima\n."), template)


@pytest.mark.parametrize("changed", [str.strip, str.upper, lambda c: json.dumps(c)[1:-1], lambda c: f"{c.rstrip()} "])
def test_a_template_may_write_contents_otherwise(changed):
    template = Template(lambda messages: TURNS.write([{**m, "content": changed(m["content"])} for m in messages]))
    assert write_chat(chat("hi", " two\nlines "), template)


def repeated(messages):
    """As a template to which a role is a word."""
    return "".join(f"<{m['role']}>{m['content']}<end>" for m in messages)


def named(messages):
    """As a template that has its own name for a role."""
    return repeated([{**m, "role": {"human": "user"}.get(m["role"], m["role"])} for m in messages])


def test_a_role_that_is_merely_repeated_is_refused():
    messages = [{"role": "human", "content": "human?"}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(
        ValueError, match=r"^the role of message 1 is 'human', which the chat template merely repeats, exp"
    ):
        write_chat(messages, Template(repeated, "<assistant>"))
    assert write_chat(messages, Template(named, "<assistant>"))
    for role in ("system", "developer", "tool"):
        assert write_chat(
            [{"role": role, "content": "be kind"}, *chat("hi", "hello")], Template(repeated, "<assistant>")
        )


def test_a_system_message_may_be_the_template_s_own():
    def write(messages):
        first, *others = messages if messages[0]["role"] == "system" else [{"content": ""}, *messages]
        return f"{first['content'] or 'be kind'}<end>" + TURNS.write(others)

    text, _ = write_chat(chat("hi", "hello", system="be kind"), Template(write))
    assert text == write(chat("hi", "hello"))


def test_traces_of_contents_cost_one_more_chat():
    rendered = []
    template = Template(lambda messages: rendered.append(messages) or TURNS.write(messages))
    write_chat(chat(*["hi", "hello"] * 20), template)
    assert len(rendered) == 1 + 2 * 20 + 1


def ending(messages, add_generation_prompt, end="<end>"):
    """As Phi-3's: an end token of the chat stands behind that of its last turn, where no answer follows."""
    text = "".join(f"{m['role'][0]}:{m['content']}<t>" for m in messages)
    return text + ("a:" if add_generation_prompt else end)


@pytest.mark.parametrize("turns", [1, 3])
def test_an_end_behind_the_last_turn_belongs_to_none(turns):
    template = Template(None)
    template.tokens = {"eos_token": "<end>"}
    template.render = lambda messages, add_generation_prompt=False, tools=None: ending(messages, add_generation_prompt)
    text, spans = write_chat(chat(*["hi", "hello"] * turns), template)
    assert [text[start:stop] for start, stop in spans] == ["hello<t>"] * turns
    assert text.endswith("hello<t><end>")


def test_an_end_that_is_a_turn_s_own_counts():
    template = Template(lambda messages: "".join(f"{m['role'][0]}:{m['content']}<end>" for m in messages))
    template.tokens = {"eos_token": "<end>"}
    text, spans = write_chat(chat("hi", "hello", "why", "so"), template)
    assert [text[start:stop] for start, stop in spans] == ["hello<end>", "so<end>"]


def test_what_a_template_marks_counts():
    """Also where it takes back what the model thought before: transformers counts it so."""
    template, rendered = Template(lambda messages: "".join(m["content"] for m in messages)), []

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


def test_a_chat_is_encoded_once():
    texts = []
    found = words()
    counting = replace(found, tokens=lambda text: texts.append(text) or found.tokens(text), encode=None)
    ids, counted = encode_chat(chat("hi", "hello", "why", "so"), TURNS, counting)
    assert (len(texts), len(ids)) == (1, len(counted))


def test_a_question_ends_with_what_lets_the_model_answer():
    prompt = Dialogue(TURNS, words(last=())).ask("hi")
    assert spell(prompt.ids) == "<s>u:hi<end>\na:"
    assert prompt.end == {1}  # the end of a turn, though the model names no end
    assert Dialogue(SILENT, words(last=(5,))).ask("hi").end == {5}
    assert Dialogue(LINES, words(last=(5,))).ask("hi").end == {5}  # no letter ends a turn, such as the one before \n
    with pytest.raises(ValueError, match="the chat template writes nothing of a system message"):
        Dialogue(USERS, words(), with_system([], "be kind")).ask("hi")


STYLES = {
    "ChatML": """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}OPEN{{ m.content }}<|im_end|>CLOSE{% else %}{{ m.content }}<|im_end|>{% endif %}
{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "Phi-3": """{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>
{% if m.role == 'assistant' %}OPEN{{ m.content }}<|end|>CLOSE{% else %}{{ m.content }}<|end|>{% endif %}
{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "Mistral": """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'assistant' %}OPEN{{ m.content }}{{ eos_token }}CLOSE
{%- else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}""",
}
SAID = ["Hi", " two before", "two behind  ", "a line\n\nmore\n", "naïve 日本 😀", "<|im_end|>", "\ue000\ue001"]


@pytest.mark.parametrize("style", STYLES)
def test_tags_and_prefixes_find_the_same_turns(style):
    pytest.importorskip("jinja2", reason="pip install -e '.[models]'")
    tokens, source = {"bos_token": "<s>", "eos_token": "</s>"}, STYLES[style]
    marked = source.replace("OPEN", "{% generation %}").replace("CLOSE", "{% endgeneration %}")
    tagged = ChatTemplate("here", {"default": marked}, tokens)
    plain = ChatTemplate("here", {"default": source.replace("OPEN", "").replace("CLOSE", "")}, tokens)
    for i, said in enumerate(SAID):
        text, turns = write_chat(chat(*[said, SAID[i - 1]] * 3), tagged)
        without, found = write_chat(chat(*[said, SAID[i - 1]] * 3), plain)
        assert without == text
        assert [text[start:stop] for start, stop in turns] == [text[start:stop].rstrip() for start, stop in found]
