"""What `examples/microlora.py` prints, as it is and with the changes that the page's challenges ask for.

``python examples/measure/microlora_runs.py`` runs all of them again, some minutes, and writes
docs/recordings/microlora.json, whose lines the page shows.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import tokenize
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from written import RECORDINGS, ROOT, keep

FILE = ROOT / "examples" / "microlora.py"
RESULT = RECORDINGS / "microlora.json"

RANK = "RANK, ALPHA = 2, 4"
ADAPT = "model.layers = {name: LoRA(linear, RANK, ALPHA) for name, linear in model.layers.items()}"
MERGE = "model.layers = {name: lora.merged() for name, lora in model.layers.items()}"
ASIDE = """head = model.layers.pop("head")
    {}
    model.layers["head"] = head"""
CHALLENGES: dict[str, list[tuple[str, str]]] = {
    "as it is": [],
    "rank 1": [(RANK, "RANK, ALPHA = 1, 2")],
    "rank 8": [(RANK, "RANK, ALPHA = 8, 16")],
    "the head trains whole": [(ADAPT, ASIDE.format(ADAPT)), (MERGE, ASIDE.format(MERGE))],
}
"""The pairs of old and new text of each."""


def digest() -> str:
    """Return what tells the file's code, less docstring and comments, and its lists of names from any others."""
    with FILE.open("rb") as file:
        _, docstring, *tokens = tokenize.tokenize(file.readline)  # the first is the encoding
    code = FILE.read_text(encoding="utf-8").splitlines()
    for token in tokens:
        if token.type == tokenize.COMMENT:  # other tokens, as of an f-string, differ between versions of Python
            code[token.start[0] - 1] = code[token.start[0] - 1][: token.start[1]].rstrip()
    code = [line for line in code[docstring.end[0] :] if line]
    names = [path.read_text(encoding="utf-8") for path in sorted((FILE.parent / "names").glob("*.txt"))]
    return hashlib.sha256("\n".join([*code, *names]).encode()).hexdigest()


def run(name: str) -> list[str]:
    """Return the lines that the file prints with a challenge's changes, in a process and a folder of its own."""
    text = FILE.read_text(encoding="utf-8")
    for old, new in CHALLENGES[name]:
        if text.count(old) != 1:
            raise ValueError(f"{old!r} is not once in {FILE.name}")
        text = text.replace(old, new)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / FILE.name
        copy.write_text(text, encoding="utf-8")
        (Path(folder) / "names").symlink_to(FILE.parent / "names")
        command = [sys.executable, str(copy)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def lines(name: str) -> list[str]:
    """Return the recorded lines."""
    return RECORDED["runs"][name]


def losses(name: str) -> list[tuple[float, float]]:
    """Return the losses on unseen people and dinosaurs: before LoRA, and after it."""
    unseen = {"people": [], "dinosaurs": []}
    for line in lines(name):
        if line.startswith("loss on"):
            unseen[line.split()[-2].rstrip(":")].append(float(line.split()[-1]))
    return list(zip(*unseen.values(), strict=True))


def trained(name: str) -> list[int]:
    """Return how many numbers each of the two phases trained."""
    return [int(line.split()[-1]) for line in lines(name) if line.startswith("numbers trained")]


RECORDED = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}

if __name__ == "__main__":
    with ThreadPoolExecutor() as pool:
        runs = dict(zip(CHALLENGES, pool.map(run, CHALLENGES), strict=True))
    keep(RESULT, __file__, {"file": digest(), "runs": runs})
