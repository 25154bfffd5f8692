"""``minilora generate``: it prints what `generate` says, token by token, to a prompt, a message, a talk or a file."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from minilora import Llama, attach, load_adapter
from minilora.language import generation

from ..support.adapter_folder import change_json
from ..support.command_line import finetune, losses, run
from ..support.language import CHAT, LETTERS, greedily, ids_of, template, tiny_llama, write_folder
from ..support.streams import File, Terminal

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")
pytest.importorskip("jinja2", reason="pip install -e '.[models]'")

END = LETTERS.index(".")
GREEDY = "generate --model model --tokens 9 --temperature 0"


@pytest.fixture(autouse=True)
def chats(folder):
    """The model has a chat template."""
    template(CHAT)


@pytest.fixture
def larger(folder):
    """The model with 31 tokens: two more than there are letters."""
    shutil.rmtree("model")
    write_folder(Path("model"), tiny_llama(vocab=31))


def typed(monkeypatch, text, terminal=False):
    monkeypatch.setattr(sys, "stdin", (Terminal if terminal else io.StringIO)(text))


def interrupted(monkeypatch, at):
    """Let Ctrl-C come before a token, counted over all answers; return the prompts that were asked."""
    asked, tokens, right = [], [], generation.generate

    def stopped(model, ids, *more, **options):
        asked.append("".join(LETTERS[i] for i in ids))
        for token in right(model, ids, *more, **options):
            tokens.append(token)
            if len(tokens) == at:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(generation, "generate", stopped)
    return asked


# --- a text is continued --------------------------------------------------------------------------


def test_it_says_what_the_model_says_with_and_without_adapter(shell):
    assert shell(GREEDY, "the cat") == f"the cat{greedily('the cat')}\n"
    assert finetune("--dtype float64") == 0
    adapted = attach(Llama.load("model"), load_adapter("a", dtype="float32"))
    assert shell(GREEDY, "the cat", "--adapter", "a") == f"the cat{greedily('the cat', adapted)}\n"
    assert greedily("the cat", adapted) != greedily("the cat")


def test_a_long_line_is_printed_whole(shell):
    line = "the cat " * 200
    assert shell("generate --model model --tokens 1", line).startswith(line)


def test_a_text_that_may_outgrow_the_context_is_warned_of(shell):
    """The prompt's tokens and those that may follow count together."""
    change_json(Path("model/config.json"), max_position_embeddings=16)
    shell(GREEDY, "the cat")
    assert shell.err == ""
    shell(GREEDY, "the cats")
    assert shell.err == (
        "minilora: prompt and text may have 17 tokens, but the model's context is 16: "
        "its output beyond may be nonsense\n"
    )


def test_a_seed_chooses_the_text(shell):
    one, again, two, colder = (
        shell(f"generate the --model model {more}")
        for more in ("--seed 1", "--seed 1", "--seed 2", "--seed 1 --temperature 0.01")
    )
    assert one == again
    assert len({one, two, colder}) == 3


def change_tokenizer(change):
    path = Path("model/tokenizer.json")
    tokenizer = json.loads(path.read_text())
    change(tokenizer)
    path.write_text(json.dumps(tokenizer))


def with_begin(tokenizer):
    """Texts begin with <s>, id 30."""
    special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    tokenizer["added_tokens"] = [{"id": 30, "content": "<s>", **special}]
    pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": pieces, "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [30], "tokens": ["<s>"]}},
    }  # fmt: skip


def with_bytes(tokenizer):
    """The two bytes of é are ids 29 and 30, each a token."""
    kind = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    letters = [*({" ": "Ġ", "\n": "Ċ"}.get(letter, letter) for letter in LETTERS), "Ã", "©"]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(letters)}, "merges": []}
    tokenizer |= {"pre_tokenizer": kind, "decoder": kind, "model": model}


