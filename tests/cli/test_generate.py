"""``minilora generate``."""

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from minilora import (
    Llama,
    LoRA,
    attach,
    load_adapter,
    save_adapter,
)
from minilora.files.adapters import system_message
from minilora.language import generation
from minilora.language.generation import generate

from ..support.command_line import finetune, losses, run
from ..support.language import LETTERS, TEXT, tiny_llama, write_folder

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")


TEMPLATE = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}
{{ m.role[0] }} {{ m.content }}.{% endfor %}{% if add_generation_prompt %}a {% endif %}"""


@pytest.fixture
def chatty(folder):
    """A model with a chat template."""
    pytest.importorskip("jinja2", reason="pip install -e '.[models]'")
    Path("model/tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def test_a_chat_is_answered_and_the_answer_printed_alone(chatty, capsys):
    model, template = Llama.load("model"), "u the cat.a "
    ids = [LETTERS.index(c) for c in template]
    expected = "".join(LETTERS[i] for i in generate(model, ids, 9, end={LETTERS.index(".")}))
    command = ["generate", "the cat", "--model", "model", "--chat", "--tokens", "9", "--temperature", "0"]
    assert run(*command) == 0
    assert capsys.readouterr().out == f"{expected}\n"


def answer(model, text):
    """What the model says greedily, in nine tokens at most."""
    ids = [LETTERS.index(c) for c in text]
    return "".join(LETTERS[i] for i in generate(model, ids, 9, end={LETTERS.index(".")}))


def test_a_chat_without_a_prompt_answers_line_by_line_and_knows_what_was_said(chatty, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n\n  \n the dog \nsat"))
    assert run("generate", "--model", "model", "--chat", "--tokens", "9", "--temperature", "0") == 0
    model, said, answers = Llama.load("model"), "", []
    for line in ("the cat", "the dog", "sat"):
        said += f"u {line}."
        answers.append(answer(model, said + "a "))
        said += f"a {answers[-1]}."
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in answers)
    assert len(answers[0]) > 0


def test_each_turn_of_a_chat_stands_behind_the_system_message(chatty, capsys, monkeypatch):
    template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }}.{% endfor %}a "
    Path("model/tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\nsat\n"))
    greedy = ["--tokens", "9", "--temperature", "0"]
    assert run("generate", "--model", "model", "--chat", "--system", "on", *greedy) == 0
    model = Llama.load("model")
    first = answer(model, "s on.u the cat.a ")
    second = answer(model, f"s on.u the cat.a {first}.u sat.a ")
    assert capsys.readouterr().out == f"{first}\n{second}\n"


def test_ctrl_c_ends_an_answer_and_not_the_talk(chatty, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\nthe dog\n"))
    asked, right = [], generation.generate

    def stopped(model, ids, *more, **options):
        asked.append("".join(LETTERS[i] for i in ids))
        for n, token in enumerate(right(model, ids, *more, **options)):
            if n == 3 and len(asked) == 1:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(generation, "generate", stopped)
    assert run("generate", "--model", "model", "--chat", "--tokens", "9", "--temperature", "0") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == answer(Llama.load("model"), "u the cat.a ")[:3]
    assert asked[1] == f"u the cat.a {first}.u the dog.a "
    assert second
    asked.clear()
    assert run("generate", "the cat", "--model", "model", "--chat", "--tokens", "9", "--temperature", "0") == 130


def test_a_file_of_prompts_is_answered_by_one_loading(chatty, capsys, monkeypatch):
    lines = [
        {"prompt": "the cat ", "completion": "sat", "id": 7},
        {"messages": [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "ran"}]},
        {"messages": [{"role": "user", "content": "the dog"}]},
    ]
    Path("p.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    loaded, right = [], Llama.load
    monkeypatch.setattr(Llama, "load", lambda *a, **k: loaded.append(a) or right(*a, **k))
    few = ["--model", "model", "--tokens", "9", "--temperature", "0"]
    assert run("generate", "p.jsonl", *few, "-o", "out.jsonl") == 0
    assert capsys.readouterr().out == "3 answers written to out.jsonl\n"
    assert len(loaded) == 1
    written = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    model = right("model")
    texts = ["the cat ", "u the dog.a ", "u the dog.a "]
    assert written == [{**line, "generated": answer(model, text)} for line, text in zip(lines, texts, strict=True)]
    for more, said in {
        ("p.jsonl", "-o", "out.jsonl"): "-o 'out.jsonl' is there already, expected a new file",
        ("p.jsonl", "-o", "p.jsonl"): "-o 'p.jsonl' is the file of prompts, expected another file",
        ("p.jsonl", "-o", "nowhere/out"): "-o 'nowhere/out': there is no folder 'nowhere'",
        ("p.jsonl", "-o", "new", "--chat"): "-o reads prompts and chats from a file",
    }.items():
        assert run("generate", *more, *few) == 2
        assert said in capsys.readouterr().err


def test_ctrl_c_leaves_the_answers_so_far(chatty, capsys, monkeypatch):
    Path("p.jsonl").write_text('{"prompt": "the cat "}\n' * 3)
    begun, right = [], generation.generate

    def pressed(*arguments, **settings):
        begun.append(0)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return right(*arguments, **settings)

    monkeypatch.setattr(generation, "generate", pressed)
    few = ["p.jsonl", "--model", "model", "--tokens", "9", "--temperature", "0"]
    assert run("generate", *few, "-o", "out.jsonl") == 130
    assert capsys.readouterr().out == "2 of 3 answers written to out.jsonl\n"
    assert len(Path("out.jsonl").read_text().splitlines()) == 2
    begun[:] = [0, 0]
    assert run("generate", *few, "-o", "none.jsonl") == 130
    assert not Path("none.jsonl").exists()


def test_a_file_of_chats_is_answered_as_they_are_trained_on(chatty, capsys):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "dog"}]
    Path("p.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": parts}], "tools": ["x"]}))
    few = ["p.jsonl", "--model", "model", "--tokens", "9", "--temperature", "0", "-o", "out.jsonl"]
    assert run("generate", *few) == 2
    assert "'p.jsonl': line 1: the chat template writes nothing of its tools" in capsys.readouterr().err
    Path("model/tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{% for t in tools or [] %}{{ t }}{% endfor %}" + TEMPLATE})
    )
    assert run("generate", *few) == 0
    assert json.loads(Path("out.jsonl").read_text())["generated"] == answer(Llama.load("model"), "xu the dog.a ")


LINES = [
    "{",
    "[]",
    "3",
    '{"prompt": 3}',
    '{"prompt": ""}',
    '{"prompt": {"a": 1}}',
    '{"messages": {"a": 1}}',
    '{"messages": [{"role": "assistant", "content": "a"}]}',
    '{"messages": [{"content": "a"}]}',
    '{"messages": []}',
    '{"text": "a"}',
    '{"messages": [3]}',
]


@pytest.mark.parametrize("line", LINES)
def test_a_line_without_a_prompt_is_refused_before_the_model_is_loaded(chatty, capsys, monkeypatch, line):
    Path("p.jsonl").write_text('{"prompt": "a"}\n' + line)
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail("the model is loaded"))
    assert run("generate", "p.jsonl", "--model", "model", "-o", "out.jsonl") == 2
    assert "minilora: 'p.jsonl': line 2: " in capsys.readouterr().err
    assert not Path("out.jsonl").exists()


def test_a_terminal_shows_where_to_type(chatty, capsys, monkeypatch):
    typed, signs = iter(["the cat"]), []

    def read(sign=""):
        signs.append(sign)
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert run("generate", "--model", "model", "--chat", "--tokens", "2") == 0
    assert signs == ["> ", "> "]


def test_an_input_without_lines_is_no_chat_and_no_error(chatty, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert run("generate", "--model", "model", "--chat") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("arguments", [["the \udcff"], ["the \udcff", "--chat"], ["--chat"]])
def test_a_prompt_that_is_no_text_is_refused_in_a_line(chatty, capsys, monkeypatch, arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the \udcff"))
    assert run("generate", *arguments, "--model", "model") == 2
    err = capsys.readouterr().err
    assert "can't encode character '\\udcff' in position 4" in err
    assert err.count("\n") == 1


def test_a_chat_needs_a_template(folder, capsys):
    assert run("generate", "the cat", "--model", "model", "--chat") == 2
    out, err = capsys.readouterr()
    assert "'model': there is no chat template in tokenizer_config.json, nor a file chat_template.jinja" in err
    assert out == ""


def test_generate_says_what_the_model_says(folder, capsys):
    assert finetune() == 0
    capsys.readouterr()
    model = Llama.load("model")
    ids = [LETTERS.index(c) for c in "the cat"]
    said = {}
    for name, more, m in (("plain", [], model), ("adapted", ["--adapter", "a"], attach(model, load_adapter("a")))):
        assert run("generate", "the cat", "--model", "model", "--tokens", "20", "--temperature", "0", *more) == 0
        said[name] = capsys.readouterr().out
        expected = "".join(LETTERS[i] for i in generate(m, ids, 20, end={LETTERS.index(".")}))
        assert said[name] == f"the cat{expected}\n"
    assert said["plain"] != said["adapted"]


def test_a_seed_chooses_the_text(folder, capsys):
    said = []
    for more in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--seed", "1", "--temperature", "0.01"]):
        assert run("generate", "the", "--model", "model", *more) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert len(set(said)) == 3


@pytest.mark.parametrize(("layer", "width"), [(7, 12), (1, 13)])  # one layer too many, one input too many
def test_an_adapter_of_another_model_is_refused_by_path(folder, layer, width, capsys):
    path = f"model.layers.{layer}.self_attn.q_proj"
    save_adapter("b", {path: LoRA(np.ones((1, width)), np.ones((16, 1)), 1.0)})
    assert run("generate", "the", "--model", "model", "--adapter", "b") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert path in err


def test_a_models_words_cannot_steer_the_terminal(folder, capsys):
    words = json.loads(Path("model/tokenizer.json").read_text())
    evil = {letter: i for i, letter in enumerate(LETTERS) if letter not in "abcdefghijklm"}
    evil |= {f"\x1b[{i}J\u202e": i for i in range(13)}
    words["model"]["vocab"] = evil
    Path("model/tokenizer.json").write_text(json.dumps(words))
    assert run("generate", "no\x07", "--model", "model", "--tokens", "60", "--temperature", "3") == 0
    out = capsys.readouterr().out
    assert "\\x1b[" in out
    assert out.startswith("no\\x07")
    assert out.replace("\n", "").isprintable()


def test_without_a_model_glassllms_is_taken(folder, capsys):
    pytest.importorskip("glassllm")
    assert run("finetune", "text", "--save", "a", "--steps", "2", "--batch-size", "2", "--length", "16") == 0
    out = capsys.readouterr().out
    assert "glassllm's English model: 852,608 parameters in float32" in out
    assert losses(out)[2] < losses(out)[0]
    assert json.loads(Path("a/adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert run("generate", "The cat", "--adapter", "a", "--tokens", "5") == 0
    assert capsys.readouterr().out.startswith("The cat")


def test_a_missing_default_model_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "glassllm", None)
    for command in (["generate", "the"], ["finetune", "text", "--save", "a"]):
        assert run(*command) == 2
        assert "needs glassllm" in capsys.readouterr().err


END = LETTERS.index(".")


TWO = ["--steps", "2", "--batch-size", "4", "--length", "8", "--rank", "2"]


@pytest.fixture
def larger(tmp_path, monkeypatch):
    """A model of 31 tokens, a text, and the working folder in which both lie."""
    write_folder(tmp_path / "model", tiny_llama(vocab=31))
    (tmp_path / "text").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change_tokenizer(change):
    file = "model/tokenizer.json"
    with open(file) as opened:
        tokenizer = json.load(opened)
    change(tokenizer)
    with open(file, "w") as opened:
        json.dump(tokenizer, opened)


def with_begin(tokenizer):
    """Texts begin with <s>, id 30."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] = [{"id": 30, "content": "<s>", **special}]
    begin, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [30], "tokens": ["<s>"]}},
    }


