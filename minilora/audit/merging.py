"""The comparison of a merged model with its base, unit by unit, in one pass over the files.

    right       one valid rounding explains all numbers, and some of them differ from the base's
    base        all numbers are the base's, but should not be
    undecided   a correct merge would write the base's numbers: the change is below half a step everywhere, or zero
    wrong       some rows are measured to identify what it is instead: see `.suspects`

A tensor that no adapter changes must have the base's numbers, rounded once if the merged file has a narrower type.
"""

from __future__ import annotations

import math
import os
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
from ..files.peft import CONFIG_NAME
from ..files.placement import MULTIMODAL, PREFIX_ALIASES
from ..files.tensors import MODEL_CONFIG
from ..texts import FileRefused, short
from .changes import changed_rows, unit_in, updates
from .findings import WRONG
from .formats import TRAINABLE_TOKENS
from .headers import AdapterFile, ModelHeaders, Module
from .landing import BODIES, Landing, Spellings
from .modelconfig import TIE, is_tied, other_settings, text_settings
from .rounding import HALVES, Replay, Rounding, Update, acceptable_casts, bits, mantissa_bits, valid_roundings
from .suspects import RIGHT, SKIPPED, UNDECIDED, Sample, Sketches, Verdict, identify, known_strengths
from .units import BUFFERS, Matrix, Source, in_memory

