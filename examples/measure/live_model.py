"""What the model in the page learns of the text that stands there.

`python examples/measure/live_model.py` takes half a minute.
Node runs the page's own code with the page's settings, and docs/recordings/live-model.json keeps what it gave.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile

from written import RECORDINGS, ROOT, keep

DOCS = ROOT / "docs"
sys.path[:0] = [str(DOCS), str(ROOT)]

from build import write_model

LIVE = DOCS / "_static" / "live"
SCRIPT = ROOT / "tests" / "site" / "live" / "model.mjs"
RESULT = RECORDINGS / "live-model.json"
SETTINGS = {"rank": 8, "alpha": 16, "rate": 0.003, "prompt": "And God said"}


def text() -> str:
    """Return the text that stands in the page."""
    page = (LIVE.parents[1] / "_ext" / "live-model.html").read_text(encoding="utf-8")
    return re.search(r"<textarea.*?>(.*?)</textarea>", page, re.S)[1]  # type: ignore[index]


def run(steps: int) -> dict:
    """Return what so many steps give."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["node", str(SCRIPT), str(LIVE), str(write_model() / "glassllm"), folder]
        asked = json.dumps({"text": text(), "steps": steps, **SETTINGS})
        done = subprocess.run(command, input=asked, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    found = run(60)
    assert found["best"]["step"] + 20 == 60, "it stops at another step"
    keep(RESULT, __file__, {name: found[name] for name in ("held", "best", "windows", "texts", "seconds")})
