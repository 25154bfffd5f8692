"""Sessions: requests to one living engine, one after another, and what each of them asks for.

A case asks a program once. What an engine keeps from one request to the next shows only in a session: weights under a
name, keys and values of a prompt, a scale, an update that is merged in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .adapters import Adapter, adapter_files, drawn_adapter
from .bases import LIVING
from .cases import TABLE, drawn_tokens
from .reading import Arrays, Given

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
    load: tuple[Use, ...] = ()  # what the engine is to load before, though no prompt may ask for it
    generate: int = 0  # how many tokens are to follow, the likeliest each time: then the answer is of each of them
    each: bool = False  # whether the answer is after each token of the prompts but the last, from one pass over them


@dataclass(frozen=True)
class Session:
    """Requests that one engine answers in their order."""

    id: str
    note: str
    steps: Sequence[Mapping[str, Any]]  # what is asked of the adapters, of each prompt or one for all
    seeds: tuple[int, ...]  # of its prompts
    long: bool = False  # whether the prompts share a long prefix, and each request has one of its own
    generated: Sequence[Sequence[int]] = ()  # tokens that the first request makes, which prompts with `each` end with

    @cached_property
    def requests(self) -> tuple[Request, ...]:
        """The requests, with their prompts and with an adapter for each prompt."""
        return tuple(
            Request(
                np.append(prompts, self.generated, axis=1) if step.get("each") else prompts,
                tuple(USES[name] for name in step["adapters"]) * (len(prompts) // len(step["adapters"])),
                tuple(step.get("unload", ())),
                step.get("merged", False),
                tuple(use for name in step.get("load", ()) if (use := USES[name])),
                step.get("generate", 0),
                step.get("each", False),
            )
            for step, prompts in zip(self.steps, self.prompts(self.seeds), strict=True)
        )

    def prompts(self, seeds: Sequence[int]) -> list[np.ndarray]:
        """Return the prompts (prompts, T) of each request, none of whose tokens is special."""
        tails = np.array([drawn_tokens(self.id, seed, TAIL) for seed in seeds])
        if not self.long:
            return [tails] * len(self.steps)
        return [np.concatenate([drawn_tokens(self.id, PREFIX, PREFIX), tail])[None] for tail in tails]


# --- the table --------------------------------------------------------------------------------------

LIVING_ADAPTERS = {name: Adapter(**entry) for name, entry in TABLE["living"].items()}
"""The adapters of all sessions, by the name of their folder."""
USES: Mapping[str, Use | None] = {"base": None} | {
    name: Use(entry["name"], Path("adapters", entry["folder"]), entry.get("weight", 1.0))
    for name, entry in TABLE["uses"].items()
}
SESSIONS = tuple(
    Session(entry.pop("id"), entry.pop("note"), entry.pop("requests"), tuple(entry.pop("prompts")), **entry)
    for entry in map(dict, TABLE["sessions"])
)


@cache
def adapter_of(folder: Path) -> Given:
    """Return a session's adapter, drawn."""
    return drawn_adapter(np.random.default_rng([*folder.name.encode()]), LIVING_ADAPTERS[folder.name], LIVING)


def session_adapters() -> Iterator[tuple[Path, tuple[dict[str, Any], Arrays]]]:
    """Yield the folder of each adapter of the sessions, and what its files hold."""
    for name, adapter in LIVING_ADAPTERS.items():
        folder = Path("adapters", name)
        yield folder, adapter_files(adapter, adapter_of(folder), LIVING)
