"""The cases of `cases.toml`: adapters as PEFT writes them, each with a note on its purpose."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from dataclasses import fields as fields_of
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .adapters import PLACES, AdapterCase, adapter_files, as_stored, damaged, drawn_adapter
from .bases import BASES, LAYER, VOCABULARY, Base
from .reading import AdapterData, NamedArrays, target_array

TABLE: Mapping[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
LOGIT_TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "float16": 0.06, "bfloat16": 0.3}
"""The largest allowed error of a logit, by the precision that a program computes in."""


@dataclass(frozen=True)
class Case:
    """A case: a base, its adapters and prompts, and what must come of them."""

    id: str
    note: str
    base: Base
    adapters: tuple[AdapterCase, ...]
    seeds: tuple[int, ...] = (0, 1)  # the seeds of its prompts
    refused: bool = False  # whether a program must refuse it
    damage: str = ""  # the damage done to the files, see `damaged`
    after: str = ""  # the id of the case to answer just before it, which has the same prompts
    stored: str = ""  # the type of the tensors in the file, if it is not float32
    either: bool = False  # whether a case to be refused may be answered instead

    @property
    def answered(self) -> bool:
        """Whether the case has right numbers. One to be refused has them only if a program may convert it instead."""
        return not self.refused or self.either or self.adapters[0].pissa == "raw"

    @property
    def apart(self) -> float:
        """The least distance: of a bug's logits from the right ones after some prompt, and of the top two tokens."""
        return 10 * LOGIT_TOLERANCE["bfloat16"] if self.base.mixture is None else 2.5 * LOGIT_TOLERANCE["bfloat16"]

    @cached_property
    def given(self) -> list[tuple[AdapterData, float]]:
        """The adapters with their numbers drawn, and their weights."""
        rng = np.random.default_rng([*self.id.encode()])
        return [(as_stored(drawn_adapter(rng, one, self.base), self.stored), one.weight) for one in self.adapters]

    @cached_property
    def previous(self) -> list[tuple[AdapterData, float]]:
        """The adapters of the case to answer just before; empty if `after` names none."""
        return next((case.given for case in CASES if case.id == self.after), [])

    @cached_property
    def prompts(self) -> np.ndarray:
        """Token ids, (prompts, T), none of them special; with a mixture, the last tokens use all experts."""
        seeds = next((case.seeds for case in CASES if case.id == self.after), self.seeds)
        return np.array([self.prompt(seed) for seed in seeds])

    def prompt(self, seed: int) -> np.ndarray:
        """Draw one prompt, (T,)."""
        return drawn_tokens(self.after or self.id, seed, length=6 if self.base.mixture is None else 4)

    @property
    def shown(self) -> str:
        """The name of the weight whose merged numbers are in the answers: the smallest one, but not of expert 0.

        Several bugs leave expert 0 right. A base with one tensor for all experts has none, since it would be large.
        """
        arrays, paths = self.base.arrays, [path for given, _ in self.given for path in given.modules]
        if self.base.fused:
            return ""
        touched = {target_array(path, path, arrays)[0] for path in paths or [f"{LAYER}.{PLACES['k_proj']}"]}
        weights = self.base.in_file({name: array for name, array in arrays.items() if name in touched})
        names = [name for name in weights if ".experts.0." not in name]
        return min(names, key=lambda name: (weights[name].size, weights[name].shape[-1]))

    def files(self) -> Iterator[tuple[dict[str, Any], NamedArrays]]:
        """Yield each adapter's configuration, and its tensors under PEFT's names."""
        for adapter, (given, _) in zip(self.adapters, self.given, strict=True):
            yield damaged(*adapter_files(adapter, given, self.base), self.damage)


def drawn_tokens(id: str, seed: int, length: int) -> np.ndarray:
    """Draw token ids for a case or a session, none of them special."""
    return np.random.default_rng([seed, *id.encode()]).integers(2, len(VOCABULARY), length)


def _case(id: str, note: str, base: str, adapters: list[dict[str, Any]] | None = None, **entry: Any) -> Case:
    """Return a case of the table. If it has one adapter, the adapter's settings are among its own."""
    own = {name: entry.pop(name) for name in [field.name for field in fields_of(AdapterCase)] if name in entry}
    drawn_from = tuple(AdapterCase(**one) for one in adapters or ([own] if own else []))
    of_name = next(one for one in BASES if one.name == base)
    seeds = tuple(entry.pop("prompts", (0, 1)))
    return Case(id, note, of_name, drawn_from, seeds, **entry)


CASES = tuple(_case(**entry) for entry in TABLE["cases"])
