"""Chat templates: where they stand, what they are given, and what they may not do."""

import json
import sys
import time

import pytest

from minilora.language.files import chattemplate
from minilora.language.files.chattemplate import ChatTemplate, load_template
from minilora.texts import FileRefused

from ...support.compare import refused

pytest.importorskip("jinja2", reason="pip install -e '.[models]'")
END = "{% endgeneration %}"
HI = [{"role": "user", "content": "hi"}]


def template(source, tokens=None, **named):
    return ChatTemplate("model", {"default": source, **named}, tokens)


def write(folder, config=None, jinja=None):
    folder.mkdir()
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    return folder


NAMED = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]


@pytest.mark.parametrize(
    ("config", "jinja", "file", "expected"),
    [
        ({"chat_template": "a"}, None, "tokenizer_config.json", {"default": "a"}),
        ({"chat_template": "a"}, "é", "chat_template.jinja", {"default": "é"}),
        (None, "b", "chat_template.jinja", {"default": "b"}),
        ({"chat_template": NAMED}, None, "tokenizer_config.json", {"rag": "r", "default": "d", "tool_use": "t"}),
    ],
)
def test_a_folders_template_is_where_transformers_looks(tmp_path, config, jinja, file, expected):
    """It is given the special tokens."""
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None, "add_bos_token": True}
    folder = write(tmp_path / "m", config and config | tokens, jinja)
    found = load_template(folder)
    assert (found.templates, found.path) == (expected, folder / file)
    assert found.tokens == ({"bos_token": "<s>", "eos_token": "</s>"} if config else {})


def test_a_gguf_files_template_is_under_its_key(tmp_path):
    pytest.importorskip("gguf", reason="pip install -e '.[models]'")
    from ...support.gguf_file import write

    fields = {
        "ggml.tokens": ["<s>", "</s>", "<unk>", "<pad>"],
        "ggml.unknown_token_id": 2,
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 1,
        "ggml.padding_token_id": 7,
    }
    templates = {"chat_template": "{{ bos_token }}", "chat_template.tool_use": "{{ tools }}"}
    of_gguf = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    found = load_template(write(tmp_path / "with.gguf", tokenizer=fields | templates))
    assert found.templates == {"default": "{{ bos_token }}", "tool_use": "{{ tools }}"}
    assert found.tokens == of_gguf  # and of no id beyond them
    fields["ggml.padding_token_id"] = 3
    assert load_template(write(tmp_path / "p.gguf", tokenizer=fields | templates)).tokens == of_gguf | {
        "pad_token": "<pad>"
    }
    with pytest.raises(FileRefused, match=r"there is no 'tokenizer\.chat_template'"):
        load_template(write(tmp_path / "without.gguf", tokenizer=fields))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "there is no chat template in tokenizer_config.json, nor a file chat_template.jinja"),
        ({}, "there is no chat template in tokenizer_config.json, nor a file chat_template.jinja"),
        ({"chat_template": 3}, "chat_template is 3, expected a string or a list with a 'default'"),
        ({"chat_template": [{"name": "default"}]}, "tokenizer_config.json': there is no 'template'"),
        ({"chat_template": NAMED[:1]}, "expected a string or a list with a 'default'"),
        ({"chat_template": "{% if %}"}, "tokenizer_config.json': Expected an expression"),
    ],
)
def test_a_model_without_a_template_is_refused(tmp_path, config, message):
    with pytest.raises(FileRefused, match=message):
        load_template(write(tmp_path / "m", config))
    (tmp_path / "m.npz").write_bytes(b"")
    with pytest.raises(
        FileRefused,
        match=r"there is no chat template for messages: take a chat model, .* or rows of prompt and completion$",
    ):
        load_template(tmp_path / "m.npz")


RUN = {
    "    {{ {'<é>': [1, 2]} | tojson }} {{ [{}] | tojson(indent=1) }}": '    {"<é>": [1, 2]} [\n {}\n]',
    "{{ {'b': 1, 'a': 'é'} | tojson(true, 1, (',', ':'), true) }}": '{\n "a":"\\u00e9",\n "b":1\n}',
    "{{ {'b': 1, 'a': 2} | tojson }}": '{"b": 1, "a": 2}',
    "{{ strftime_now('%Y') }}": time.strftime("%Y"),
    "a\n  {% if true %}\nb\n  {% endif %}\nc": "a\nb\nc",  # no line of a block's own, and nothing before it
    "{% for m in [1, 2, 3] %}{% if m == 2 %}{% continue %}{% endif %}{{ m }}{% endfor %}": "13",
    "{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}": "012",
    "{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ documents is none }}": "<s>TrueTrue",
    "a{% generation %}b{% endgeneration %}c": "abc",
    "{% set n = namespace({'a': 1}, b=2) %}{% set n.a = 3 %}{{ n.a }}{{ n.b }}": "32",
    "{% set n = namespace(x=1) %}{% set n.x = n.x + dict(a=3).a %}{{ n.x }}": "4",
}
WRONG = {
    "{{ raise_exception('only\\x1b json') }}": r"its chat template cannot render this: TemplateError: only\\x1b json",
    "{{ ''.__class__.__mro__ }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ messages.append(1) }}": "access to attribute 'append' of 'list' object is unsafe",
    "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
}


