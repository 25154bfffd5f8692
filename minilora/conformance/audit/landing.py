"""Which weight of the model each module of an adapter changes, and why another one lands on none.

A path is looked up as it is. Then under the names that the same module has in other files of the same model:

    transformer.h.0.attn         h.0.attn                        a checkpoint of the model without its head
    model.language_model.X       language_model.model.X          a model that sees: its files have older names
    model.layers.0.mlp           model.layers.0.block_sparse_moe

And then as a mistake makes it: ``_orig_mod.`` of a compiled model, ``module.`` of a distributed one, ``model.`` once
too often or not at all. So what is wrong gets a name, and the shapes are compared all the same.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...files.base.expertweights import MIXTRAL, MIXTRAL_MLP, PARTS
from ...files.base.tiedhead import EMBEDDING, HEAD
from ...files.peft.adapterkeys import PREFIX
from ...files.peft.expertkeys import TURNED_UNTIL, version_of
from ...guards.errors import short
from .adapterfile import AdapterFile, Module
from .findings import NOTE, SUSPICIOUS, WRONG, Finding, counted, listed
from .modelheaders import ModelHeaders, Shape

BODY = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
SIGHT = re.compile(r"(?:^|[._])(?:visual|vision|image|audio|multi_modal|mm_)")
KOHYA_PREFIXES = (
    "lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lycoris_", "",
)  # fmt: skip
HEADLESS_TASKS = ("FEATURE_EXTRACTION",)
WITH_HEAD = re.compile(r"For[A-Z]|LMHead")


@dataclass
class Landing:
    """Where the modules of an adapter land in a model."""

    places: dict[str, str] = field(default_factory=dict)  # the model's path of each module that lands
    lost: list[str] = field(default_factory=list)  # the modules that land nowhere
    misnamed: set[str] = field(default_factory=set)  # those that would land, and under their own names do not
    turned: set[str] = field(default_factory=set)  # the modules whose weight is stored (in, out)
    fitting: set[str] = field(default_factory=set)  # the modules whose shapes were compared, and fit
    packed: set[str] = field(default_factory=set)  # the modules whose weight's shape cannot be seen
    findings: list[Finding] = field(default_factory=list)


def land(adapter: AdapterFile, model: ModelHeaders) -> Landing:
    """Look up each module of an adapter in a model, and compare the shapes."""
    landing = Landing()
    finder = _Finder(adapter, model)
    faults: dict[tuple[str, str, str], list[str]] = {}
    tied = []
    for path, module in adapter.modules.items():
        last = path.rpartition(".")[2]
        if model.tied and last in (EMBEDDING, HEAD, "wte"):
            tied.append(path)
        place, fault = finder.place(path, module)
        if place is None:
            landing.lost.append(path)
            continue
        landing.places[path] = place
        if fault is not None:
            faults.setdefault(fault, []).append(path)
    for (level, code, text), paths in faults.items():
        landing.findings.append(Finding(level, code, f"{text}: {listed(paths)}", tuple(paths)))
        landing.misnamed |= {*paths} if level == WRONG else set()
    if "kohya" in adapter.format and landing.places:
        here = {_part_of(path) for path in landing.places}
        if elsewhere := [path for path in landing.lost if _part_of(path) not in here]:
            text = f"{counted(len(elsewhere), 'module')} of another part than this model: {listed(elsewhere)}"
            landing.findings.append(Finding(NOTE, "another-part", text, tuple(elsewhere)))
            landing.lost = [path for path in landing.lost if path not in {*elsewhere}]
    if landing.lost:
        landing.findings.append(_lost(adapter, model, landing))
    if tied:
        text = (
            f"the head is the embedding in this model, and the adapter changes {listed(tied)}: the one it changes and "
            "not the other; some engines change both, and GGUF adapters cannot hold it"
        )
        landing.findings.append(Finding(NOTE, "tied-head", text, tuple(tied)))
    _compare(adapter, model, landing)
    return landing


class _Finder:
    """The model's paths, and how they may be spelled."""

    def __init__(self, adapter: AdapterFile, model: ModelHeaders) -> None:
        self.adapter, self.model = adapter, model
        self.paths = {*model.modules, *model.arrays}
        self.flat = {re.sub(r"[.]", "_", path): path for path in model.modules} if "kohya" in adapter.format else {}
        self.sees = any(SIGHT.search(path) for path in self.paths)
        self.expert_modules = {path for path in (_mixture_of(path) for path in self.paths) if path}

    def place(self, path: str, module: Module) -> tuple[str | None, tuple[str, str, str] | None]:
        """Return the model's path of a module and, where it bears a wrong name, level, code and text of that."""
        if self.flat:
            return self._unflattened(path), None
        for spelled in self._same(path, module):
            if self._has(spelled, module):
                return spelled, None
        for fault, spelled in self._mistaken(path):
            for again in self._same(spelled, module):
                if again != path and self._has(again, module):
                    return again, fault
        return None, None

    def _has(self, path: str, module: Module) -> bool:
        return path in self.paths or (module.kind == "experts" and path.rpartition(".")[0] in self.expert_modules)

    def _unflattened(self, path: str) -> str | None:
        """Return the path whose dots became underscores, behind a prefix that names the part of the model."""
        for prefix in KOHYA_PREFIXES:
            name = path.removeprefix(prefix).replace(".", "_")
            if path.startswith(prefix) and name in self.flat:
                return self.flat[name]
        return None

    def _same(self, path: str, module: Module) -> Iterator[str]:
        """Yield the names that a module may have in the files of a model in which it has this one."""
        path = path.removesuffix(".weight") if module.kind == "experts" else path  # an array that is a module's weight
        yield path
        if path == HEAD and self.model.tied:
            yield from (name for name in self.paths if name.rpartition(".")[2] in (EMBEDDING, "wte"))
        first, _, rest = path.partition(".")
        if (
            rest
            and first in ("model", "transformer", "bert", "roberta", "deberta", "distilbert", "gpt_neox")
            and not any(name.startswith(f"{first}.") for name in self.paths)
        ):
            yield rest  # a checkpoint of the model without its head
        if self.sees:
            yield re.sub(r"^model\.language_model\.", "language_model.model.", path)
            yield re.sub(r"^model\.language_model\.", "model.", path)
            yield re.sub(r"^language_model\.model\.", "model.language_model.", path)
            yield re.sub(r"^model\.(?=visual|vision|multi_modal|audio)", "", path)
            yield f"language_model.{path}" if path == HEAD else path
        for one, other in ((".mlp.", f".{MIXTRAL_MLP}."), (f".{MIXTRAL_MLP}.", ".mlp.")):
            if one in path:
                yield path.replace(one, other)
        for new, old in MIXTRAL.items():
            for ours, theirs in ((new, old), (old, new)):
                if path.endswith(f".{ours}") and ".experts." in path:
                    changed = f"{path.removesuffix(ours)}{theirs}"
                    yield changed
                    yield changed.replace(".mlp.", f".{MIXTRAL_MLP}.")
                    yield changed.replace(f".{MIXTRAL_MLP}.", ".mlp.")

    def _mistaken(self, path: str) -> Iterator[tuple[tuple[str, str, str], str]]:
        """Yield the mistakes that a name may have in it, and the name without it."""
        bare = path.replace("_orig_mod.", "")
        if bare != path:
            yield (WRONG, "prefix-orig-mod", "'_orig_mod.' of a compiled model is in the names, so the modules are not "
                   "found: unwrap the model before saving, or take it out of the names"), bare  # fmt: skip
        if bare.startswith("module."):
            yield (WRONG, "prefix-module", "'module.' of a distributed model stands before the names, so the modules "
                "are "
                   "not found"), bare.removeprefix("module.")  # fmt: skip
        while bare.startswith((PREFIX, "module.")):
            bare = bare.removeprefix(PREFIX).removeprefix("module.")
            yield (WRONG, "prefix-doubled", f"the prefix {PREFIX!r} stands twice, so the modules are not found"), bare
        if bare.startswith("model.model."):
            yield (WRONG, "prefix-model-doubled", "'model.' stands twice before the names, so the modules are not found"
                   ), bare.removeprefix("model.")  # fmt: skip
        without = re.sub(r"(^|\.)language_model\.", r"\1", bare)
        if without != bare:
            fault = (WRONG, "prefix-language-model", "'language_model.' is in the names, and this model has none: the "
                     "adapter is of a model that sees, or of its language part alone")  # fmt: skip
            for spelled in (without, f"model.{without}", without.replace("model.model.", "model.")):
                yield fault, spelled
        yield from self._with_parts_before(bare)

    def _with_parts_before(self, bare: str) -> Iterator[tuple[tuple[str, str, str], str]]:
        """Yield the name with parts before it that the model's names have."""
        wholes = self.sees and not _of_text_alone(self.model.config)
        level = SUSPICIOUS if wholes else NOTE
        fault = (level, "prefix-language-model-missing", "the model's names have 'language_model.' in them and the "
                 "adapter's do not: right for its language part alone, and ignored by what loads it whole")  # fmt: skip
        yield fault, f"language_model.{bare}"
        yield fault, re.sub(r"^model\.", "model.language_model.", bare)
        level = _level_without_head(self.adapter.config)
        for first in ("model", "transformer", "language_model.model", "model.language_model", "bert", "roberta"):
            fault = (
                level, "prefix-model-missing",
                f"{first + '.'!r} is missing before the names" + (
                    ": right for the model without its head, and not found in the whole one" if level != WRONG else
                    ", so the modules are not found"
                ),
            )  # fmt: skip
            yield fault, f"{first}.{bare}"
        first, _, rest = bare.partition(".")
        if rest:
            fault = (WRONG, "prefix-unknown", f"{first + '.'!r} before the names is none of the model's, so the "
                f"modules are "
                     "not found")  # fmt: skip
            yield fault, rest