def with_words(tokenizer):
    """A space is the sign ▁, and a text does not begin with one: decoded alone, a token loses its space."""
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tokenizer["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    tokenizer["model"]["vocab"]["▁"] = tokenizer["model"]["vocab"].pop(" ")
    tokenizer["model"]["unk_token"] = "▁"


@pytest.mark.parametrize(
    ("change", "chosen", "said", "left"),
    [
        (None, [1, 2, END, 3, 4], "a catbc\n", [3, 4]),  # it stops at the end token
        (with_bytes, [29, 30, 1], "a catéb\n", []),  # a letter of two tokens is printed whole
        (with_words, ids_of(" b c"), "a cat b c\n", []),  # a token keeps the space before it
    ],
)
def test_tokens_are_spelled_as_the_text_is(larger, shell, monkeypatch, change, chosen, said, left):
    if change:
        change_tokenizer(change)
    chosen = list(chosen)
    monkeypatch.setattr(generation, "choose", lambda *scores: chosen.pop(0))
    assert shell("generate 'a cat' --model model --tokens", len(chosen)) == said
    assert chosen == left


@pytest.mark.parametrize("begins", [False, True])
def test_the_prompt_begins_with_the_begin_token_once(larger, shell, monkeypatch, begins):
    if begins:
        change_tokenizer(with_begin)
    seen, right = [], Llama.extend
    monkeypatch.setattr(Llama, "extend", lambda self, ids, *past: seen.append(ids.tolist()) or right(self, ids, *past))
    shell("generate 'a cat' --model model --tokens 1")
    assert seen == [[[30] * begins + ids_of("a cat")]]


def test_each_token_is_seen_before_the_next_is_chosen(monkeypatch):
    left, seen = [1, 2, 3], []
    monkeypatch.setattr(generation, "choose", lambda *scores: seen.append(sys.stdout.seen) or left.pop(0))
    monkeypatch.setattr(sys, "stdout", File())
    assert run("generate 'a cat' --model model --tokens 3") == 0
    assert seen == ["a cat", "a catb", "a catbc"]


def test_a_models_words_cannot_steer_the_terminal(shell):
    def evil(tokenizer):
        kept = {letter: i for i, letter in enumerate(LETTERS) if letter not in "abcdefghijklm"}
        tokenizer["model"]["vocab"] = kept | {f"\x1b[{i}J\u202e": i for i in range(13)}

    change_tokenizer(evil)
    out = shell("generate no\x07 --model model --tokens 60 --temperature 3")
    assert out.startswith("no\\x07")
    assert "\\x1b[" in out
    assert out.replace("\n", "").isprintable()


# --- a chat ---------------------------------------------------------------------------------------


def test_a_message_is_answered_and_the_answer_printed_alone(shell):
    assert shell(GREEDY, "the cat", "--chat") == f"{greedily('u the cat.a ')}\n"


@pytest.mark.parametrize("system", ["", "on"])
def test_each_line_is_answered_by_all_that_was_said(shell, monkeypatch, system):
    typed(monkeypatch, "the cat\n\n  \n the dog \nsat")
    out = shell(GREEDY, "--chat", *["--system", system] * bool(system))
    before, answers = f"s {system}." if system else "", []
    for line in ("the cat", "the dog", "sat"):
        before += f"u {line}."
        answers.append(greedily(before + "a "))
        before += f"a {answers[-1]}."
    assert out == "".join(f"{text}\n" for text in answers)
    typed(monkeypatch, "")
    assert (shell(GREEDY, "--chat"), shell.err) == ("", "")


def test_ctrl_c_ends_an_answer_and_not_the_talk(shell, monkeypatch):
    typed(monkeypatch, "the cat\nthe dog\n")
    with monkeypatch.context() as patched:
        asked = interrupted(patched, 4)
        first, second = shell(GREEDY, "--chat").splitlines()
    assert first == greedily("u the cat.a ")[:3]
    assert asked[1] == f"u the cat.a {first}.u the dog.a "
    assert second
    interrupted(monkeypatch, 4)
    shell(GREEDY, "the cat", "--chat", code=130)


def test_a_terminal_shows_where_to_type(monkeypatch):
    """Where an answer is read to its end before the next line is asked for."""
    typed(monkeypatch, "", terminal=True)
    signs, lines = [], ["the cat"]

    def read(sign=""):
        signs.append((sign, sys.stdout.seen))
        if not lines:
            raise EOFError
        return lines.pop()

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdout", File())
    assert run(GREEDY, "--chat") == 0
    assert signs == [("> ", ""), ("> ", f"{greedily('u the cat.a ')}\n")]


# --- a file of prompts ----------------------------------------------------------------------------


def test_a_file_of_prompts_is_answered_by_one_loading(shell, monkeypatch):
    template("{% for t in tools or [] %}{{ t }}{% endfor %}" + CHAT)
    parts, ran = [{"type": "text", "text": "the "}, {"type": "text", "text": "dog"}], {"role": "assistant"}
    lines = {
        "the cat ": {"prompt": "the cat ", "completion": "sat", "id": "é", "generated": "old"},
        "u a.a b.u the dog.a ": {"messages": [
            {"role": "user", "content": "a"}, ran | {"content": "b"},
            {"role": "user", "content": "the dog"}, ran | {"content": "ran"},
        ]},
        "xu the dog.a ": {"messages": [{"role": "user", "content": parts}], "tools": ["x"]},
    }  # fmt: skip
    Path("p.jsonl").write_text("\n\n".join(map(json.dumps, lines.values())))
    loaded, right = [], Llama.load
    monkeypatch.setattr(Llama, "load", lambda *a, **k: loaded.append(a) or right(*a, **k))
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert shell(GREEDY, "p.jsonl", "-o", "out.jsonl") == "3 answers written to out.jsonl\n"
    assert re.search(r" 3/3 \[.*prompt", sys.stderr.getvalue())
    assert "not read: completion (1 row), id (1), generated (1); each answer is written with" in sys.stderr.getvalue()
    assert len(loaded) == 1
    assert '"id": "é"' in Path("out.jsonl").read_text("utf-8")
    written = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert written == [{**line, "generated": greedily(text)} for text, line in lines.items()]


def test_ctrl_c_leaves_the_answers_so_far(shell, monkeypatch):
    Path("p.jsonl").write_text('{"prompt": "the cat "}\n' * 3)
    tokens = len(greedily("the cat "))
    with monkeypatch.context() as patched:
        interrupted(patched, 2 * tokens + 1)
        said = shell(GREEDY, "p.jsonl", "-o", "out.jsonl", code=130)
    assert (said, shell.err) == ("2 of 3 answers written to out.jsonl\n", "\nminilora: interrupted\n")
    assert len(Path("out.jsonl").read_text().splitlines()) == 2
    interrupted(monkeypatch, 1)
    shell(GREEDY, "p.jsonl", "-o", "none.jsonl", code=130)
    assert not Path("none.jsonl").exists()


def test_prompts_are_read_before_the_model_is(shell, monkeypatch):
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail("the model is loaded"))
    Path("p.jsonl").write_text('{"prompt": "a"}\n{"text": "a"}')
    said = shell.refused(GREEDY, "p.jsonl", "-o", "out.jsonl")
    assert said == "'p.jsonl': line 2: it has neither prompt nor messages"
    Path("p.jsonl").write_text('{"prompt": "a", "context": "b", "completion": "c"}\n')
    said = shell.refused(GREEDY, "p.jsonl", "-o", "out.jsonl")
    assert "its context would be ignored" in said
    assert not Path("out.jsonl").exists()


