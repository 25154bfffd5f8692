"""What a `minilora.guards.boundedprocess` runs: a file's function ``answer``, asked a line of JSON at a time.

It is run as a script of its own and imports nothing of this package, so that it starts quickly and fills little.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from typing import Any


def main(answers: str) -> None:
    """Say which process this is, then answer until the input ends."""
    out = sys.stdout.buffer

    def say(value: Any) -> None:
        out.write(json.dumps(value).encode() + b"\n")
        out.flush()

    answer = runpy.run_path(answers)["answer"]
    say({"pid": os.getpid()})  # on Windows not that of the process that was started
    for line in sys.stdin.buffer:
        say(answer(json.loads(line)))


if __name__ == "__main__":
    main(sys.argv[1])
