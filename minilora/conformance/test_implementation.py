"""The tests of each claim on each problem, for the implementation given by ``--lora``; see `plugin`."""

from __future__ import annotations

from collections.abc import Callable


def test_claim(case: Callable[[], None]) -> None:
    """Check that the claim holds for the problem, or that it fails if it is listed as a known failure."""
    case()