def _of_text_alone(config: Mapping[str, Any]) -> bool:
    classes = config.get("architectures")
    return isinstance(classes, list) and any("ForCausalLM" in str(name) for name in classes)


def _level_without_head(config: Mapping[str, Any] | None) -> str:
    """Return how bad it is that names lack the first part: an adapter of the model without its head has such names."""
    config = config or {}
    mapping = config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if config.get("task_type") in HEADLESS_TASKS or (isinstance(name, str) and not WITH_HEAD.search(name)):
        return NOTE
    return WRONG if config.get("task_type") or name else SUSPICIOUS


def _mixture_of(path: str) -> str:
    """Return the path of the experts that one expert's module is of, or nothing."""
    match = re.fullmatch(r"(.+\.experts)\.\d+\.[^.]+", path)
    return match[1] if match else ""


def _lost(adapter: AdapterFile, model: ModelHeaders, landing: Landing) -> Finding:
    """Say which modules land nowhere, and what the model has in their place."""
    lost = landing.lost
    deepest = max((int(n) for path in model.modules for n in BODY.findall(path)), default=None)
    beyond = [p for p in lost if deepest is not None and any(int(n) > deepest for n in BODY.findall(p))]
    first = lost[0]
    like = next((p for p in model.modules if p.rpartition(".")[2] == first.rpartition(".")[2]), None)
    like = like or next(iter(model.modules), "nothing")
    text = f"{counted(len(lost), 'module')} of {len(adapter.modules)} that the model has not: {listed(lost)}"
    if len(beyond) == len(lost):
        text += f"; the model has layers up to {deepest}: the adapter is of a deeper one"
    else:
        text += f"; the model has such as {short(like)}"
    level = WRONG
    if _untranslated(adapter, model, lost):
        level, text = NOTE, f"{listed(lost)}: llama.cpp's names do not tell all, so whether they land is not known"
    return Finding(level, "module-unknown", text, tuple(lost))


