"""What the folders of examples say of themselves, and which script wrote each recording."""

import json
import re
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES, RECORDINGS = ROOT / "examples", ROOT / "docs" / "recordings"


def found_in(value, key):
    """Yield what stands under a key, however deep."""
    if isinstance(value, dict):
        yield from (value[key],) if key in value else ()
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from found_in(each, key)


@pytest.mark.parametrize("file", sorted(RECORDINGS.glob("*.json")), ids=lambda file: file.stem)
def test_each_recording_names_its_script_and_its_days(file):
    """And its own name stands in the script, or is an option's value there."""
    recorded = json.loads(file.read_text(encoding="utf-8"))
    assert recorded["script"].startswith("examples/")
    text = (ROOT / recorded["script"]).read_text(encoding="utf-8")
    assert file.name in text or "--json" in text
    days = list(found_in(recorded, "when"))
    assert days
    for when in days:
        for day in re.findall(r"\d{4}-\d\d-\d\d", when) or [when]:
            assert date.fromisoformat(day) > date(2026, 1, 1)


def linked(folder):
    """Return what a folder's README links to."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return {(folder / target.partition("#")[0]).resolve() for target in re.findall(r"\]\(([^)]+)\)", text)}


@pytest.mark.parametrize("folder", ["", "golden", "measure", "upstream"])
def test_a_readme_links_everything_in_its_folder(folder):
    here = EXAMPLES / folder
    own = {path for path in here.iterdir() if path.name not in ("README.md", "__pycache__", "written.py")}
    assert own <= {path if path.name != "README.md" else path.parent for path in linked(here)}
    assert all(path.exists() for path in linked(here))


def test_the_table_of_measurements_has_each_recording():
    text = (EXAMPLES / "measure" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`([\w-]+)\.json`", text)) == {file.stem for file in RECORDINGS.glob("*.json")}
    for script, cell in re.findall(r"^\| \[`([\w./]+)`\]\([^)]+\) \| (.*?) \|", text, re.M):
        path = (EXAMPLES / "measure" / script).resolve().relative_to(ROOT).as_posix()
        for name in re.findall(r"`([\w-]+)\.json`", cell):
            assert json.loads((RECORDINGS / f"{name}.json").read_text(encoding="utf-8"))["script"] == path