def with_bytes(tokenizer):
    """The two bytes of é are ids 29 and 30, each a token."""
    tokenizer["pre_tokenizer"] = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False
    }  # fmt: skip
    tokenizer["decoder"] = tokenizer["pre_tokenizer"]
    letters = [{" ": "Ġ", "\n": "Ċ"}.get(letter, letter) for letter in LETTERS]
    vocabulary = {token: i for i, token in enumerate([*letters, "Ã", "©"])}
    tokenizer["model"] = {"type": "BPE", "vocab": vocabulary, "merges": []}


def with_words(tokenizer):
    """A space is the sign ▁, and a text does not begin with one: decoded alone, a token loses its space."""
    sign = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tokenizer["decoder"] = sign
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["▁"] = vocabulary.pop(" ")
    tokenizer["model"]["unk_token"] = "▁"


def says(monkeypatch, *tokens):
    """Let the model choose these tokens, one after the other."""
    left = list(tokens)
    monkeypatch.setattr(generation, "choose", lambda *scores: left.pop(0))
    return left


class Pipe(io.StringIO):
    """What is printed, and what a reader at the other end has seen of it: all up to the last flush."""

    seen = ""

    def flush(self):
        self.seen = self.getvalue()


def spoken(capsys, *more):
    assert run("generate", "a cat", "--model", "model", *more) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("begins", [False, True])