NAME_PREFIXES = re.compile(r"^(?:base_model\.|module\.|_orig_mod\.|model\.|transformer\.|language_model\.)+")
"""Matches the prefixes of a wrapped or another model's names, for which transformers finds no module."""
TOKEN_TABLES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "embed_out", "shared", "lm_head", "decoder")
"""The names of modules with one row for each token, which may have more rows after a merge."""
EMBEDDING_WEIGHTS = (f"{EMBEDDING}.weight", "wte.weight")
ADAPTER_MARKS = (".lora_", "_magnitude_vector", ".base_layer.")
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
    unloaded: dict[str, list[str]] = field(default_factory=dict)  # names that no program finds, by their prefix
    settings: list[str] = field(default_factory=list)  # differences of config.json that may change nothing
    numbering: str = ""  # how experts are numbered, if not from 0


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
        self.merged_source = Source(merged, dequantize=False)
        self.base, self.found = {**landing.source.units}, self.merged_source.units
        self.result = MergeResult(merged)
        self.names = self._names()
        self.embedding = next((name for name in self.base if name.endswith(EMBEDDING_WEIGHTS)), "")
        self.table = self.embedding if landing.model.tied or is_tied(landing.model) else ""  # of a tied base
        self.tied = is_tied(merged) if merged.config else bool(self.table)
        if self.table and self.table not in self.names and HEAD_WEIGHT in self.found and merged.config and self.tied:
            self.names[self.table] = HEAD_WEIGHT  # the shared array may be stored under either name
        if self.table in self.names and HEAD_WEIGHT in self.found:  # the merged model is untied: give the base a head
            self.base.setdefault(HEAD_WEIGHT, self.base[self.table])
            self.names[HEAD_WEIGHT] = HEAD_WEIGHT
        self.by_unit, self.whole = self._by_unit(), self._whole()
        self.sketches = Sketches(self._changes, [*landing.places])
        few = (source.described(kind) for source in (landing.source, self.merged_source) for kind in source.coded)
        self.few_bits = next(few, "")

    def _names(self) -> dict[str, str]:
        """Return the merged folder's name for each unit of the base, if it has that unit.

        transformers finds a name with or without the model's own prefix, such as "model.". Names with any other prefix
        are compared too, and reported in `MergeResult.unloaded`.
        """
        body, names = f"{self._body()}.", dict[str, str]()
        aliases = PREFIX_ALIASES if any(MULTIMODAL.search(name) for name in self.base) else ()
        for name in self.base:
            with_body, without = body + name, name.removeprefix(body)
            spelled = dict.fromkeys([name, without, with_body, *(re.sub(*pair, name) for pair in aliases)])
            found = [other for other in spelled if other in self.found]
            if found and found[0] != name:
                self.result.renamed = {with_body: body, without: f"no {body}"}.get(found[0], found[0])
            if len(found) > 1 and found[1] not in self.base:
                text = f"stored twice, also as {short(found[1])}: programs differ in which they read"
                self._note([name], Verdict(WRONG, "stored-twice", text))
            names |= {name: found[0]} if found else {}
        rest = {NAME_PREFIXES.sub("", name): name for name in {*self.found} - {*names.values()}}
        for name in self.base:
            bare = NAME_PREFIXES.sub("", name)
            if name not in names and bare in rest:
                other = names[name] = rest[bare]
                prefix = other.removesuffix(name if other.endswith(name) else bare)
                self.result.unloaded.setdefault(prefix, []).append(other)
        return names

    def _body(self) -> str:
        """Return the prefix of the model without its head, which transformers adds or removes."""
        firsts = {name.partition(".")[0] for name in self.base}
        kind = str(text_settings(self.landing.model).get("model_type"))
        usual = kind if kind in BODIES else "transformer" if "h" in firsts else BODIES[0]
        return next((body for body in BODIES if body in firsts), usual)

    @cached_property
    def still_tied(self) -> bool:
        """Whether the merged folder has a head that equals the embedding; both are read in full."""
        if self.embedding not in self.names or HEAD_WEIGHT not in self.found:
            return False
        one, other = self.found[HEAD_WEIGHT][0], self.found[self.names[self.embedding]][0]
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
            units = [f"{module if place is None else place}.{end}"]
            if units == [self.table] and module.rpartition(".")[2] == HEAD and HEAD_WEIGHT in self.names:
                units = [HEAD_WEIGHT, *(units if self.still_tied else ())]  # the merged model has its own head
            whole |= dict.fromkeys(units, key)
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
        lost = [unit for unit in self.by_unit if unit not in self.base]  # packed, or of a tied model
        lost += [HEAD_WEIGHT] if self.table and not self.tied and HEAD_WEIGHT not in {*self.names, *lost} else []
        for unit in [*self.base, *lost]:
            paths, name, matrices = self.by_unit.get(unit, []), self.names.get(unit), self.base.get(unit, [])
            try:
                if name is not None:
                    self._compare(unit, matrices, self.found[name], paths)
                elif not unit.endswith(BUFFERS) and not (unit == HEAD_WEIGHT and self.table and self.tied):
                    self._note(paths or [unit], self._missing(unit))
            except FileRefused as error:
                self._note(paths or [unit], Verdict(SKIPPED, "not-compared", str(error)))
            bar.update(sum(math.prod(matrix.shape) for matrix in matrices))
        known = {*self.names.values(), *beside}
        self.result.extra = [name for name in self.found if name not in known and not name.endswith(BUFFERS)]
        self._compare_folders()
        if (twice := next((v for v in self.result.modules.values() if v.flag == "twice"), None)) is not None:
            for path, verdict in self.result.modules.items():
                if verdict.flag == "factor" and verdict.factor == twice.factor:  # the same mistake
                    self.result.modules[path] = twice
        return self.result

    def _missing(self, unit: str) -> Verdict:
        """Return the verdict on a unit that the merged folder does not have."""
        if self.few_bits:
            return Verdict(SKIPPED, "few-bits", self.few_bits)
        why = ", where config.json ties the head to the embedding" if unit == HEAD_WEIGHT and self.tied else ""
        return Verdict(WRONG, "missing", f"missing in the merged model{why}")

    def _compare_folders(self) -> None:
        """Compare what is no tensor: the configurations, the size of the vocabulary, the numbering of experts."""
        base, merged, result = self.landing.model, self.merged, self.result
        wrong, result.settings = other_settings(base, merged)
        if wrong:
            text = f"{', '.join(wrong[:3])}, so the model computes something else"
            result.others[MODEL_CONFIG] = Verdict(WRONG, "config-differs", text)
        if os.path.exists(merged.path / CONFIG_NAME) and not os.path.exists(base.path / CONFIG_NAME):
            text = "a file of an adapter, which transformers applies to the model once more"
            result.others[CONFIG_NAME] = Verdict(WRONG, "adapter-in-folder", text)
        if merged.config.get(TIE) is True and HEAD_WEIGHT in self.found and not self.still_tied:
            text = "config.json ties the head to the embedding, but they differ, and programs differ in which they read"
            self._note([HEAD_WEIGHT], Verdict(WRONG, "head-not-tied", text))
        units = self.landing.source.units
        more = {u: self.found[name][0].shape[0] - units[u][0].shape[0] for u, name in self.names.items() if u in units}
        more = {unit: rows for unit, rows in more.items() if is_vocabulary(unit)}
        before, after = (text_settings(model).get("vocab_size") for model in (base, merged))
        if type(before) is type(after) is int:
            more["vocab_size"] = after - before
        if len({*more.values()}) > 1:
            text = f"the vocabulary is not of one size: {', '.join(f'{n:+,} in {short(u)}' for u, n in more.items())}"
            self._note([EMBEDDING], Verdict(WRONG, "other-shape", text))
        if (numbering := self.merged_source.numbering) != self.landing.source.numbering:
            result.numbering = numbering

    def _note(self, paths: Iterable[str], verdict: Verdict) -> None:
        """Record the verdict on modules or tensors; if a module has two, keep the more severe one."""
        for path in paths:
            target = self.result.modules if path in self.adapter.modules else self.result.others
            if path not in target or SEVERITY.index(verdict.state) > SEVERITY.index(target[path].state):
                target[path] = verdict

    def _compare(self, unit: str, base: list[Matrix], found: list[Matrix], paths: list[str]) -> None:
        """Compare one unit, whether or not a module changes it."""
        if few := self._coded(unit, base, found, bool(paths) or unit in self.whole):
            self._note(paths or [unit], Verdict(SKIPPED, "few-bits", few))
            return
        if unit in self.whole:
            self._note([unit], self._trained(base, self._in_full(self.whole[unit], base), found))
            return
        if copy := next((self.adapter.base_copies[path] for path in paths if path in self.adapter.base_copies), ""):
            array = self.adapter.tensors.read(copy)
            if len(array) > base[0].rows:  # the vocabulary has grown
                base = self.base[unit] = [in_memory(array, base[0])]
        one, other = self.landing.source.axes(unit, base), self.merged_source.axes(unit, found)
        if is_vocabulary(unit) and one[1:] == other[1:] and one[0] < other[0]:
            top, bottom = one[0], other[0]
            self.result.grown[unit] = bottom - top
            if not np.isfinite(found[0].read(top, bottom)).all():
                self._note([unit], Verdict(WRONG, "not-finite", "NaN or infinity in the added rows"))
            found, other = [found[0].cut(0, top)], one
        if one != other or [m.shape for m in base] != [m.shape for m in found]:
            shapes = " and ".join(" x ".join(map(str, shape)) for shape in (one, other))
            self._note(paths or [unit], Verdict(WRONG, "other-shape", f"another shape, {shapes}"))
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

    def _coded(self, unit: str, base: list[Matrix], found: list[Matrix], changed: bool) -> str:
        """Return why the numbers of two units cannot be compared, or "" if they can."""
        module, _, last = unit.rpartition(".")
        if self.few_bits and last not in ("weight", "bias") and module in self.landing.places.values():
            return self.few_bits  # such as the scales of a quantised weight
        sources = (self.landing.source, base[0]), (self.merged_source, found[0])
        kinds = [(source, source.kind(matrix.name)) for source, matrix in sources]
        if kinds[0][1] == kinds[1][1] and not changed:  # they are compared bit by bit
            return ""
        return next((source.described(kind) for source, kind in kinds if kind in source.coded), "")

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


def is_vocabulary(unit: str) -> bool:
    """Return whether a unit has a row for each token."""
    return unit.rpartition(".")[0].rpartition(".")[2] in TOKEN_TABLES


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
    is_base, is_finite, verdict = True, True, Verdict(dtype=np.dtype(found.dtype).name)
    for start, stop in found.blocks(first=FIRST_ROWS):
        W, m, rows = base.read(start, stop), found.read(start, stop), np.arange(start, stop)
        is_base = is_base and any(np.array_equal(bits(m), bits(of)) for of in acceptable_casts(W, m.dtype))
        is_finite = is_finite and (not is_base or bool(np.isfinite(W).all()))
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
    if is_base and not is_finite:
        return replace(verdict, state=SKIPPED, flag="not-finite", text="the base has NaN or infinity")
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
    if np.isnan(share):
        return Verdict(WRONG, "changed", "changed to or from NaN or infinity, though no adapter is there")
    return Verdict(WRONG, "changed", "changed, though no adapter is there, by {rest} of their size", rest=share)
