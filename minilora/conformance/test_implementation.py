"""Each claim about each problem as a test of pytest, for the implementation that ``--lora`` names: see `plugin`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plugin import HeldCase


def test_claim(case: HeldCase) -> None:
    """The claim holds on the problem, or is known to fail and does."""
    case()