def test_the_prompt_begins_with_the_begin_token_once(larger, capsys, monkeypatch, begins):
    if begins:
        change_tokenizer(with_begin)
    seen, right = [], Llama.extend
    monkeypatch.setattr(
        Llama, "extend", lambda self, ids, past=None: seen.append(ids.tolist()) or right(self, ids, past)
    )
    spoken(capsys, "--tokens", "1")
    assert seen == [[[30] * begins + [LETTERS.index(letter) for letter in "a cat"]]]


def test_generating_stops_at_the_end_token(larger, capsys, monkeypatch):
    left = says(monkeypatch, 1, 2, END, 3, 4)
    assert spoken(capsys, "--tokens", "5") == "a catbc\n"
    assert left == [3, 4]


def test_a_letter_in_two_tokens_is_printed_whole(larger, capsys, monkeypatch):
    change_tokenizer(with_bytes)
    says(monkeypatch, 29, 30, 1)
    assert spoken(capsys, "--tokens", "3") == "a catéb\n"


def test_a_token_keeps_the_space_before_it(larger, capsys, monkeypatch):
    change_tokenizer(with_words)
    says(monkeypatch, LETTERS.index(" "), 1, LETTERS.index(" "), 2)
    assert spoken(capsys, "--tokens", "4") == "a cat b c\n"


