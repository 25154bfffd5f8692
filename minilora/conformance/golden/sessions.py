"""The sessions: sequences of requests to one running engine.

A case is a single request. Only a session shows what an engine keeps from one request to the next: weights under a
name, a prompt's keys and values, a scale, a merged update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .adapters import AdapterCase, adapter_files, drawn_adapter
from .bases import LIVING
from .cases import TABLE, drawn_tokens
from .reading import AdapterData, NamedArrays

PREFIX_TOKENS, TAIL_TOKENS = 256, 6
"""The number of a long prompt's tokens that several requests share, and of those that follow."""


@dataclass(frozen=True)
class Use:
    """An adapter in a request."""

    name: str  # the engine's name for it
    folder: Path
    weight: float = 1.0  # the factor of its update


@dataclass(frozen=True)
class Request:
    """A request to an engine."""

    prompts: np.ndarray  # token ids (prompts, T)
    adapters: tuple[Use | None, ...]  # one for each prompt; None is the base without an adapter
    unload: tuple[str, ...] = ()  # the names to unload before the request
    merged: bool = False  # whether to merge the adapter into the weights for this request, and unmerge it after
    load: tuple[Use, ...] = ()  # adapters to load before the request, used by a prompt or not
    generate: int = 0  # the number of tokens to generate greedily; the answer has logits for each
    each: bool = False  # whether the answer has logits after each token of the prompts but the last, from one pass


@dataclass(frozen=True)
class Session:
    """A sequence of requests that one engine answers in order."""

    id: str
    note: str
    steps: Sequence[Mapping[str, Any]]  # the requests in the table, without prompts; one adapter may be for all
    seeds: tuple[int, ...]  # the seeds of its prompts
    long: bool = False  # whether each request has one prompt, and all share a long prefix
    generated: Sequence[Sequence[int]] = ()  # tokens that the first request generates; prompts with `each` end in them

    @cached_property
    def requests(self) -> tuple[Request, ...]:
        """The requests, with prompts and an adapter for each prompt."""
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
        """Return the prompts (prompts, T) of each request, without special tokens."""
        tails = np.array([drawn_tokens(self.id, seed, TAIL_TOKENS) for seed in seeds])
        if not self.long:
            return [tails] * len(self.steps)
        return [np.concatenate([drawn_tokens(self.id, PREFIX_TOKENS, PREFIX_TOKENS), tail])[None] for tail in tails]


# --- the table --------------------------------------------------------------------------------------

LIVING_ADAPTERS = {name: AdapterCase(**entry) for name, entry in TABLE["living"].items()}
"""The adapters of all sessions, by their folder's name."""
USES: Mapping[str, Use | None] = {"base": None} | {
    name: Use(entry["name"], Path("adapters", entry["folder"]), entry.get("weight", 1.0))
    for name, entry in TABLE["uses"].items()
}
SESSIONS = tuple(
    Session(entry.pop("id"), entry.pop("note"), entry.pop("requests"), tuple(entry.pop("prompts")), **entry)
    for entry in map(dict, TABLE["sessions"])
)


@cache
def adapter_of(folder: Path) -> AdapterData:
    """Draw a session's adapter."""
    return drawn_adapter(np.random.default_rng([*folder.name.encode()]), LIVING_ADAPTERS[folder.name], LIVING)


def session_adapters() -> Iterator[tuple[Path, tuple[dict[str, Any], NamedArrays]]]:
    """Yield the folder of each adapter of the sessions, with its configuration and tensors."""
    for name, adapter in LIVING_ADAPTERS.items():
        folder = Path("adapters", name)
        yield folder, adapter_files(adapter, adapter_of(folder), LIVING)
