"""Each claim about each problem as a test of pytest, for the implementation that ``--lora`` names: see `plugin`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .report import became

if TYPE_CHECKING:
    from .plugin import Held


def test_claim(held: Held, lora_id: str) -> None:
    """The claim holds on the problem, or is known to fail and does."""
    case, reason = held.outcome(lora_id), held.known.get(lora_id)
    if reason is not None and not case.failed:
        pytest.fail(f"it is known to fail ({reason}), and {became(case)}: take its line out", pytrace=False)
    if reason is not None:
        pytest.xfail(f"{reason}: {case.verdict}")
    if case.failed:
        pytest.fail(held.why(case), pytrace=False)
    if case.state != "right":
        pytest.skip(case.verdict)
