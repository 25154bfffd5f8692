"""What is-my-adapter-applied.md asserts and shows; the names are the page's own."""

import contextlib
import io
import shutil
import tempfile
from pathlib import Path

from minilora.cli import main

with tempfile.TemporaryDirectory() as made, contextlib.redirect_stdout(io.StringIO()):
    assert main(["golden", made + "/golden"]) == 0
    shutil.copytree(Path(made, "golden", "bases", "tied"), "model")
    shutil.copytree(Path(made, "golden", "adapters", "rslora"), "adapter")

# %% 1. Is there something in the file?

assert status == 1

# %% 2. Does every tensor land?

assert status == 1

# %% 3. What does the engine do with it?

assert status == 1

assert status == 1

# %% 5. Is it merged?

assert status == 0
