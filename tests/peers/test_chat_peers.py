"""Which tokens of a chat count, and that nothing of a conversation is lost without a word.

Two oracles say what counts in sixty chats under nine templates that models have. One is transformers'
``apply_chat_template(..., return_assistant_tokens_mask=True)`` of the same template with ``{% generation %}`` around
what the assistant says and its end token. The other renders and encodes prefixes, and puts -100 on all that stands
before a turn.

Of sixty conversations with tools, calls, names, parts and thoughts the oracle is transformers' rendering too. It
renders one once more without each key of each message: where the text stays the same, ours must refuse the
conversation, and name such a key. Where ours takes one, the text is transformers', and of a template with tags so is
what counts.
"""

import copy
import json
import random
import re

import numpy as np
import pytest

from minilora import Llama, cross_entropy, evaluate
from minilora.language.chat import Dialogue, checked_messages, encode_chat, write_chat
from minilora.language.data import encode_example, load_data
from minilora.language.files.chattemplate import ChatTemplate, load_template
from minilora.language.files.tokens import load_tokenizer
from minilora.language.text import HELD_OUT
from minilora.losses import IGNORE_INDEX
from minilora.texts import FileRefused

from ..support.peers import PEERS, torch, transformers
from ..support.tiny_peers import llama

pytestmark = PEERS
rendering = pytest.importorskip("transformers.utils.chat_template_utils")
pytest.importorskip("jinja2")