def test_each_token_is_seen_before_the_next_is_chosen(larger, monkeypatch):
    left, seen = [1, 2, 3], []
    monkeypatch.setattr(generation, "choose", lambda *a: seen.append(sys.stdout.seen) or left.pop(0))
    monkeypatch.setattr(sys, "stdout", Pipe())
    assert run("generate", "a cat", "--model", "model", "--tokens", "3") == 0
    assert seen == ["a cat", "a catb", "a catbc"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_generating_takes_an_adapter_of_any_precision(larger, capsys, dtype):
    assert run("finetune", "text", "--save", "a", "--model", "model", *TWO, "--dtype", dtype) == 0
    capsys.readouterr()
    assert spoken(capsys, "--adapter", "a", "--tokens", "1").startswith("a cat")


def test_both_commands_compute_where_they_are_told(larger, capsys, standin):
    """What lies on another device than the rest is refused, so everything is there."""
    said, found = {}, {}
    for backend in ("numpy", "cupy"):
        there = ["--model", "model", "--backend", backend]
        assert run("finetune", "text", "--save", backend, *there, *TWO) == 0
        assert (f", {standin.device}\n" in capsys.readouterr().out) == (backend == "cupy")
        assert run("generate", "a cat", "--adapter", backend, "--temperature", "0", *there) == 0
        said[backend], found[backend] = capsys.readouterr().out, load_adapter(backend)
    assert said["numpy"] == said["cupy"]
    for path, adapter in found["numpy"].items():
        np.testing.assert_allclose(found["cupy"][path].lora_B, adapter.lora_B, atol=1e-5)


GREEDY = ["--temperature", "0", "--tokens", "9"]


def test_a_system_message_stands_before_the_question(chatty, capsys):
    template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }}.{% endfor %}"
    template += "{% if add_generation_prompt %}a {% endif %}"
    Path("model/tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert run("generate", "the cat", "--model", "model", "--chat", "--system", "sat", *GREEDY) == 0
    said = capsys.readouterr().out
    assert run("generate", "s sat.u the cat.a ", "--model", "model", *GREEDY) == 0
    assert capsys.readouterr().out == f"s sat.u the cat.a {said}"


WITH_SYSTEM = "{% for m in messages %}{{ m.role[0] }} {{ m.content }}.{% endfor %}"
WITH_SYSTEM += "{% if add_generation_prompt %}a {% endif %}"


def chats(name, *systems):
    """Write chats, each of which begins with one of the system messages, or with none."""
    for_each = [[{"role": "system", "content": text}] if text else [] for text in systems]
    turns = [
        [{"role": "user", "content": f"the {x}"}, {"role": "assistant", "content": "mat"}]
        for x in "abcdefghij"[: len(systems)]
    ]
    lines = [json.dumps({"messages": first + rest}) for first, rest in zip(for_each, turns, strict=True)]
    Path(name).write_text("\n".join(lines))


@pytest.fixture
def with_system(chatty):
    """A model whose template writes system messages."""
    Path("model/tokenizer_config.json").write_text(json.dumps({"chat_template": WITH_SYSTEM}))
    return chatty


def trained_with(*more):
    """Train on the chats in e.jsonl, and return the system message that is kept with the adapter."""
    some = ["--steps", "1", "--batch-size", "2", "--rank", "2", "--lr", "0.1", "--overwrite"]
    assert run("finetune", "e.jsonl", "--save", "b", "--model", "model", *some, *more) == 0
    return system_message(Path("b"))


def test_the_system_message_of_all_chats_is_kept_or_the_one_asked_for(with_system, capsys):
    chats("e.jsonl", *["sat"] * 4)
    assert trained_with() == "sat"
    assert trained_with("--system", "") is None
    assert trained_with("--system", "on") == "on"
    assert "system   on\n" in (out := capsys.readouterr().out)
    assert "is kept with the adapter, for generate and evaluate; chats that have one of their own keep it\n" in out
    chats("e.jsonl", *["sat", "on"] * 2)
    assert trained_with() is None
    chats("e.jsonl", *["sat", None] * 2)
    assert trained_with() is None
    assert trained_with("--system", "sat") == "sat"
    chats("e.jsonl", *[None] * 4)
    assert trained_with() is None


def test_chats_that_are_told_a_system_message_train_as_those_that_have_it(with_system):
    found = []
    for systems, more in ((["sat"] * 4, []), ([None] * 4, ["--system", "sat"]), ([None] * 4, [])):
        chats("e.jsonl", *systems)
        trained_with("--steps", "3", *more)
        found.append(load_adapter("b")["model.layers.0.self_attn.q_proj"].lora_B.tobytes())
    assert found[0] == found[1] != found[2]


def test_a_kept_system_message_is_used_again_and_said(with_system, capsys, monkeypatch):
    chats("e.jsonl", *[None] * 4)
    trained_with("--system", "sat")
    capsys.readouterr()
    said = {}
    for more in ((), ("--system", "sat"), ("--system", "on"), ("--system", "")):
        asked = ["the cat", "--model", "model", "--chat", "--adapter", "b", *GREEDY, *more]
        assert run("generate", *asked) == 0
        said[more], err = capsys.readouterr()
        assert err == (
            "" if more else "minilora: the adapter's system message stands first (--system gives another): sat\n"
        )
        Path("out.jsonl").unlink(missing_ok=True)
        assert run("generate", "e.jsonl", "-o", "out.jsonl", "--model", "model", "--adapter", "b", *GREEDY, *more) == 0
        assert capsys.readouterr().err == err
        model = attach(Llama.load("model"), load_adapter("b"))
        system = {"": "", "on": "s on.", "sat": "s sat."}[more[1] if more else "sat"]
        for line, x in zip(map(json.loads, Path("out.jsonl").read_text().splitlines()), "abcd", strict=True):
            assert line["generated"] == answer(model, f"{system}u the {x}.a ")
        assert said[more] == answer(model, f"{system}u the cat.a ") + "\n"
    Path("p.jsonl").write_text('{"prompt": "the cat"}')
    for prompt in (["the cat"], ["p.jsonl", "-o", "answer.jsonl"]):  # no chat
        assert run("generate", *prompt, "--model", "model", "--adapter", "b", *GREEDY) == 0
        assert capsys.readouterr().err == ""


def test_a_chat_is_evaluated_behind_the_kept_system_message(with_system, capsys):
    chats("e.jsonl", *[None] * 4)
    chats("s.jsonl", *["sat"] * 4)
    trained_with("--system", "sat")
    capsys.readouterr()

    def found(file, *more):
        assert run("evaluate", file, "--model", "model", "--adapter", "b", *more) == 0
        out = capsys.readouterr().out
        return re.findall(r"^loss +(\S+)", out, re.M), re.findall(r"^system +(.*)$", out, re.M)

    losses, said = found("e.jsonl")
    assert said == ["sat (the adapter's; --system gives another)"]
    assert found("s.jsonl", "--system", "")[0] == losses
    assert found("e.jsonl", "--system", "sat") == (losses, ["sat"])
    assert found("e.jsonl", "--system", "")[0] != losses
    assert found("text") == found("text", "--system", "")  # a text has no chats
    for command in (["evaluate", "text"], ["finetune", "text", "--save", "c"]):
        assert run(*command, "--model", "model", "--system", "sat") == 2
        assert capsys.readouterr().err.startswith("minilora: --system is a message of chats, and ")


@pytest.mark.parametrize("command", [["generate", "the cat"], ["evaluate", "text"]])
def test_a_terminal_says_that_the_model_is_loaded_until_it_is(folder, monkeypatch, command):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    seen, right, shown = [], Llama.load, Terminal()
    monkeypatch.setattr(Llama, "load", lambda *a, **k: seen.append(shown.getvalue()) or right(*a, **k))
    monkeypatch.setattr(sys, "stderr", shown)
    assert run(*command, "--model", "model") == 0
    assert seen == ["loading model ..."]
    assert shown.getvalue().startswith("loading model ...\r\x1b[K")


def test_a_system_message_that_would_be_lost_is_refused(chatty, capsys):
    template = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}.{% endif %}{% endfor %}"
    Path("model/tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert run("generate", "the cat", "--model", "model", "--chat", "--system", "sat") == 2
    assert "the chat template writes nothing of a system message" in capsys.readouterr().err
    assert run("generate", "the cat", "--model", "model", "--system", "sat") == 2
    assert "--system is a message of a chat: it goes with --chat" in capsys.readouterr().err
