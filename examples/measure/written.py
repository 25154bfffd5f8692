"""Which script wrote a recording, and when: each of docs/recordings/*.json says it."""

import json
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDINGS = ROOT / "docs" / "recordings"


def written(script: str) -> dict[str, str]:
    """Return what a recording says of the script, a path, that writes it today."""
    return {"script": Path(script).resolve().relative_to(ROOT).as_posix(), "when": date.today().isoformat()}


def keep(path: Path, script: str, found: dict[str, Any]) -> None:
    """Write a recording: which script wrote it when, and what it found."""
    path.write_text(json.dumps(written(script) | found, indent=1) + "\n", encoding="utf-8")
