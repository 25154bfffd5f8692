"""What a template finds and may do, as the bounded process answers: here asked in this process."""

import re

import pytest

pytest.importorskip("jinja2", reason="pip install -e '.[models]'")

from minilora.guards import templateanswers
from minilora.guards.templateanswers import answer

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def templates(monkeypatch):
    monkeypatch.setattr(templateanswers, "TEMPLATES", {})


def write(source, **values):
    assert answer({"templates": {"default": source}}) == {}
    return answer({"messages": HI, "tools": None, **values})


def test_tools_have_the_template_for_them_where_there_is_one():
    assert answer({"templates": {"default": "D", "tool_use": "T"}}) == {}
    assert answer({"messages": HI, "tools": [{"name": "f"}]}) == {"text": "T"}
    assert answer({"messages": HI, "tools": []}) == answer({"messages": HI}) == {"text": "D"}
    assert write("D", tools=[1]) == {"text": "T"}  # until another takes its place
    templateanswers.TEMPLATES.clear()
    assert write("D", tools=[1]) == {"text": "D"}


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages[0].content }}{{ x }}", "hiX"),
        ("{{ {'b': '<é>', 'a': [1]} | tojson }}", '{"b": "<é>", "a": [1]}'),
        ("{{ {'b': 1, 'a': 'é'} | tojson(true, 1, (',', ':'), true) }}", '{\n "a":"\\u00e9",\n "b":1\n}'),
        ("{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),  # no line of a block's own, and nothing before it
        ("{% set n = namespace(a=1) %}{% set n.a = 2 %}{% set n.b = 3 %}{{ n.a }}{{ n.b }}", "23"),
        ("{% set n = namespace({'a': 1}, b=2) %}{{ n.a }}{{ n.b }}", "12"),
        ("{{ dict([('a', 1)], b=2) }}", "{'a': 1, 'b': 2}"),
    ],
)  # fmt: skip
def test_a_template_finds_what_transformers_gives_it(source, text):
    assert write(source, x="X") == {"text": text}


def test_where_the_model_speaks_is_told_beside_the_text():
    assert write("c{% generation %}a{{ x }}{% endgeneration %}b", x="X") == {"text": "caXb", "spans": [[1, 3]]}


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("{{ raise_exception('a turn is missing') }}", "it says: a turn is missing"),
        ("{{ 1 // 0 }}", "it fails with ZeroDivisionError: integer division or modulo by zero"),
        ("{% set n = namespace(_a=1) %}", "it says: a namespace has no place for '_a'"),
        ("{% set n = namespace({'__a': 1}) %}", "it says: a namespace has no place for '__a'"),
        ("{% set n = namespace() %}{% set n._a = 1 %}", "it says: a namespace has no place for '_a'"),
        ("{{ messages.append(1) }}", "it says: access to attribute 'append' of 'list' object is unsafe."),
        ("{{ dict.fromkeys }}{{ dict.fromkeys(1) }}", "it says: 'function object' has no attribute 'fromkeys'"),
    ],
)
def test_what_a_template_may_not_do_is_said(source, error):
    assert write(source) == {"error": error}


@pytest.mark.parametrize(("more", "error"), [(0, None), (1, "it writes 2,097,153 letters, expected at most 2,097,152")])
def test_a_conversation_has_at_most_so_many_letters(more, error):
    said = write("{{ 'a' * n }}", n=(1 << 21) + more)
    assert said == ({"error": error} if error else {"text": "a" * (1 << 21)})


def test_the_time_is_written_by_its_pattern():
    assert re.fullmatch(r"\d{4}-\d\d", write("{{ strftime_now('%Y-%m') }}")["text"])


def test_what_is_no_template_is_said_in_a_thousand_letters():
    assert answer({"templates": {"default": "{% if %}"}})["error"].startswith(
        "it is no template: Expected an expression"
    )
    assert len(answer({"templates": {"default": "{% " + "a" * 5000}})["error"]) == 1000
    assert len(write("{{ raise_exception('a' * 5000) }}")["error"]) == 1000


MODEL_SPEAKS = "{% generation %}{{ x }}{% endgeneration %}"


@pytest.mark.parametrize(
    ("source", "answered"),
    [
        (f"a{MODEL_SPEAKS}b", {"text": "aXXb", "spans": [[1, 3]]}),
        (f"{MODEL_SPEAKS}-{MODEL_SPEAKS}", {"text": "XX-XX", "spans": [[0, 2], [3, 5]]}),
        ("a{% generation %}{% endgeneration %}b", {"text": "ab"}),  # it says nothing there
        ("a{% generation %}{% set y = 1 %}{% endgeneration %}{{ y is defined }}", {"text": "aFalse"}),
        (
            f"{{% set s %}}{MODEL_SPEAKS}{{% endset %}}{{{{ s | length }}}}",
            {"error": "it changes what stands between its tags {% generation %} and {% endgeneration %}"},
        ),
    ],
)
def test_where_the_model_speaks_is_answered_beside_the_text(source, answered):
    assert write(source, x="XX") == answered


def test_what_a_template_fails_with_is_said_in_a_thousand_letters(monkeypatch):
    class Fails:
        def render(self, **values):
            raise ValueError("a" * 5000)

    monkeypatch.setitem(templateanswers.TEMPLATES, "default", Fails())
    said = answer({"messages": HI})["error"]
    assert said == ("it fails with ValueError: " + "a" * 5000)[:1000]
