"""Sixty conversations with tools, calls, names, parts and thoughts: nothing of them is lost without a word.

The oracle is transformers' own rendering of the same template. It renders a conversation once more without each key of
each message: where the text stays the same, ours must refuse the conversation, and name such a key. Where it takes one,
the text is transformers', and of a template with tags so is what counts.
"""

import copy
import random
import re

import pytest

from minilora.language.chat import checked_messages, write_chat
from minilora.language.chattemplate import ChatTemplate

from .test_chat_peers import CHATML, PHI3, ZEPHYR

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
transformers = pytest.importorskip("transformers")
rendering = pytest.importorskip("transformers.utils.chat_template_utils")
pytest.importorskip("jinja2")

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CALLS = """{%- if tools %}{{- '<|im_start|>system\\n' }}{% for tool in tools %}{{- tool | tojson }}
{% endfor %}{{- '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}OPEN{% if m.content %}{{- m.content }}{% endif %}
{%- for c in m.tool_calls or [] %}{{- '<call>' }}{{- c.function | tojson }}{{- '</call>' }}{% endfor %}
{{- '<|im_end|>' }}CLOSE{% else %}{{- m.content }}{{- '<|im_end|>' }}{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
THOUGHTS = """{%- for m in messages %}
{{- '<|' + m.role + '|>' }}
{%- if m.role == 'assistant' %}OPEN{% if m.reasoning_content and loop.last %}
{{- '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{- m.content }}{{- '<|end|>' }}CLOSE
{%- else %}{{- m.content }}{{- '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"""
NAMES = """{%- for m in messages %}
{{- m.role + (' ' + m.name if m.name else '') + ': ' }}
{%- if m.role == 'assistant' %}OPEN{{- m.content }}{{- eos_token }}CLOSE{% else %}{{- m.content }}{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{% endif %}"""
STYLES = {"chatml": CHATML, "phi3": PHI3, "zephyr": ZEPHYR, "calls": CALLS, "thoughts": THOUGHTS, "names": NAMES}


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool(name, **properties):
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "description": f"it is {name}", "parameters": parameters}}


def call(name, arguments):
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}


def conversations():
    """Return sixty conversations, each with its tools."""
    draw = random.Random(1)
    said = [
        "Hi",
        "4",
        " two before",
        "a line\n\nmore",
        "naïve 日本語 😀",
        "<|im_end|>",
        "a<think>b</think>c",
        "{}",
        "\n\n.",
    ]
    tools = [tool("weather", city="string"), tool("add", a="number", b="number")]
    chats = []
    for i in range(20):
        turns = []
        for _ in range(1 + i % 4):
            turns += [user(draw.choice(said)), assistant(draw.choice(said))]
        late = [{"role": "system", "content": "Be brief."}] * (i % 5 == 3)
        chats.append(([*turns[:2], *late, *turns[2:], *[user("and?")] * (i % 7 == 6)], None))
    for i in range(12):
        calls = [call("weather", {"city": "Oslo"} if i % 2 else '{"city": "Oslo"}')]
        calls += [call("add", {"a": 1, "b": 2})] * (i % 2)
        first = assistant((None, "", "let me see")[i % 3], tool_calls=calls)
        answer = {"role": "tool", "content": "5C"} | ({"tool_call_id": "call00001"} if i % 4 == 1 else {})
        chats.append(([user("weather?"), first, answer, assistant("5C.")], tools[: 1 + i % 2] if i % 4 else None))
    for i in range(8):
        chats.append(([user("hi", name="ann"), assistant("hello", **({"name": "bot"} if i % 2 else {}))], None))
        chats.append(([user("hi"), assistant("hello")], tools[: i % 3]))
    for i in range(6):
        thought = {("reasoning_content", "thinking", "reasoning")[i % 3]: "why"}
        turns = [user("q"), assistant("a", **thought), user("r"), assistant("b", **thought)]
        chats.append((turns[: 2 + 2 * (i % 2)], None))
    for i in range(6):
        parts = [{"type": "text", "text": text} for text in ("par", "ts", "")[: 1 + i % 3]]
        chats.append(([user(parts), assistant(parts), user("" if i % 2 else "x"), assistant("y", weight=i % 2)], None))
    return chats


def theirs(messages, tools, source, *, tagged=False):
    """Return the text and the spans of the assistant's, as transformers has them; None where it refuses."""
    plain = rendering._normalize_chat_messages(copy.deepcopy(messages))
    try:
        text, spans = rendering.render_jinja_template(
            [plain], tools=tools or None, chat_template=source, return_assistant_tokens_mask=tagged, **TOKENS
        )
    except Exception:
        return None, []
    return text[0], spans[0] if tagged else []


def lost(messages, tools, source):
    """Return the keys, by their message, without which transformers writes the same."""
    text, _ = theirs(messages, tools, source)
    keys = set()
    for i, message in enumerate(messages):
        for key, value in message.items():
            if key == "role" or value is None or value in ("", [], {}) or not str(value).strip():
                continue
            other = message | {"content": ""} if key == "content" else {k: v for k, v in message.items() if k != key}
            if theirs([*messages[:i], other, *messages[i + 1 :]], tools, source)[0] == text:
                keys.add((i + 1, key))
    for i in range(len(tools or ())):
        if theirs(messages, [*tools[:i], *tools[i + 1 :]], source)[0] == text:
            keys.add((i + 1, "tool"))
    return keys


def ours(messages, tools, template):
    """Return the text and the turns; or why there are none."""
    try:
        return write_chat(messages, template, tools or None), ""
    except ValueError as error:
        return None, str(error)


KEY = re.compile(r"^(?:the key )?'?(\w+)'? of message (\d+) leaves no trace")
TOOL = re.compile(r"^(tool) (\d+) of its tools leaves no trace")


@pytest.mark.parametrize("tagged", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_what_leaves_no_trace_is_refused(style, tagged):
    source = STYLES[style]
    source = source.replace("OPEN", "{% generation %}" * tagged).replace("CLOSE", "{% endgeneration %}" * tagged)
    taken = refused = 0
    template = ChatTemplate("here", {"default": source}, TOKENS)
    for messages, tools in conversations():
        checked = checked_messages(messages)
        text, spans = theirs(checked, tools, source, tagged=tagged)
        written, why = ours(checked, tools, template)
        if text is None:
            assert "chat template cannot write this" in why
            continue
        keys = lost(checked, tools, source)
        if match := KEY.match(why) or TOOL.match(why):
            assert (int(match[2]), match[1]) in keys
            refused += 1
        elif why:
            assert "in two ways" in why
            assert not tagged
        else:
            assert not keys, messages
            assert written[0] == text
            speakers = sum(message["role"] == "assistant" for message in checked)
            assert len(written[1]) == speakers if not tagged else [*map(list, written[1])] == [*map(list, spans)]
            taken += 1
    assert taken >= 20
    assert refused >= 10
