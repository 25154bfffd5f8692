"""The JavaScript of the pages that train in the browser, run by Node."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

LIVE = Path(__file__).parents[2] / "docs" / "_static" / "live"
SCRIPTS = Path(__file__).parent / "live"


NO_NODE = pytest.mark.skipif(shutil.which("node") is None, reason="no node on the PATH")


def by_node(test):
    """Mark a test that asks Node."""
    return pytest.mark.site(NO_NODE(test))


def node(script, *arguments, **given):
    """Run one of the scripts beside this file, with JSON on its standard input, and return what it prints as JSON."""
    command = ["node", str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout or "null")


def numbers(path, comment):
    """Return the numbers of the equations that the lines of a file bear, in either language."""
    return re.findall(rf"{comment} eq\. \(([\w.]+)\)", path.read_text(encoding="utf-8"))