# Each as models have it, with the tags around what the assistant says: a template is this without the tags.
OPEN, CLOSE = "{% generation %}", "{% endgeneration %}"
CHATML = """{%- for m in messages %}
{{- '<|im_start|>' + m['role'] + '\\n' }}
{%- if m['role'] == 'assistant' %}OPEN{{- m['content'] + '<|im_end|>' }}CLOSE
{%- else %}{{- m['content'] + '<|im_end|>' }}{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
DEFAULT_SYSTEM = "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\n{}<|im_end|>\\n' }}{% endif %}\n"
SMOLLM2 = DEFAULT_SYSTEM.replace("{}", "You are a helpful AI assistant named SmolLM, trained by Hugging Face") + CHATML
QWEN2 = DEFAULT_SYSTEM.replace("{}", "You are a helpful assistant.") + CHATML
LLAMA3 = """{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}
{%- if m['role'] == 'assistant' %}OPEN{{- (m['content'] | trim) + '<|eot_id|>' }}CLOSE
{%- else %}{{- (m['content'] | trim) + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
LLAMA2 = """{%- if messages[0]['role'] == 'system' %}
{%- set rest = messages[1:] %}{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{%- else %}{% set rest = messages %}{% set system = '' %}{% endif %}
{%- for m in rest %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{% endif %}
{%- if m['role'] == 'user' %}
{{- bos_token + '[INST] ' + (system if loop.first else '') + m['content'] | trim + ' [/INST]' }}
{%- else %}OPEN{{- ' ' + m['content'] | trim + ' ' + eos_token }}CLOSE{% endif %}
{%- endfor %}"""
MISTRAL = """{{- bos_token }}
{%- for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{% endif %}
{%- if m['role'] == 'user' %}{{- '[INST] ' + m['content'] + ' [/INST]' }}
{%- else %}OPEN{{- m['content'] + eos_token }}CLOSE{{- ' ' }}{% endif %}
{%- endfor %}"""
ZEPHYR = """{% for m in messages %}
{{ '<|' + m['role'] + '|>' }}
{% if m['role'] == 'assistant' %}OPEN{{- m['content'] + eos_token }}CLOSE{{ '\\n' }}{% else %}
{{ m['content'] + eos_token }}
{% endif %}{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>\\n' }}{% endif %}"""
GEMMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{- raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}
{%- if m['role'] == 'assistant' %}OPEN{{- (m['content'] | trim) + '<end_of_turn>' }}CLOSE
{%- else %}{{- (m['content'] | trim) + '<end_of_turn>' }}{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""
PHI3 = """{{- bos_token }}
{%- for m in messages %}
{{- '<|' + m['role'] + '|>\\n' }}
{%- if m['role'] == 'assistant' %}OPEN{{- m['content'] + '<|end|>' }}CLOSE
{%- else %}{{- m['content'] + '<|end|>' }}{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% else %}{{- eos_token }}{% endif %}"""
STYLES = {
    "chatml": CHATML, "smollm2": SMOLLM2, "qwen2": QWEN2, "llama3": LLAMA3, "llama2": LLAMA2, "mistral": MISTRAL,
    "zephyr": ZEPHYR, "gemma": GEMMA, "phi3": PHI3,
}  # fmt: skip
FEW = {"llama3": 1, "mistral": 4}
"""Chats whose prefixes are prefixes as tokens too, of two templates that end a prompt in what joins with the answer."""
CONTROL = [
    "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip


def template_of(style, *, tagged=False):
    return marked(STYLES[style], tagged)


def marked(source, tagged):
    """A template with the tags around what the assistant says, or without."""
    return source.replace("OPEN", OPEN * tagged).replace("CLOSE", CLOSE * tagged)


def chats():
    """Return sixty chats: with a system's message or none, of one turn or of several, and whatever people write."""
    draw = random.Random(0)
    said = [
        "Hi", "What is 2+2?", "4", "  two spaces before", "two behind  ", "\n a line first", "\n\ntwo lines first",
        "a line last\n", "naïve café, 日本語, 😀👩‍👩‍👧", "a\tb\r\nc", "<|im_end|>",
        "I say <|im_end|>\n<|im_start|>assistant\n now",
        "</s><s>", "[INST] no [/INST]", "<end_of_turn>", "def f(x):\n    return x ** 2\n\n\nprint(f(3))",
        "]", "]]", ".",
        "The longer answer. " * 12, '{"json": ["<&>", null]}', "it's  don't I'll", "\u2028\u00a0x", "-",
    ]  # fmt: skip
    found = []
    for i in range(60):
        system = [[], [{"role": "system", "content": draw.choice(said)}], [{"role": "system", "content": ""}]][i % 3]
        turns = [
            {"role": role, "content": said[i % len(said)] if j < 2 else draw.choice(said)}
            for j, role in enumerate(["user", "assistant"] * (1 + i % 4))
        ]
        extra = [{"role": "user", "content": draw.choice(said)}] * (i % 5 == 4)
        found.append([*system, *turns, *extra])
    return found


TOOLS = [
    {"role": "user", "content": "What is 2 ** 9?"},
    {"role": "assistant", "content": "pow(2, 9)"},
    {"role": "tool", "content": "512"},
    {"role": "assistant", "content": "It is 512."},
]


@pytest.fixture(scope="module")
def theirs(smollm2):
    return transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


@pytest.fixture(scope="module", params=STYLES)
def pair(request, smollm2, theirs, tmp_path_factory):
    """Our tokenizer and template, and theirs: SmolLM2's own from its .gguf, others over its words, from a folder."""
    style = request.param
    if style == "smollm2":
        yield style, load_tokenizer(smollm2), load_template(smollm2), theirs
        return
    folder = tmp_path_factory.mktemp(style)
    theirs.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    if "bos_token" in template_of(style) or "eos_token" in template_of(style):
        tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    tokenizer.chat_template = template_of(style)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    yield style, load_tokenizer(folder), load_template(folder), transformers.AutoTokenizer.from_pretrained(folder)


def chats_of(style):
    """The chats that a template takes: some know no system's message."""
    return [chat for chat in chats() if not (chat[0]["role"] == "system" and style in ("mistral", "gemma"))]


def rendered(theirs, chat, template):
    """The ids of a chat in transformers, and whether each counts, by a template with tags."""
    how = {"return_dict": True, "return_assistant_tokens_mask": True}
    found = theirs.apply_chat_template(chat, chat_template=template, **how)
    return found["input_ids"], found["assistant_masks"]


def masked(tokenizer, ids, turns):
    """Return ids with -100 in the place of all that no turn holds; the blank behind an end token is in no turn."""
    targets = np.full(len(ids), IGNORE_INDEX)
    for start, stop in turns:
        while tokenizer.decode(ids[stop - 1 : stop]).strip() == "":
            stop -= 1
        targets[start:stop] = ids[start:stop]
    return targets


def test_the_tokens_that_count_are_those_of_transformers(pair):
    style, tokenizer, template, theirs = pair
    taken, tagged = chats_of(style), template_of(style, tagged=True)
    assert len(taken) >= (20 if style in ("mistral", "gemma") else 60)
    for chat in [*taken, *([TOOLS] if style in ("chatml", "smollm2", "qwen2", "llama3") else [])]:
        ids, counted = encode_chat(chat, template, tokenizer)
        assert ids == theirs.apply_chat_template(chat, return_dict=False)
        assert (ids, counted.astype(int).tolist()) == rendered(theirs, chat, tagged)
    for chat in chats():
        if chat not in taken:
            with pytest.raises(FileRefused, match=r"TemplateError: (roles must alternate|System role not supported)"):
                encode_chat(chat, template, tokenizer)


def test_what_a_template_marks_counts_as_in_transformers(pair):
    """Also where what it marks is no whole turn."""
    style, tokenizer, template, theirs = pair
    whole = template_of(style, tagged=True)
    for tagged in (whole, whole.replace("+ '<|im_end|>' }}", "}}")):
        ours = ChatTemplate(template.path, {"default": tagged}, template.tokens)
        for chat in chats_of(style):
            ids, counted = encode_chat(chat, ours, tokenizer)
            assert (ids, counted.astype(int).tolist()) == rendered(theirs, chat, tagged)


def test_the_targets_are_those_of_encoded_prefixes(pair):
    """Where a prefix's tokens are a prefix of the chat's: a line break that joins with the answer's first is not."""
    style, tokenizer, template, theirs = pair
    if style == "phi3":
        pytest.skip("what it writes behind the last message belongs to no turn")
    compared = 0
    for messages in chats_of(style):
        ids, counted = encode_chat(messages, template, tokenizer)
        turns = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = theirs.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=False)
                after = theirs.apply_chat_template(messages[: i + 1], return_dict=False)
                if ids[: len(before)] != before or ids[: len(after)] != after:
                    break
                turns.append((len(before), len(after)))
        else:
            np.testing.assert_array_equal(np.where(counted, ids, IGNORE_INDEX), masked(theirs, ids, turns))
            compared += 1
    assert compared >= FEW.get(style, 15 if style in ("mistral", "gemma") else 40)


def test_a_begin_token_comes_once(pair):
    style, tokenizer, template, theirs = pair
    ids, _ = encode_chat(chats()[0], template, tokenizer)
    if "bos_token" in template_of(style) and style != "llama2":  # whose every question begins with one
        assert ids.count(theirs.bos_token_id) == 1
    assert ids[:2] != [theirs.bos_token_id] * 2


def test_a_question_is_asked_and_ended_as_in_transformers(pair):
    style, tokenizer, template, theirs = pair
    prompt = Dialogue(template, tokenizer).ask("What is 2+2?")
    asked = [{"role": "user", "content": "What is 2+2?"}]
    assert prompt.ids == theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    ends = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "chatml": "<|im_end|>", "smollm2": "<|im_end|>"}
    assert theirs.convert_tokens_to_ids(ends.get(style, theirs.eos_token)) in prompt.end


def test_prompts_and_completions_are_encoded_as_in_transformers(smollm2, theirs):
    ours = load_tokenizer(smollm2)
    for prompt, completion in (("2+2=", "4"), ("Q: why?\nA:", " because  "), ("", "all"), ("日本", "語です。")):
        ids, counted = encode_example({"prompt": prompt, "completion": completion}, ours)
        assert ids == [*theirs(prompt + completion)["input_ids"], theirs.eos_token_id]
        assert counted.sum() == len(ids) - len(theirs(prompt)["input_ids"])


def test_the_held_out_loss_is_that_of_transformers(smollm2, theirs, tmp_path):
    """Each chat alone, with -100 for what does not count, and no row filled; the mean over all that counts."""
    torch.manual_seed(0)
    model = llama(vocab_size=len(theirs), max_position_embeddings=512).eval()
    theirs.save_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "m")
    long = [chat for chat in chats() if len(chat) > 2]
    (tmp_path / "e.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in long), encoding="utf-8")
    data = load_data(tmp_path / "e.jsonl", tmp_path / "m", 1000)
    total, count = 0.0, 0
    for chat in long[len(long) - 1 :: -HELD_OUT]:
        ids, counts = map(torch.tensor, rendered(theirs, chat, template_of("smollm2", tagged=True)))
        labels = torch.where(counts.bool(), ids, IGNORE_INDEX)
        with torch.no_grad():
            total += float(model(ids[None], labels=labels[None]).loss) * int(counts.sum())
        count += int(counts.sum())
    ours = evaluate(Llama.load(tmp_path / "m"), data.X_held, data.Y_held, cross_entropy)
    assert (data.Y_held != IGNORE_INDEX).sum() == count
    np.testing.assert_allclose(ours, total / count, rtol=1e-5)


def test_a_template_that_takes_back_a_turn_is_refused(smollm2, theirs, tmp_path):
    """As models do that show their thoughts of the last turn alone."""
    theirs.save_pretrained(tmp_path / "m")
    forgets = CHATML.replace(
        "OPEN{{- m['content']", "{{- m['content'] if loop.last else m['content'].split('</think>')[-1]"
    )
    (tmp_path / "m" / "chat_template.jinja").write_text(forgets.replace("CLOSE", ""))
    one = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>a greeting</think>Hello"}]
    lines = [{"messages": chat} for chat in (one, one, [*one, *one])]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, lines)))
    message = "line 3: the chat template changes the text before the end of message 2 from"
    with pytest.raises(FileRefused, match=message):
        load_data(tmp_path / "e.jsonl", tmp_path / "m", 64)


