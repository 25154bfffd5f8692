"""Each claim about each problem as a test of pytest, for the implementation that ``--lora`` names: see `plugin`."""

from __future__ import annotations

from collections.abc import Callable


def test_claim(case: Callable[[], None]) -> None:
    """The claim holds on the problem, or is known to fail and does."""
    case()
