"""A system message: asked for, kept with the adapter, and used again."""

import json
from pathlib import Path

import pytest

from minilora import Llama, attach, load_adapter
from minilora.files.adapters import system_message
from minilora.texts import printable

from ..support.command_line import run
from ..support.language import CHAT, greedily, template

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")
pytest.importorskip("jinja2", reason="pip install -e '.[models]'")

LONG = "the cat sat on " * 9


@pytest.fixture(autouse=True)
def chats(folder):
    """Chats in e.jsonl, of a model whose template writes system messages."""
    template(CHAT)
    write("e.jsonl", *[None] * 4)


def write(name, *systems):
    """Write chats, each of which begins with one of the system messages, or with none."""
    lines = []
    for x, text in zip("abcdefghij", systems, strict=False):
        turns = {"system": text, "user": f"the {x}", "assistant": "mat"}
        lines.append({"messages": [{"role": r, "content": words} for r, words in turns.items() if words]})
    Path(name).write_text("\n".join(map(json.dumps, lines)))


def kept(*more):
    """Train on the chats in e.jsonl, and return the system message that is kept with the adapter."""
    some = "finetune e.jsonl --save b --model model --steps 1 --batch-size 2 --rank 2 --lr 0.1 --overwrite"
    assert run(f"{some} --target-modules q_proj,down_proj", *more) == 0
    return system_message(Path("b"))


def test_a_message_of_all_chats_or_asked_for_is_kept(capsys):
    assert kept() is None
    for systems, message in ((["sat"] * 4, "sat"), (["sat", "on"] * 2, None), (["sat", None] * 2, None)):
        write("e.jsonl", *systems)
        assert kept() == message
    assert kept("--system", "sat") == "sat"
    write("e.jsonl", *["sat"] * 4)
    assert kept("--system", "") is None
    capsys.readouterr()
    assert kept("--system", LONG) == LONG
    end = "is saved with the adapter for generate and evaluate; chats with their own keep it\n"
    assert f"system   {printable(LONG, 80)}\n         {end}" in capsys.readouterr().out


def test_chats_given_a_message_train_as_those_that_have_it():
    found = []
    for systems, more in ((["sat"] * 4, []), ([None] * 4, ["--system", "sat"]), ([None] * 4, [])):
        write("e.jsonl", *systems)
        kept("--steps", "2", *more)
        found.append(load_adapter("b")["model.layers.0.self_attn.q_proj"].lora_B.tobytes())
    assert found[0] == found[1] != found[2]


def test_generate_takes_the_kept_message_and_says_so(shell):
    note = "minilora: using the adapter's system message (--system replaces it): {}\n"
    kept("--system", LONG)
    shell("generate the --model model --adapter b --tokens 1 --chat")
    assert shell.err == note.format(printable(LONG, 80))
    kept("--system", "sat")
    write("e.jsonl", None, None)
    Path("p.jsonl").write_text('{"prompt": "the cat"}')
    asked = "generate --model model --adapter b --temperature 0 --tokens 9"
    model = attach(Llama.load("model"), load_adapter("b"))
    cases = {(): ("s sat.", note.format("sat")), ("--system", "sat"): ("s sat.", ""), ("--system", "on"): ("s on.", "")}
    for more, (system, said) in (cases | {("--system", ""): ("", "")}).items():
        answer = shell(asked, "the cat", "--chat", *more)
        assert (answer, shell.err) == (greedily(f"{system}u the cat.a ", model) + "\n", said)
        Path("out.jsonl").unlink(missing_ok=True)
        shell(asked, "e.jsonl", "-o", "out.jsonl", *more)
        assert shell.err == said
        answers = [json.loads(line)["generated"] for line in Path("out.jsonl").read_text().splitlines()]
        assert answers == [greedily(f"{system}u the {x}.a ", model) for x in "ab"]
    for prompt in (["the cat"], ["p.jsonl", "-o", "answer.jsonl"]):  # no chat
        shell(asked, *prompt)
        assert shell.err == ""


def test_evaluate_says_whose_message_it_takes(shell):
    kept("--system", "sat")
    write("e.jsonl", None, None)
    asked = "evaluate e.jsonl --model model --adapter b"
    assert "\nsystem   sat (the adapter's; --system replaces it)\nloss " in shell(asked)
    assert "\nsystem   on\nloss " in shell(asked, "--system", "on")
    assert "system" not in shell(asked, "--system", "")


def test_a_text_takes_no_message_and_needs_none(shell):
    """One that was kept is none of a text's; one that is given would be lost."""
    kept("--system", "sat")
    asked = "evaluate text --model model --adapter b"
    assert "system" not in shell(asked)
    assert shell.refused(asked, "--system", "on") == "--system applies to chats, but 'text' has none"