def _untranslated(adapter: AdapterFile, model: ModelHeaders, lost: list[str]) -> bool:
    """Return whether llama.cpp has names, in one of the two files, that are not known in transformers' words."""
    if model.is_gguf:
        return "GGUF" not in adapter.format and any(path.startswith("blk.") for path in model.modules)
    return "GGUF" in adapter.format and all(path.startswith("blk.") for path in lost)


def _part_of(path: str) -> str:
    """Return the prefix by which kohya's names tell the parts of an image model apart."""
    return next(prefix for prefix in KOHYA_PREFIXES if path.startswith(prefix))


# --- shapes -----------------------------------------------------------------------------------------


def _compare(adapter: AdapterFile, model: ModelHeaders, landing: Landing) -> None:
    """Compare the shapes of what landed with the model's."""
    wrong: dict[tuple[str, str], list[str]] = {}
    details: dict[tuple[str, str], str] = {}
    for path, place in landing.places.items():
        module = adapter.modules[path]
        widths = module.widths(adapter.tensors)
        if widths is None:
            continue
        if module.kind == "experts":
            outcome = _compare_experts(adapter, model, path, place, landing)
        else:
            shape = model.modules.get(place, model.arrays.get(place))
            if shape is None:
                landing.packed.add(path)
                continue
            outcome = _compare_one(adapter, model, module, place, shape, landing)
        if outcome is None:
            landing.fitting.add(path)
        else:
            level, code, text = outcome
            wrong.setdefault((level, code), []).append(path)
            details.setdefault((level, code), text)
    for (level, code), paths in wrong.items():
        also = f"; so in {counted(len(paths), 'module')}: {listed(paths)}" if len(paths) > 1 else ""
        landing.findings.append(Finding(level, code, f"{short(paths[0])}: {details[level, code]}{also}", tuple(paths)))
    _check_flag(adapter, landing)