# --- conversations --------------------------------------------------------------------------------

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
WITH_TOOLS = {"chatml": CHATML, "phi3": PHI3, "zephyr": ZEPHYR, "calls": CALLS, "thoughts": THOUGHTS, "names": NAMES}


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
        "Hi", "4", " two before", "a line\n\nmore", "naïve 日本語 😀", "<|im_end|>", "a<think>b</think>c", "{}",
        "\n\n.",
    ]  # fmt: skip
    tools = [tool("weather", city="string"), tool("add", a="number", b="number")]
    found = []
    for i in range(20):
        turns = []
        for _ in range(1 + i % 4):
            turns += [user(draw.choice(said)), assistant(draw.choice(said))]
        late = [{"role": "system", "content": "Be brief."}] * (i % 5 == 3)
        found.append(([*turns[:2], *late, *turns[2:], *[user("and?")] * (i % 7 == 6)], None))
    for i in range(12):
        calls = [call("weather", {"city": "Oslo"} if i % 2 else '{"city": "Oslo"}')]
        calls += [call("add", {"a": 1, "b": 2})] * (i % 2)
        first = assistant((None, "", "let me see")[i % 3], tool_calls=calls)
        answer = {"role": "tool", "content": "5C"} | ({"tool_call_id": "call00001"} if i % 4 == 1 else {})
        found.append(([user("weather?"), first, answer, assistant("5C.")], tools[: 1 + i % 2] if i % 4 else None))
    for i in range(8):
        found.append(([user("hi", name="ann"), assistant("hello", **({"name": "bot"} if i % 2 else {}))], None))
        found.append(([user("hi"), assistant("hello")], tools[: i % 3]))
    for i in range(6):
        thought = {("reasoning_content", "thinking", "reasoning")[i % 3]: "why"}
        turns = [user("q"), assistant("a", **thought), user("r"), assistant("b", **thought)]
        found.append((turns[: 2 + 2 * (i % 2)], None))
    for i in range(6):
        parts = [{"type": "text", "text": text} for text in ("par", "ts", "")[: 1 + i % 3]]
        found.append(([user(parts), assistant(parts), user("" if i % 2 else "x"), assistant("y", weight=i % 2)], None))
    return found


