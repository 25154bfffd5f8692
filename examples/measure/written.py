"""Which script wrote a recording, and when: each of docs/recordings/*.json says it."""

from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORDINGS = ROOT / "docs" / "recordings"


def written(script: str) -> dict[str, str]:
    """Return what a recording says of the script, a path, that writes it today."""
    return {"script": Path(script).resolve().relative_to(ROOT).as_posix(), "when": date.today().isoformat()}