def _compare_one(
    adapter: AdapterFile, model: ModelHeaders, module: Module, place: str, shape: Shape, landing: Landing
) -> tuple[str, str, str] | None:
    """Return what is wrong with a module's shapes, None where they fit."""
    out, width = module.widths(adapter.tensors) or (0, 0)
    theirs = f"the factors are for a weight of {out} x {width}, and the model's is {' x '.join(map(str, shape))}"
    if module.kind == "embedding":
        if shape == (width, out):
            return None
        if shape[1:] == (out,):
            return (WRONG, "vocabulary-differs", f"{theirs}: the vocabulary was resized, or the model is another one")
        return WRONG, "shape-differs", theirs
    if len(shape) > 2:  # a convolution's: (out, in / groups, kernel)
        fits = shape[0] == out and (width == math.prod(shape[1:]) or width % math.prod(shape[1:]) == 0)
        return None if fits else (WRONG, "shape-differs", theirs)
    if shape == (out, width):
        return None
    if shape == (width, out):
        if _lies_in_out(adapter, model, place, shape):
            landing.turned.add(module.path)
            return None
        return (
            WRONG, "shape-turned",
            f"{theirs}: the other way round it would fit, so the factors are transposed or exchanged, or the weight is "
            "stored (in, out) and fan_in_fan_out is not set",
        )  # fmt: skip
    if place.rpartition(".")[2] in (HEAD, EMBEDDING) and shape[1] == width:
        return WRONG, "vocabulary-differs", f"{theirs}: the vocabulary was resized, or the model is another one"
    if shape[1] == width and shape[0] % out == 0:
        return WRONG, "shape-is-a-part", f"{theirs}: the rows of one of {shape[0] // out} parts, as of one device"
    if shape[0] == out and shape[1] % width == 0:
        return WRONG, "shape-is-a-part", f"{theirs}: the columns of one of {shape[1] // width} parts, as of one device"
    return WRONG, "shape-differs", f"{theirs}: the adapter is of another model"


def _lies_in_out(adapter: AdapterFile, model: ModelHeaders, place: str, shape: Shape) -> bool:
    """Return whether a weight (in, out) is stored so, as GPT-2's are: the flag says it, or the bias beside it."""
    if (adapter.config or {}).get("fan_in_fan_out") is True:
        return True
    return shape[0] != shape[1] and model.bias(place) == (shape[1],)


def _check_flag(adapter: AdapterFile, landing: Landing) -> None:
    """Say where fan_in_fan_out contradicts every weight: a square one would then be changed the wrong way round."""
    linear = [path for path in landing.fitting if adapter.modules[path].kind == "linear"]
    if (adapter.config or {}).get("fan_in_fan_out") is not True or not linear:
        return
    straight = [p for p in linear if p not in landing.turned and len({*adapter.modules[p].widths(adapter.tensors)}) > 1]  # type: ignore[misc]
    if straight and not landing.turned:
        text = (
            f"fan_in_fan_out is true, and the model stores its weights (out, in): {listed(straight)}. A square weight "
            "would be changed the wrong way round"
        )
        landing.findings.append(Finding(SUSPICIOUS, "fan-in-fan-out", text, tuple(straight)))


# --- experts ----------------------------------------------------------------------------------------


def expert_weights(model: ModelHeaders, place: str) -> list[str]:
    """Return where the weights of a mixture's array are: one tensor, or for each expert one or two, in their order."""
    for spelled in (place, place.replace(".mlp.", f".{MIXTRAL_MLP}.")):
        if spelled in model.arrays or spelled in model.modules:
            return [spelled]
        module, _, name = spelled.rpartition(".")
        parts = PARTS.get(name, (name,))
        for names in (parts, tuple(MIXTRAL.get(part, part) for part in parts)):
            weights: list[str] = []
            for e in itertools.count():
                of_it = [f"{module}.{e}.{part}" for part in names]
                if not all(weight in model.modules for weight in of_it):
                    break
                weights += of_it
            if weights:
                return weights
    return []


