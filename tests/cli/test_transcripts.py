"""What commands print and refuse, whole: each file is a session, and is replayed in a folder with small inputs.

A number with decimals may differ by a unit of the last one, since processors round differently.

``python -m pytest -m '' tests/cli/test_transcripts.py --approve`` writes them anew from their commands.
"""

import contextlib
import io
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from minilora import Adapter, LoRA, adapt, adapters, article, save_adapter
from minilora.cli import _parser

from ..support.adapter_folder import change_json
from ..support.command_line import run
from ..support.compare import same_but_rounding
from ..support.disk import contents
from ..support.language import CHAT, TEXT, tiny_llama, write_folder

SESSIONS = sorted(Path(__file__).with_name("transcripts").glob("*.txt"))
SILENT = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}.{% endif %}{% endfor %}"
EXAMPLES = [
    *({"prompt": f"the cat {x} ", "completion": "sat"} for x in "abcdefghij"),
    *({"messages": [{"role": "user", "content": x}, {"role": "assistant", "content": "mat"}]} for x in "klmnopqrst"),
    {"text": "the dog sat on the log"},
]
DIFFERS = [
    (r"after \d\d? s\b", "after T"),
    (r"about \d+ (s|min) for", "about T for"),
    (r"(?m)^( *\d+ +\d+\.\d{3}(?: +\d+\.\d{3})?) +[\d,]+ +\d+ (?:s|min)(   of steps? .*)$", r"\1  SPEED  LEFT\2"),
    (r"[\d,]+ x 1e-6 of [\d,]+ x 1e-6 MB are free", "FREE of WHOLE MB are free"),
    (r"CPU \(.*?\)", "CPU"),
    (r"\(choose from .*?\)", "(choose from ...)"),  # Python's own words
]
"""What differs from run to run, or from machine to machine."""