def test_a_template_is_run_as_transformers_runs_it():
    assert {source: template(source, {"bos_token": "<s>"}).render(HI) for source in RUN} == RUN
    for source, message in WRONG.items():
        with pytest.raises(FileRefused, match=message):
            template(source).render(HI)


def test_an_error_about_a_chat_with_tool_calls_says_so():
    """Without content, as such a message has, many templates fail in jinja2's own words."""
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    told = "cannot render this chat, whose message 3 has tool calls: UndefinedError"
    with pytest.raises(FileRefused, match=told):
        template("{% for m in messages %}{{ m.content.strip() }}{% endfor %}").render([*HI, *HI, calls])


def test_a_template_may_let_the_model_answer_or_have_tools():
    found = template("{{ messages[0].content }}{{ add_generation_prompt }}", tool_use="tools!")
    assert found.render(HI) == "hiFalse"
    assert found.render(HI, add_generation_prompt=True) == "hiTrue"
    assert found.render(HI, tools=[{}]) == "tools!"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(ValueError, match=r'a chat template needs jinja2 \(.*\): pip install "minilora\[models\]"'):
        template("a").render(HI)


def test_templates_of_other_occasions_stand_in_a_folder(tmp_path):
    folder = write(tmp_path / "m", {"chat_template": "a"}, "DEFAULT")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS")
    found = load_template(folder)
    assert found.render(HI, tools=[{}]) == "TOOLS"
    assert found.render(HI) == "DEFAULT"


def test_a_class_has_special_tokens_of_its_own(tmp_path):
    for config, expected in (
        ({"tokenizer_class": "LlamaTokenizer"}, "<s></s><unk>"),
        ({"tokenizer_class": "GPT2TokenizerFast", "bos_token": "<b>"}, "<b><|endoftext|><|endoftext|>"),
        ({"tokenizer_class": "LlamaTokenizer", "bos_token": None}, "</s><unk>"),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "E"}, "E"),
    ):
        folder = write(tmp_path / str(config), config, "{{ bos_token }}{{ eos_token }}{{ unk_token }}")
        assert load_template(folder).render(HI) == expected


def test_a_template_may_say_where_the_model_speaks():
    messages = [*HI, {"role": "assistant", "content": "yes"}]
    for source, spans in (
        ("{% for m in messages %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endfor %}", ["hi", "yes"]),
        ("{% for m in messages %}{% generation %}{% endgeneration %}{{ m.content }}{% endfor %}", []),
        ("{% set x %}{% generation %}a{% endgeneration %}b{% endset %}{{ x }}{{ x }}", ["a", "a"]),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}", []),
    ):
        found, plain = template(source), template(source.replace("{% generation %}", "").replace(END, ""))
        text, turns = found.render_with_turns(messages)
        assert [text[start:stop] for start, stop in turns] == spans
        assert found.render(messages) == text
        # What is set between the tags stays there, as in transformers.
        assert text == ("1" if "set x = 2" in source else plain.render(messages))


def test_marks_go_through_filters_of_letters():
    def filtered(by):
        return template(f"{{% set x %}}{{% generation %}}cat{END}!{{% endset %}}{{{{ x | {by} }}}}").render_with_turns(
            HI
        )

    for by in ("replace('a', 'b')", "upper", "escape", "tojson", "trim", "striptags"):
        text, (turn,) = filtered(by)
        assert text == template(f"{{{{ 'cat!' | {by} }}}}").render(HI)
        assert text[slice(*turn)].lower() in ("cat", "cbt")
    for by in ("truncate(20)", "urlencode", "reverse", "title", "length"):
        with pytest.raises(FileRefused, match=r"its chat template changes the text between its generation tags$"):
            filtered(by)


def test_a_chats_own_letters_are_no_marks():
    found = template("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}.{% endfor %}")
    letters = "\ue000 \ue001 \ue002 \ue0001\ue001"
    assert found.render_with_turns([{"role": "user", "content": letters}]) == (f"{letters}.", [(0, len(letters))])


BOUNDLESS = [
    "{% set ns = namespace(x='a') %}{% for _ in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{{ 'a\n' | indent(10 ** 10, true) }}",
    "{{ messages[0].content * 10 ** 11 }}",
]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces a limit on memory")
@pytest.mark.parametrize("source", BOUNDLESS)
def test_a_template_cannot_fill_the_memory(monkeypatch, source):
    import resource

    monkeypatch.setattr(chattemplate, "TEMPLATE_MEMORY", 1 << 26)
    before = resource.getrlimit(resource.RLIMIT_AS)
    with refused("'model': its chat template needs more than 64 MiB of memory to render this"):
        template(source).render(HI)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert template("{{ messages[0].content * 1000 }}").render(HI) == "hi" * 1000


def test_a_message_is_given_as_transformers_gives_it():
    """What is null is not there, and thoughts stand under the names that templates read."""
    source = "{% for m in messages %}{{ m.content }}{{ m.thinking }}|{{ m.reasoning_content }}{% endfor %}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert template(source).render([{"role": "assistant", "content": None, name: "why"}]) == "why|why"
    both = {"role": "assistant", "content": "", "thinking": "short", "reasoning_content": "long"}
    assert template(source).render([both]) == "short|long"
    assert template("{{ messages[0].content is defined }}").render([{"role": "assistant", "content": None}]) == "False"