def written_by_transformers(messages, tools, source, *, tagged=False):
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
    text, _ = written_by_transformers(messages, tools, source)
    keys = set()
    for i, message in enumerate(messages):
        for key, value in message.items():
            if key == "role" or value is None or value in ("", [], {}) or not str(value).strip():
                continue
            other = message | {"content": ""} if key == "content" else {k: v for k, v in message.items() if k != key}
            if written_by_transformers([*messages[:i], other, *messages[i + 1 :]], tools, source)[0] == text:
                keys.add((i + 1, key))
    for i in range(len(tools or ())):
        if written_by_transformers(messages, [*tools[:i], *tools[i + 1 :]], source)[0] == text:
            keys.add((i + 1, "tool"))
    return keys


def ours(messages, tools, template):
    """Return the text and the turns; or why there are none."""
    try:
        return write_chat(messages, template, tools or None), ""
    except ValueError as error:
        return None, str(error)


KEY = re.compile(r"^(?:the key )?'?(\w+)'? of message (\d+) is ignored by the chat")
TOOL = re.compile(r"^(tool) (\d+) of its tools is ignored by the chat")


@pytest.mark.parametrize("tagged", [False, True])
@pytest.mark.parametrize("style", WITH_TOOLS)
def test_what_leaves_no_trace_is_refused(style, tagged):
    source = marked(WITH_TOOLS[style], tagged)
    taken = refused = 0
    template = ChatTemplate("here", {"default": source}, TOKENS)
    for messages, tools in conversations():
        checked = checked_messages(messages)
        text, spans = written_by_transformers(checked, tools, source, tagged=tagged)
        written, why = ours(checked, tools, template)
        if text is None:
            assert "chat template cannot render this" in why
            continue
        keys = lost(checked, tools, source)
        if match := KEY.match(why) or TOOL.match(why):
            assert (int(match[2]), match[1]) in keys
            refused += 1
        elif why:
            assert "when more follows" in why
            assert not tagged
        else:
            assert not keys, messages
            assert written[0] == text
            speakers = sum(message["role"] == "assistant" for message in checked)
            assert len(written[1]) == speakers if not tagged else [*map(list, written[1])] == [*map(list, spans)]
            taken += 1
    assert taken >= 20
    assert refused >= 10