# --- which model, and where -----------------------------------------------------------------------


def test_without_a_model_glassllms_is_taken(shell, monkeypatch):
    pytest.importorskip("glassllm")
    out = shell("finetune text --save a --steps 2 --batch-size 2 --length 16 --target-modules q_proj --eval-rows 2")
    assert "glassllm's English model: 852,608 parameters in float32" in out
    assert losses(out)[2] < losses(out)[0]
    assert json.loads(Path("a/adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert shell("generate 'The cat' --adapter a --tokens 5").startswith("The cat")
    monkeypatch.setitem(sys.modules, "glassllm", None)
    for command in ("generate the", "finetune text --save b"):
        assert shell.refused(command).startswith("running without --model needs glassllm (")


def test_each_command_computes_where_it_is_told(shell, standin):
    """What lies on another device than the rest is refused, so everything is there."""
    found = {}
    for backend in ("numpy", "cupy"):
        some = "finetune text --model model --batch-size 4 --length 8 --rank 2 --steps 2 --eval-rows 4"
        assert (f", {standin.device}\n" in shell(some, "--save", backend, "--backend", backend)) == (backend == "cupy")
        said = shell(GREEDY, "a cat", "--adapter", backend, "--backend", backend)
        loss = shell(f"evaluate text --model model --length 8 --adapter {backend} --backend {backend} --quantize nf4")
        found[backend] = (said, loss.replace(backend, "a")), load_adapter(backend)
    assert found["numpy"][0] == found["cupy"][0]
    for path, adapter in found["numpy"][1].items():
        np.testing.assert_allclose(found["cupy"][1][path].lora_B, adapter.lora_B, atol=1e-5)


@pytest.mark.parametrize("command", ["generate 'the cat'", "evaluate text"])
def test_a_terminal_says_loading_until_the_model_is_loaded(monkeypatch, command):
    seen, right, shown = [], Llama.load, Terminal()
    monkeypatch.setattr(Llama, "load", lambda *a, **k: seen.append(shown.getvalue()) or right(*a, **k))
    monkeypatch.setattr(sys, "stderr", shown)
    assert run(command, "--model", "model") == 0
    assert seen == ["loading model ..."]
    assert shown.getvalue().startswith("loading model ...\r\x1b[K")


@pytest.mark.parametrize("arguments", [["the \udcff"], ["the \udcff", "--chat"], ["--chat"]])
def test_a_prompt_that_is_no_text_is_refused(shell, monkeypatch, arguments):
    typed(monkeypatch, "the \udcff")
    said = "'utf-8' codec can't encode character '\\udcff' in position 4: surrogates not allowed"
    assert shell.refused(GREEDY, *arguments) == said
