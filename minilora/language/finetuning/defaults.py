"""Settings that fit a model of a size. The command line names them in its help, so nothing here needs NumPy."""

from __future__ import annotations

from typing import Any

SMALL = 10_000_000
"""Parameters up to which a model is a small one."""
FITTING: dict[str, tuple[Any, Any]] = {"steps": (300, 80), "batch_size": (16, 4), "lr": (3e-3, 1e-3)}
"""What fits a small model, tried on glassllm's 0.85 million parameters, and a larger one, on SmolLM2's 135 million."""

ADAPTER: dict[str, Any] = {"target_modules": "all-linear", "rank": 8, "alpha": 16.0}
"""What a new adapter is, where nothing else is said; one that goes on brings its own."""


def fitting(numbers: int) -> dict[str, Any]:
    """Return the settings that fit a model of so many parameters."""
    return {name: larger if numbers > SMALL else small for name, (small, larger) in FITTING.items()}
