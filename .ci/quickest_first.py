"""A plugin for pytest under mutmut: any test that fails ends a mutant's run, so those that take least run first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SLOW = 0.05
"""Seconds. Up to here a module's tests stay together, so that what they share is made once."""


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Put tests in order by the time that they took without a mutant."""
    measured = Path("mutmut-stats.json")
    if measured.exists():
        took = json.loads(measured.read_text(encoding="utf-8"))["duration_by_test"]
        seconds = {item.nodeid: took.get(item.nodeid, 0.0) for item in items}
        items.sort(key=lambda item: (seconds[item.nodeid] > SLOW, str(item.path), seconds[item.nodeid]))
