"""Sessions: requests to one living engine, one after another, and what each of them asks for.

A case asks a program once. What an engine keeps from one request to the next shows only in a session: weights under a
name, keys and values of a prompt, a scale, an update that is merged in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .bases import LIVING, TOKENS
from .cases import DOWN, GATE, Adapter, K, V, adapter_files, block, drawn
from .formulas import Arrays, Given

PREFIX, TAIL = 256, 6
"""Tokens of a prompt: those that several requests share, and those that each has for itself."""


@dataclass(frozen=True)
class Use:
    """An adapter, as a request asks for it."""

    name: str  # that the engine knows it by
    folder: Path
    weight: float = 1.0  # what the update is multiplied by


@dataclass(frozen=True)
class Request:
    """What an engine is asked."""

    prompts: np.ndarray  # token ids (prompts, T)
    adapters: tuple[Use | None, ...]  # of each prompt; None is the base alone
    unload: tuple[str, ...] = ()  # the names that the engine is to forget before
    merged: bool = False  # whether the adapter is to be folded into the weights; after the request it is taken out


@dataclass(frozen=True)
class Step:
    """A request of the table, before it has prompts."""

    adapters: tuple[Use | None, ...]  # of each prompt, or one for all
    unload: tuple[str, ...] = ()
    merged: bool = False


@dataclass(frozen=True)
class Session:
    """Requests that one engine answers in their order."""

    id: str
    note: str
    steps: tuple[Step, ...]
    long: bool = False  # whether the prompts share a long prefix, and each request has one of its own

    @cached_property
    def requests(self) -> tuple[Request, ...]:
        """The requests, with their prompts and with an adapter for each prompt."""
        return tuple(
            Request(prompts, step.adapters * (len(prompts) // len(step.adapters)), step.unload, step.merged)
            for step, prompts in zip(self.steps, self.prompts(SEEDS[self.id]), strict=True)
        )

    def prompts(self, seeds: Sequence[int]) -> list[np.ndarray]:
        """Return the prompts (prompts, T) of each request, none of whose tokens is special."""
        tails = np.array([drawn_tokens(self.id, seed, TAIL) for seed in seeds])
        if not self.long:
            return [tails] * len(self.steps)
        return [np.concatenate([drawn_tokens(self.id, PREFIX, PREFIX), tail])[None] for tail in tails]


def drawn_tokens(id: str, seed: int, length: int) -> np.ndarray:
    """Draw tokens of a session's prompts."""
    return np.random.default_rng([seed, *id.encode()]).integers(2, len(TOKENS), length)


# --- the table --------------------------------------------------------------------------------------

ADAPTERS: Mapping[str, Adapter] = {
    "living-first": Adapter(block(0, K, V, GATE), {"r": 4, "lora_alpha": 10, "alpha_pattern": {"v_proj": 22}}),
    "living-second": Adapter(block(0, K, V, DOWN), {"r": 3, "lora_alpha": 8}),
    "living-first-again": Adapter(block(0, K, V, GATE), {"r": 4, "lora_alpha": 3, "alpha_pattern": {"v_proj": 22}}),
    "living-fewer": Adapter(block(0, V), {"r": 4, "lora_alpha": 6, "alpha_pattern": {"v_proj": 22}}),
}


def folder_of(name: str) -> Path:
    """Return where an adapter stands in the folder of golden adapters."""
    return Path("adapters", name)


@cache
def adapter_of(folder: Path) -> Given:
    """Return a session's adapter, drawn."""
    return drawn(np.random.default_rng([*folder.name.encode()]), ADAPTERS[folder.name], LIVING)


def session_adapters() -> Iterator[tuple[Path, tuple[dict[str, Any], Arrays]]]:
    """Yield the folder of each adapter of the sessions, and what its files hold."""
    for name, adapter in ADAPTERS.items():
        folder = folder_of(name)
        yield folder, adapter_files(adapter, adapter_of(folder), LIVING)


ONE, TWO = Use("one", folder_of("living-first")), Use("two", folder_of("living-second"))
AGAIN, FEWER = Use("one", folder_of("living-first-again")), Use("one", folder_of("living-fewer"))

SESSIONS = (
    Session(
        "one-after-another",
        "An adapter, another, none, and the first again.",
        (Step((ONE,)), Step((TWO,)), Step((None,)), Step((ONE,))),
    ),
    Session(
        "same-name",
        "Under one name other weights with another alpha, and then others for fewer modules.",
        (Step((ONE,)), Step((AGAIN,)), Step((None,)), Step((FEWER,)), Step((ONE,))),
    ),
    Session(
        "scale",
        "One adapter with several scales.",
        (Step((replace(ONE, weight=0.5),)), Step((replace(ONE, weight=3.0),)), Step((None,)), Step((ONE,))),
    ),
    Session(
        "long-prefix",
        f"The prompts share {PREFIX} tokens: what is kept of them is one adapter's alone.",
        (Step((ONE,)), Step((TWO,)), Step((None,)), Step((ONE,))),
        long=True,
    ),
    Session(
        "long-prefix-same-name",
        f"The prompts share {PREFIX} tokens, and the name too: what is kept of them is that of the weights.",
        (Step((ONE,)), Step((AGAIN,)), Step((ONE,))),
        long=True,
    ),
    Session(
        "mixed-batch",
        "Each prompt of a batch has an adapter of its own, or none.",
        (Step((ONE, None, TWO)), Step((TWO, ONE, None)), Step((None, TWO, ONE))),
    ),
    Session(
        "load-unload-load",
        "An adapter is unloaded, and the base answers; then it is loaded again, and then another.",
        (
            Step((ONE,)),
            Step((None,), unload=("one",)),
            Step((ONE,)),
            Step((TWO,), unload=("one",)),
            Step((None,), unload=("two",)),
        ),
    ),
    Session(
        "merge-unmerge",
        "An adapter is folded into the weights and taken out again, and so is another.",
        (
            Step((ONE,)),
            Step((ONE,), merged=True),
            Step((None,)),
            Step((TWO,), merged=True),
            Step((None,)),
            Step((ONE,)),
        ),
    ),
)

SEEDS: dict[str, tuple[int, ...]] = {
    "one-after-another": (0, 8),
    "same-name": (11, 22),
    "scale": (6, 8),
    "long-prefix": (2, 0, 1, 5),
    "long-prefix-same-name": (1, 2, 4),
    "mixed-batch": (1, 11, 14),
    "load-unload-load": (10, 15),
    "merge-unmerge": (20, 22),
}
"""The seeds of each session's prompts, as `tests/support/find_session_prompts.py` finds them."""
