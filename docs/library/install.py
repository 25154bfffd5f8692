"""What install.md says."""

# %% Install

import tomllib

from pages import ROOT, says

project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
says(f"You need Python {project['requires-python'].removeprefix('>=')} or later.")