def _expert_shape(model: ModelHeaders, place: str) -> tuple[int, int, int] | None:
    """Return E, and the two sides of each expert's weight as stored; None where its files do not show them."""
    weights = expert_weights(model, place)
    shapes = [model.arrays.get(name) or model.modules.get(name) for name in weights]
    first = shapes[0] if shapes else None
    if first is None:
        return None
    if len(first) == 3:
        return first[0], first[1], first[2]
    parts = len(PARTS.get(place.rpartition(".")[2], ("",))) if len(weights) > 1 else 1
    return len(weights) // parts, first[0] * parts, first[1]


def _compare_experts(
    adapter: AdapterFile, model: ModelHeaders, path: str, place: str, landing: Landing
) -> tuple[str, str, str] | None:
    """Return what is wrong with the packing of a mixture's array, None where it fits and something decides it."""
    module, weight = adapter.modules[path], _expert_shape(model, place)
    if weight is None:
        landing.packed.add(path)
        return None
    E, rows, columns = weight
    if module.experts != E:
        return WRONG, "experts-differ", f"the adapter is for {module.experts} experts, and the model has {E}"
    out, width = module.widths(adapter.tensors) or (0, 0)
    sides = f"lora_A reads {width} numbers and lora_B writes {out}, and each expert's weight is {rows} x {columns}"
    if sorted((out, width)) != sorted((rows, columns)):
        return WRONG, "shape-differs", sides
    in_out = _stored_in_out(model, place)
    version = version_of(str((adapter.config or {}).get("peft_version")))
    if rows == columns:
        if version is None and adapter.config is not None and "PEFT" in adapter.format:
            return (
                SUSPICIOUS, "packing-undecided",
                f"{sides}: square, and without a peft_version nothing says which factor reads the input: PEFT "
                f"exchanged "
                "the two after 0.19.0",
            )  # fmt: skip
        return None
    if in_out is None:
        return None  # both ways round fit some way of storing it
    reads_input = (out, width) == ((columns, rows) if in_out else (rows, columns))
    if reads_input or in_out or version is None:
        if not reads_input and version is None:
            return (
                SUSPICIOUS,
                "packing-undecided",
                f"{sides}: exchanged, as PEFT wrote them up to 0.19.0, and no peft_version says so",
            )
        return None
    if version > TURNED_UNTIL:
        text = f"{sides}: exchanged, as PEFT wrote them up to 0.19.0, and peft_version is {'.'.join(map(str, version))}"
        return WRONG, "packing-exchanged", text
    text = f"{sides}: exchanged, as PEFT wrote them up to 0.19.0; today's readers must exchange them back"
    landing.findings.append(Finding(NOTE, "packing-of-old-peft", f"{short(path)}: {text}", (path,)))
    return None


def _stored_in_out(model: ModelHeaders, place: str) -> bool | None:
    """Return whether the experts' weights are stored (E, in, out); gate_up_proj beside down_proj shows it."""
    module = place.rpartition(".")[0]
    shapes = [_expert_shape(model, f"{module}.{name}") for name in ("gate_up_proj", "down_proj")]
    if None in shapes:
        return None
    (_, a, b), (_, c, d) = shapes  # type: ignore[misc]
    if (a, b) == (2 * d, c):
        return False
    return True if (a == d and b == 2 * c) else None


# --- the same names ---------------------------------------------------------------------------------


def renamed(landing: Landing) -> Callable[[str], str]:
    """Return a function from the model's paths to the adapter's, by the beginnings in which most of them differ."""
    pairs: Counter[tuple[str, str]] = Counter()
    for ours, theirs in landing.places.items():
        a, b = ours.split("."), theirs.split(".")
        while a and b and a[-1] == b[-1]:
            a.pop()
            b.pop()
        pairs[".".join([*b, ""]) if b else "", ".".join([*a, ""]) if a else ""] += 1
    (theirs, ours), _ = pairs.most_common(1)[0] if pairs else (("", ""), 0)
    return lambda path: ours + path.removeprefix(theirs) if path.startswith(theirs) else path
