"""The comparison of a merged model with its base, unit by unit, in one pass over the files.

    right       one valid rounding explains all numbers, and some of them differ from the base's
    base        all numbers are the base's, but should not be
    undecided   a correct merge would write the base's numbers: the change is below half a step everywhere, or zero
    wrong       some rows are measured to identify what it is instead: see `.suspects`

A tensor that no adapter changes must have the base's numbers, rounded once if the merged file has a narrower type.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from tqdm import tqdm

from ..files.dtypes import FLOATS
from ..files.modelfolder import EMBEDDING, HEAD, HEAD_WEIGHT
from ..texts import FileRefused, short
from .changes import changed_rows, unit_in, updates
from .findings import WRONG
from .formats import TRAINABLE_TOKENS
from .headers import AdapterFile, ModelHeaders, Module
from .landing import Landing, Spellings
from .rounding import HALVES, Replay, Rounding, Update, acceptable_casts, bits, mantissa_bits, valid_roundings
from .suspects import RIGHT, SKIPPED, UNDECIDED, Sample, Sketches, Verdict, identify, known_strengths
from .units import Matrix, Source, in_memory

NAME_PREFIXES = re.compile(r"^(?:base_model\.|module\.|_orig_mod\.|model\.|transformer\.|language_model\.)+")
"""Matches the prefixes in which a merged folder's names may differ from its base's."""
ADAPTER_MARKS = (".lora_", "_magnitude_vector", ".base_layer.")
BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".position_ids")
"""Suffixes of buffers, which a save may omit."""
SEVERITY = (UNDECIDED, RIGHT, SKIPPED, WRONG)
FIRST_ROWS = 8
"""The number of rows in the first block: they rule out nearly all wrong roundings."""


@dataclass
class MergeResult:
    """The result of comparing a merged model with its base."""

    merged: ModelHeaders
    modules: dict[str, Verdict] = field(default_factory=dict)
    others: dict[str, Verdict] = field(default_factory=dict)  # tensors that differ from what they should be
    same: int = 0  # unchanged tensors that equal the base's
    same_vectors: int = 0  # those of them with one column
    vectors: set[str] = field(default_factory=set)  # tensors with one column that differ from the base's
    extra: list[str] = field(default_factory=list)  # tensors that only the merged folder has
    grown: dict[str, int] = field(default_factory=dict)  # number of added rows, by embedding
    renamed: str = ""  # the prefix that only the merged folder's names have


def compare_merged(
    adapter: AdapterFile, landing: Landing, merged: ModelHeaders, *, progress: bool = False
) -> MergeResult:
    """Compare a merged model with its base and the adapter."""
    comparer = Comparer(adapter, landing, merged)
    total = sum(math.prod(matrix.shape) for matrices in comparer.base.values() for matrix in matrices)
    with tqdm(total=total, unit="number", unit_scale=True, disable=None if progress else True) as bar:
        return comparer.run(bar)


class Comparer:
    """A single pass over both folders."""

    def __init__(self, adapter: AdapterFile, landing: Landing, merged: ModelHeaders) -> None:
        self.adapter, self.landing, self.merged = adapter, landing, merged
        self.merged_source = Source(merged)
        self.base, self.found = {**landing.source.units}, self.merged_source.units
        self.result, self.names, self.table = MergeResult(merged), self._names(), self._table()
        if self.table in self.names and HEAD_WEIGHT in self.found:  # the merged model is untied: give the base a head
            self.base.setdefault(HEAD_WEIGHT, self.base[self.table])
            self.names[HEAD_WEIGHT] = HEAD_WEIGHT
        self.by_unit, self.whole = self._by_unit(), self._whole()
        self.sketches = Sketches(self._changes, [*landing.places])

    def _names(self) -> dict[str, str]:
        """Return the merged folder's name for each unit of the base, if it has that unit."""
        bare = {NAME_PREFIXES.sub("", name): name for name in self.found if name not in self.base}
        names = dict[str, str]()
        for name in self.base:
            other = name if name in self.found else bare.get(NAME_PREFIXES.sub("", name))
            if other is not None:
                names[name] = other
        return names

    def _table(self) -> str:
        """Return the unit of a tied base's embedding, or "" if the base is not tied."""
        ends = (f"{EMBEDDING}.weight", "wte.weight")
        return next((name for name in self.base if name.endswith(ends) and is_tied(self.landing.model)), "")

    @cached_property
    def still_tied(self) -> bool:
        """Whether the merged folder has a head that equals the embedding; both are read in full."""
        if self.table not in self.names or HEAD_WEIGHT not in self.found:
            return False
        one, other = self.found[HEAD_WEIGHT][0], self.found[self.names[self.table]][0]
        return one.shape == other.shape and one.dtype == other.dtype and base_difference(one, other) is None

    # --- which modules change which unit ---

    def _by_unit(self) -> dict[str, list[str]]:
        """Return the modules that change each unit, by the unit's name."""
        by_unit: dict[str, list[str]] = {}
        for path, place in self.landing.places.items():
            module, last = self.adapter.modules[path], path.rpartition(".")[2]
            units = [unit_in(self.landing, module)[0]]
            if self.table and last in (EMBEDDING, "wte", HEAD):
                head = HEAD_WEIGHT in self.names and last == HEAD
                units = [self.table, HEAD_WEIGHT] if self.still_tied else [HEAD_WEIGHT if head else self.table]
            units += [f"{place}.bias"] if "bias" in module.parts else []
            for name in units:
                by_unit.setdefault(name, []).append(path)
        return by_unit

    def _whole(self) -> dict[str, str]:
        """Return the adapter's tensor for each fully trained unit, which replaces the base's."""
        spellings, whole = Spellings(self.adapter, self.landing.model), dict[str, str]()
        for path, key in self.adapter.saved.items():
            module, _, end = path.rpartition(".")
            if TRAINABLE_TOKENS in path:
                module, end = path.partition(".token_adapter.")[0].removesuffix(f".{TRAINABLE_TOKENS}_delta"), "weight"
            place, _ = spellings.place(module, Module(module, self.adapter.tensors, {}))
            whole[f"{module if place is None else place}.{end}"] = key
        return whole

    def updates(self, path: str, unit: str, *, repacked: bool = False) -> dict[tuple[int, int], Update]:
        """Return a module's updates of a unit, keyed by (matrix, first row)."""
        module = self.adapter.modules[path]
        if unit.endswith(".bias") and module.scaling is not None:
            bias = module.tensors.read(module.parts["bias"]).reshape(-1, 1)
            return {(0, 0): Update(bias, np.ones((1, 1), bias.dtype), module.scaling, bias.dtype)}
        module = replace(module, grouped=not module.grouped) if repacked else module
        return updates(self.landing, module, changed_rows(self.landing, module, self.base[unit]))

    # --- the pass ---

    def run(self, bar: Any) -> MergeResult:
        """Compare all units and return the result."""
        beside = [name for name in self.found if any(part in name for part in ADAPTER_MARKS)]
        self.result.others |= {name: Verdict(WRONG, "factors-beside", "") for name in beside}
        for unit, matrices in self.base.items():
            paths, name = self.by_unit.get(unit, []), self.names.get(unit)
            try:
                if name is not None:
                    self._compare(unit, matrices, self.found[name], paths)
                elif not (unit.endswith(BUFFERS) or (unit.endswith(HEAD_WEIGHT) and is_tied(self.merged))):
                    self._note(paths or [unit], Verdict(WRONG, "missing", "missing in the merged model"))
            except FileRefused as error:
                self._note(paths or [unit], Verdict(SKIPPED, "not-compared", str(error)))
            bar.update(sum(math.prod(matrix.shape) for matrix in matrices))
        known = {*self.names.values(), *beside}
        self.result.extra = [name for name in self.found if name not in known]
        for name, other in self.names.items():
            if name != other:
                more = other.removesuffix(name if other.endswith(name) else NAME_PREFIXES.sub("", other))
                self.result.renamed = more or f"no {name.removesuffix(other)}"
        return self.result

    def _note(self, paths: Iterable[str], verdict: Verdict) -> None:
        """Record the verdict on modules or tensors; if a module has two, keep the more severe one."""
        for path in paths:
            target = self.result.modules if path in self.adapter.modules else self.result.others
            if path not in target or SEVERITY.index(verdict.state) > SEVERITY.index(target[path].state):
                target[path] = verdict

    def _compare(self, unit: str, base: list[Matrix], found: list[Matrix], paths: list[str]) -> None:
        """Compare one unit, whether or not a module changes it."""
        if unit in self.whole:
            self._note([unit], self._trained(base, self._in_full(self.whole[unit], base), found))
            return
        if copy := next((self.adapter.base_copies[path] for path in paths if path in self.adapter.base_copies), ""):
            array = self.adapter.tensors.read(copy)
            if len(array) > base[0].rows:  # the vocabulary has grown
                base = self.base[unit] = [in_memory(array, base[0])]
        if len(base) == len(found) == 1 and base[0].columns == found[0].columns and base[0].rows < found[0].rows:
            self.result.grown[unit] = found[0].shape[0] - base[0].shape[0]
            found = [found[0].cut(0, base[0].shape[0])]
        if [m.shape for m in base] != [m.shape for m in found]:
            shapes = " and ".join(f"{len(of)} of {of[0].shape[0]} x {of[0].columns}" for of in (base, found))
            self._note(paths or [unit], Verdict(WRONG, "other-shape", f"another shape, {shapes}"))
            return
        if paths and any(self.merged_source.in_few_bits(m.name) for m in found):
            self._note(paths, Verdict(SKIPPED, "few-bits", "they are quantised in the merged model"))
            return
        if not paths:
            verdicts = [v for a, b in zip(base, found, strict=True) if (v := base_difference(a, b)) is not None]
            self.result.same += not verdicts
            self.result.same_vectors += not verdicts and base[0].columns == 1
            if verdicts:
                self.result.vectors |= {unit} if base[0].columns == 1 else set()
                self._note([unit], max(verdicts, key=lambda verdict: verdict.rest or 0.0))
            return
        self._changed(unit, base, found, paths)

    def _in_full(self, key: str, base: list[Matrix]) -> list[Matrix]:
        """Return a fully trained tensor: the adapter's, or the base's with some rows replaced."""
        array = self.adapter.tensors.read(key)
        if TRAINABLE_TOKENS not in key:
            return [in_memory(array, base[0])]
        said = self.adapter.get("trainable_token_indices")
        lists = [said] if isinstance(said, list) else [*said.values()] if isinstance(said, dict) else []
        indices = next((rows for rows in lists if len(rows) == len(array)), None)
        if indices is None or not all(type(i) is int and 0 <= i < base[0].shape[0] for i in indices):
            raise FileRefused(self.adapter.path, f"trainable_token_indices does not name the rows of {short(key)}")
        table = base[0].read(0, base[0].shape[0])
        table = table.astype(np.promote_types(table.dtype, np.float32))
        table[indices] = array
        return [in_memory(table, base[0])]

    def _trained(self, base: list[Matrix], trained: list[Matrix], found: list[Matrix]) -> Verdict:
        """Return whether a fully trained tensor replaces the base's in the merged model."""
        if trained[0].shape != found[0].shape:
            return Verdict(WRONG, "other-shape", "the shape differs from the trained tensor's")
        verdict = base_difference(trained[0], found[0])
        is_base = base[0].shape == found[0].shape and base_difference(base[0], found[0]) is None
        if verdict is None:
            return Verdict(UNDECIDED if is_base else RIGHT)
        if is_base:
            return Verdict(WRONG, "trained-in-full-missing", "equal to the base, not to the trained tensor")
        return replace(verdict, flag="trained-in-full-differs", text="equal to neither the base nor the trained tensor")

    def _changed(self, unit: str, base: list[Matrix], found: list[Matrix], paths: list[str]) -> None:
        """Compare a unit that one or more modules change."""
        by_rows: dict[tuple[int, int], list[tuple[str, Update]]] = {}
        for path in paths:
            for place, update in self.updates(path, unit).items():
                by_rows.setdefault(place, []).append((path, update))
        verdicts: dict[str, list[Verdict]] = {path: [] for path in paths}
        covered = Counter[int]()
        for (e, top), several in by_rows.items():
            if len(several) > 1 and any(update.magnitude is not None for _, update in several):
                raise FileRefused(self.adapter.path, f"not supported: two modules, one with DoRA, change {short(unit)}")
            (first, update), *more = several
            for _, also in more:  # head and embedding are tied
                left = np.concatenate([update.left, also.left * (also.scaling / update.scaling)], axis=1)
                update = replace(update, left=left, right=np.concatenate([update.right, also.right]))
            W, m = (of[e].cut(top, top + len(update.left)) for of in (base, found))
            verdict = self._judge(W, m, update, first, change_name(first, e, len(base)))
            for path, _ in several:
                verdicts[path].append(verdict)
            covered[e] += len(update.left)
        for e, (one, other) in enumerate(zip(base, found, strict=True)):
            top = covered[e] if (e, 0) in by_rows else 0  # the half that no module changes, if there is one
            still = (of.cut(top, top + of.shape[0] - covered[e]) for of in (one, other))
            if covered[e] < one.shape[0] and (differs := base_difference(*still)) is not None:
                self._note([unit], differs)
        for path, own in verdicts.items():
            self._note([path], combined(own))

    def _judge(self, base: Matrix, found: Matrix, update: Update, path: str, name: str) -> Verdict:
        """Return the verdict on one update of a module; `name` is its name in `Sketches`."""
        roundings = valid_roundings(found.dtype, base.dtype, update.dtype, self.between(path))
        verdict = judge_matrix(base, found, update, roundings)
        if verdict.state != WRONG or verdict.flag:
            return verdict
        known = known_strengths(self.adapter.modules[path], self.adapter)
        wrong = identify(Sample(base, found, update, roundings, known), name, self.sketches)
        return replace(wrong, dtype=verdict.dtype)

    def between(self, path: str) -> Any:
        """Return the type that a module's base passed through because it was quantised or saved with the adapter."""
        copy = self.adapter.base_copies.get(path)
        return self.landing.source.quantized_dtype if copy is None else FLOATS.get(self.adapter.tensors.dtypes[copy])

    def _changes(self, path: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield the name and factors of a module's changes, as they should be, transposed, and packed differently."""
        unit = next(unit for unit, paths in self.by_unit.items() if path in paths)
        try:
            own = self.updates(path, unit)
        except FileRefused:
            return
        for (e, _), update in own.items():
            left = update.left * update.scaling
            yield change_name(path, e, len(self.base[unit])), left, update.right
            yield f"{path}, transposed", update.right.T, left.T
        if self.adapter.modules[path].kind == "experts":
            for (e, _), update in self.updates(path, unit, repacked=True).items():
                yield f"{path}, packed otherwise, expert {e}", update.left * update.scaling, update.right


def change_name(path: str, matrix: int, matrices: int) -> str:
    """Return the name of a module's change to one matrix."""
    return path if matrices == 1 else f"{path}, expert {matrix}"


def is_tied(model: ModelHeaders) -> bool:
    """Return whether the configuration ties the head to the embedding, even if the files store both."""
    return model.tied or model.config.get("tie_word_embeddings") is True


def combined(verdicts: list[Verdict]) -> Verdict:
    """Return one verdict for a module from the verdicts on its matrices, one for each expert of a mixture."""
    worst = max(verdicts, key=lambda verdict: SEVERITY.index(verdict.state))
    wrong = [e for e, verdict in enumerate(verdicts) if verdict.state == WRONG]
    if wrong and len(wrong) < sum(v.state != UNDECIDED for v in verdicts):
        places = f"{len(wrong)} of {len(verdicts)} experts"
        return replace(worst, text=f"{worst.text}, in {places}")
    return replace(worst, steps=max(verdict.steps for verdict in verdicts))


# --- one matrix ---


def judge_matrix(base: Matrix, found: Matrix, update: Update, roundings: list[Rounding]) -> Verdict:
    """Compare a matrix with the result of every rounding; if none matches, it is wrong."""
    exact, *_ = alive = [Replay(rounding, update, found.dtype, base) for rounding in roundings]
    is_base, verdict = True, Verdict(dtype=np.dtype(found.dtype).name)
    for start, stop in found.blocks(first=FIRST_ROWS):
        W, m, rows = base.read(start, stop), found.read(start, stop), np.arange(start, stop)
        is_base = is_base and any(np.array_equal(bits(m), bits(of)) for of in acceptable_casts(W, m.dtype))
        values = [replay.values(W, rows) for replay in alive]
        alive = [r for r, own in zip(alive, values, strict=True) if not r.misses(W, rows, m, own).size]
        if not alive and not is_base:
            verdict.state = WRONG
            if np.isfinite(W).all() and not np.isfinite(m).all():
                verdict.flag, verdict.text = "not-finite", "NaN or infinity"
            return verdict
        if alive:
            direct = alive[0] is exact and np.array_equal(bits(values[0]), bits(m))
            verdict.steps = max(verdict.steps, 0.5 if direct else exact.distance(W, rows, m))
    if not alive:
        return replace(verdict, state=WRONG, flag="not-merged", text="not merged, equal to the base", factor=0.0)
    return replace(verdict, state=UNDECIDED if is_base else RIGHT)


def rounds_to(W: np.ndarray, dtype: Any, m: np.ndarray) -> bool:
    """Return whether W rounded to `dtype` equals m."""
    return any(np.array_equal(rounded.astype(m.dtype), m, equal_nan=True) for rounded in acceptable_casts(W, dtype))


def base_difference(base: Matrix, found: Matrix) -> Verdict | None:
    """Return the verdict on a matrix that should equal the base's, or None if it does."""
    out, kind = found.dtype, base.dtype
    further = [t for t in HALVES if out in FLOATS.values() and mantissa_bits(t) < mantissa_bits(out)]
    squares = sizes = 0.0
    same = True
    for start, stop in found.blocks():
        W, m = base.read(start, stop), found.read(start, stop)
        if kind == out and np.array_equal(bits(W), bits(m)):
            continue
        if kind not in FLOATS.values() or out not in FLOATS.values():
            return Verdict(WRONG, "changed", "changed, though no adapter is there", rest=1.0)
        W, m = (x.astype(np.promote_types(x.dtype, np.float32)) for x in (W, m))
        if rounds_to(W, out, m):
            continue
        same = False
        further = [t for t in further if rounds_to(W, t, m)]
        with np.errstate(over="ignore", invalid="ignore"):
            squares += float(np.square(m - W, dtype=np.float64).sum())
            sizes += float(np.square(W, dtype=np.float64).sum())
    if same:
        return None
    if further:
        text = f"rounded to {further[0].name} before being stored as {np.dtype(out).name}"
        return Verdict(WRONG, "rounded-further", text, rest=0.0)
    share = (squares / sizes) ** 0.5 if sizes else np.inf
    return Verdict(WRONG, "changed", "changed, though no adapter is there, by {rest} of their size", rest=share)