def inputs():
    """Write what the commands read."""
    write_folder(Path("model"), tiny_llama())
    write_folder(Path("stranger"), tiny_llama(seed=1))
    change_json(write_folder(Path("short"), tiny_llama()) / "config.json", max_position_embeddings=12)
    write_folder(Path("chatty"), tiny_llama())
    for name in ("chatty", "short"):
        Path(name, "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT}))
    Path("text").write_text(TEXT)
    Path("other").write_text("a log and a mat.\n" * 9)
    Path("e.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)))
    chats = [example["messages"] for example in EXAMPLES if "messages" in example]
    Path("chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    system = {"role": "system", "content": "be a dog"}
    Path("systems.jsonl").write_text("\n".join(json.dumps({"messages": [system, *chat]}) for chat in chats))


def adapters_and_bases():
    """Write adapters of every kind, in number and in form, and a file of weights for each."""
    square = LoRA(np.eye(1, 4), np.ones((4, 1)), 2.0)
    row, pair = LoRA(np.ones((1, 3), "f4"), np.ones((2, 1), "f4"), 1.0), np.diag([3.0, 1.0])
    each = {
        "stabilised": {
            "enc.fc": Adapter(np.eye(2, 5), np.eye(3, 2), 1.0, use_rslora=True),
            "head": Adapter(np.eye(4, 3, dtype="f4"), np.ones((7, 4), "f4"), 6.0, use_rslora=True),
        },
        "kinds": {
            "conv": Adapter(np.ones((1, 12)), np.ones((4, 1)), 1, kind="conv2d", kernel=(2, 3)),
            "eight": LoRA(np.eye(8, 11), np.eye(9, 8), 8.0),
            "emb": Adapter(np.eye(2, 30), np.eye(4, 2), 1.0, kind="embedding"),
            "nine": LoRA(np.eye(9, 200), np.diag(np.arange(9.0, 0, -1)), 3.0),
        },
        "long": {
            f"h.{i}.{name}": LoRA(pair @ np.eye(2, wide), np.eye(4, 2) * (i + 1, 1), 6.0)
            for i in range(13) for name, wide in (("q", 3), ("k", 5))
        },
        "as_many_as_are_shown": {f"h.{i}.q": row for i in range(24)},
        "by_weights": {f"l.{i}.mlp.{name}": row for i in range(13) for name in ("gate_proj", "up_proj")},
        "told": {"fc": row},
        "square": {"c": square, "s": square},
    }  # fmt: skip
    options = {
        "by_weights": {"target_parameters": [f"{path}.weight" for path in each["by_weights"]]},
        "told": {"system": "Be brief.\nBe kind. " * 20},
        "square": {"fan_in_fan_out": True},
    }
    for name, layers in each.items():
        save_adapter(name, layers, **options.get(name, {}))
        shapes = {path: (30, 4) if path == "emb" else lora.shape for path, lora in layers.items()} | (
            {"conv": (4, 2, 2, 3)} if name == "kinds" else {}
        )
        dtypes = {path: lora.lora_A.dtype for path, lora in layers.items()}
        save_file({f"{p}.weight": np.zeros(s, dtypes[p]) for p, s in shapes.items()}, f"{name}.safetensors")


BAD = {
    "bad_prompts.jsonl": """{"prompt": "a"}
{
[]
{"prompt": 3}
{"prompt": ""}
{"messages": {"a": 1}}
{"messages": [{"role": "assistant", "content": "a"}]}
{"messages": [{"content": "a"}]}
{"messages": []}
{"text": "a"}
{"messages": [3]}""",
    "bad_one.jsonl": '{"text": "the cat"}\n{"prompt": "the", "completion": ""}',
    "bad_two.jsonl": '{"text": "the cat"}\n{\n{"text": 3}\n{"text": "the cat"}',
    "diary.json": '{"diary": 1}',
    "list.json": '["format", "verdict"]',
    "short.safetensors": 20 * "x",
    "pickle.bin": "x",
    "known.txt": "",
    "tools.jsonl": '{"messages": [{"role": "user", "content": "x"}], "tools": ["x"]}',
}


def odd_inputs():
    """Write what is refused."""
    for name, lines in BAD.items():
        Path(name).write_text(lines)
    Path("binary").write_bytes(b"\xff")
    Path("ring").symlink_to("gnir")
    Path("gnir").symlink_to("ring")
    Path("folder.png").mkdir()
    os.mkfifo("pipe.png")
    Path("link.png").symlink_to("text")
    Path("link").symlink_to("text")
    Path("hard").hardlink_to("text")
    write_folder(Path("silent"), tiny_llama())
    Path("silent/tokenizer_config.json").write_text(json.dumps({"chat_template": SILENT}))
    write_folder(Path("wordy"), tiny_llama())
    words = json.loads(Path("wordy/tokenizer.json").read_text())
    words["model"]["vocab"]["t"] = 40
    Path("wordy/tokenizer.json").write_text(json.dumps(words))
    for name, layer, width in (("fit", 1, 12), ("deep", 7, 12), ("wide", 1, 13)):
        save_adapter(name, {f"model.layers.{layer}.self_attn.q_proj": LoRA(np.ones((1, width)), np.ones((16, 1)), 1.0)})
    Path("fit/x.svg").touch()
    model, rng = tiny_llama(dtype="float32"), np.random.default_rng(0)
    save_adapter("dora", adapters(adapt(model, ["q_proj"], rank=1, alpha=1, rng=rng, use_dora=True)))


def replayed(session: str) -> str:
    """Return a session with what its commands print now: stdout, stderr, and the exit code where it is not 0."""
    lines = []
    for command in re.findall(r"(?m)^\$ minilora ?(.*)$", session):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(command)
        shown = (out.getvalue() + err.getvalue()).replace(os.path.realpath("."), "CWD")
        for pattern, instead in DIFFERS:
            shown = re.sub(pattern, instead, shown)
        lines.append(f"$ minilora {command}".rstrip() + f"\n{shown}" + (f"[{code}]\n" if code else ""))
    return "\n".join(lines)


@pytest.mark.parametrize("session", SESSIONS, ids=lambda path: path.stem)
def test_a_session_prints_what_it_printed(session, tmp_path, monkeypatch, request):
    for package in ("tokenizers", "jinja2"):
        pytest.importorskip(package, reason="pip install -e '.[models]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minilora"])
    monkeypatch.setattr("minilora.language.finetune.megabytes", lambda count: f"{count:,.0f} x 1e-6")
    adapters_and_bases() if session.stem == "adapters" else inputs()
    if session.stem == "refused":
        odd_inputs()
        narrow = partial(article.run, in_features=2, out_features=2)  # some of it is refused with the data there
        monkeypatch.setattr(article, "run", narrow)
    before = contents()
    printed = replayed(session.read_text(encoding="utf-8"))
    approved = session.read_text(encoding="utf-8")
    if request.config.getoption("approve"):
        session.write_text(approved := printed, encoding="utf-8")
    if not same_but_rounding(printed, approved):
        assert printed == approved  # shows where
    if session.stem == "refused":  # before anything has changed
        assert contents() == before
    assert not [*Path().rglob("*.checkpoint")]  # what nobody asked to keep


def described(name, parser):
    """Yield what a command's parser has been told, a line for each option: what argparse writes differs by version."""
    yield f"$ minilora {name}".rstrip()
    yield f"{parser.formatter_class.__name__} {sorted(parser._defaults)}"
    yield from filter(None, (parser.description, parser.epilog))
    for group in parser._action_groups:
        for action in group._group_actions:
            read = action.type.__name__ if isinstance(action.type, type) else action.type and "by a function"
            given = [*action.option_strings, action.metavar, action.nargs, read, "required" * action.required]
            words = " ".join(map(str, filter(None, given))) or action.dest
            commands = {one.dest: one.help for one in getattr(action, "_choices_actions", ())}
            choices = "" if action.choices is None else f" of {commands or [*action.choices]}"
            yield f"  {group.title}: {words}{choices} = {action.default!r} ({action.dest}): {action.help}"


def test_each_command_has_its_options(request):
    """All that a parser says of itself, whole: `--approve` writes it anew."""
    _parser.cache_clear()  # it is built anew: another test may have built it
    (subparsers,) = (parser := _parser())._subparsers._group_actions
    parsers = {"": parser, **subparsers.choices}
    found = "\n".join(line for name, parser in parsers.items() for line in [*described(name, parser), ""])
    file = Path(__file__).with_name("options.txt")
    if request.config.getoption("approve"):
        file.write_text(found, encoding="utf-8")
    assert found == file.read_text(encoding="utf-8")
    assert all(action.help for parser in parsers.values() for action in parser._actions if action is not subparsers)
    assert all(callable(parser.get_default("command")) for parser in subparsers.choices.values())


@pytest.mark.parametrize(
    ("text", "other", "same"),
    [
        ("loss 3.3660, 17 s", "loss 3.3659, 17 s", True),
        ("perplexity 59.6", "perplexity 59.59", True),
        ("loss 3.3660", "loss 3.3658", False),
        ("loss 3.3660, 17 s", "loss 3.3660, 18 s", False),
        ("loss 3.3660", "lost 3.3660", False),
        ("1.0 2.0", "2.0 1.0", False),
        ("1,000.5", "2,000.5", False),
        ("1.0 2.0", "1.0 2.0 3.0", False),
    ],
)
def test_only_a_unit_of_a_last_decimal_may_differ(text, other, same):
    assert same_but_rounding(text, other) is same
