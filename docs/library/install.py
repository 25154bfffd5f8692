"""What install.md says."""

# %% Install

import re
import tomllib

from pages import ROOT, says

project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
for extra in re.findall(r'`"\.\[(\w+)\]"`', (ROOT / "docs/library/install.md").read_text(encoding="utf-8")):
    assert extra in project["optional-dependencies"], extra
assert [line.partition(">")[0] for line in project["dependencies"]] == ["numpy"]  # and no other package
says(f"You need Python {project['requires-python'].removeprefix('>=')} or later.")
