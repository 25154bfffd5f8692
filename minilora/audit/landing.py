"""Which weight of the model each module of an adapter changes, and which modules land on none.

A path is looked up as it is, and under the names that the same module has in other files of the model:

    transformer.h.0.attn         h.0.attn                        a checkpoint of the model without its head
    model.language_model.X       language_model.model.X          a model that sees: its files have older names
    model.layers.0.mlp           model.layers.0.block_sparse_moe
    experts.0.w1                 experts.gate_up_proj                   of which it is a part

Then it is looked up under the names that a mistake makes: ``_orig_mod.`` of a compiled model, ``module.`` of a
distributed one, ``model.`` once too often or not at all. So what is wrong gets a name, and the shapes can be compared
all the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from ..files.experts import MIXTRAL, MIXTRAL_MLP
from ..files.modelfolder import EMBEDDING, HEAD
from ..files.peft import PREFIX
from ..files.placement import MULTIMODAL, PREFIX_ALIASES
from ..language.files.gguf import ARCHITECTURES
from ..texts import short
from .findings import NOTE, SUSPICIOUS, WRONG, Fault, Finding, found, some
from .headers import AdapterFile, ModelHeaders, Module, Shape
from .units import Source, unit_of

ARCHITECTURE = "general.architecture"
BODY = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
"""The number of a layer in a path."""
EXPERT = re.compile(r"\.experts\.(?:\d+\.)?")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Modules that some models keep in one matrix."""
KOHYA_PREFIXES = (
    "lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lycoris_", "",
)  # fmt: skip
BODIES = ("model", "transformer", "bert", "roberta", "deberta", "distilbert", "gpt_neox")
"""What a model without its head is called in the one with it."""
WITH_HEAD = re.compile(r"For[A-Z]|LMHead")
RIGHT_WITHOUT_HEAD = ": right for the model without its head, and not found in the whole one"
CONVERTED = ("qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "olmoe")
"""Kinds of models whose layers of one expert PEFT 0.21.2 takes for their part of an array, beside a Mixtral's w1 to w3.

It has no such rule for a Qwen2-MoE.
"""
OF_EXPERTS = MIXTRAL | {old: new for new, old in MIXTRAL.items()}


@dataclass
class Landing:
    """Where the modules of an adapter land in a model, and whether they fit there."""

    model: ModelHeaders
    places: dict[str, str] = field(default_factory=dict)  # the model's path of each module that lands
    misnamed: dict[str, Fault] = field(default_factory=dict)  # what is wrong with the name of one that lands
    lost: list[str] = field(default_factory=list)  # the modules that land nowhere
    elsewhere: list[str] = field(default_factory=list)  # those that are of another part of an image model
    misfits: dict[str, Fault] = field(default_factory=dict)  # what is wrong with the shapes, see `.fitting`
    fitting: set[str] = field(default_factory=set)  # the modules whose shapes were compared, and fit
    turned: set[str] = field(default_factory=set)  # the modules whose weight is stored (in, out)
    packed: set[str] = field(default_factory=set)  # the modules whose weight's shape cannot be seen

    @cached_property
    def source(self) -> Source:
        """The model's tensors."""
        return Source(self.model)

    @cached_property
    def experts(self) -> dict[str, list[Shape | None]]:
        """The shapes of the layers of single experts, by the array of which they are parts."""
        shapes: dict[str, list[Shape | None]] = {}
        for path, shape in self.model.modules.items():
            array, expert, _ = unit_of(path)
            if expert is not None:
                shapes.setdefault(array, []).append(shape)
        return shapes

    @property
    def found(self) -> int:
        """How many modules are found in the model under names that are right."""
        return len(self.places) - sum(level == WRONG for level, *_ in self.misnamed.values())


def land(adapter: AdapterFile, model: ModelHeaders) -> Landing:
    """Look up each module of an adapter in a model."""
    landing, spellings = Landing(model), Spellings(adapter, model)
    for path, module in adapter.modules.items():
        place, fault = spellings.place(_original(path, adapter), module)
        if place is None:
            landing.lost.append(path)
            continue
        landing.places[path] = place
        if fault is not None:
            landing.misnamed[path] = fault
    if "kohya" in adapter.format and landing.places:
        here = {_part_of(path) for path in landing.places}
        landing.elsewhere = [path for path in landing.lost if _part_of(path) not in here]
        landing.lost = [path for path in landing.lost if _part_of(path) in here]
    return landing


def _original(path: str, adapter: AdapterFile) -> str:
    """Return the path in the base of a module of a model in which `layer_replication` has layers several times."""
    ranges, layer = adapter.get("layer_replication"), BODY.search(path)
    if layer is None or not isinstance(ranges, list):
        return path
    wanted = int(layer[1])
    for pair in ranges:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)):
            return path
        first, end = pair
        if wanted < end - first:
            return f"{path[: layer.start(1)]}{first + wanted}{path[layer.end(1) :]}"
        wanted -= max(end - first, 0)
    return path


def _part_of(path: str) -> str:
    """Return the prefix by which kohya's names tell the parts of an image model apart."""
    return next(prefix for prefix in KOHYA_PREFIXES if path.startswith(prefix))


def to_adapter(landing: Landing) -> Callable[[str], str]:
    """Return a function from the model's paths to the adapter's, by how most of those that landed begin in each."""
    pairs: Counter[tuple[str, str]] = Counter()
    for ours, theirs in landing.places.items():
        a, b = ours.split("."), theirs.split(".")
        while a and b and a[-1] == b[-1]:
            a.pop()
            b.pop()
        pairs[".".join([*b, ""]) if b else "", ".".join([*a, ""]) if a else ""] += 1
    theirs, ours = pairs.most_common(1)[0][0]
    return lambda path: ours + path.removeprefix(theirs) if path.startswith(theirs) else path


# --- names ---


STARTS = re.compile(rf"^(?:{re.escape(PREFIX)}|module\.)+")
WRAPPER = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
WRAPPED: tuple[tuple[str, Callable[[str], str], str], ...] = (
    ("prefix-orig-mod", lambda name: name.replace("_orig_mod.", ""),
     "'_orig_mod.' of a compiled model is in the names, so the modules are not found: unwrap the model before saving, "
     "or take it out of the names"),
    ("prefix-wrapped", lambda name: WRAPPER.sub("", name),
     "the names have the part of a wrapper in them, as of FSDP, DeepSpeed or activation checkpointing, so the modules "
     "are not found"),
    ("prefix-module", lambda name: name.removeprefix("module."),
     "'module.' of a distributed model stands before the names, so the modules are not found"),
    ("prefix-doubled", lambda name: STARTS.sub("", name),
     f"the prefix {PREFIX!r} stands twice, so the modules are not found"),
    ("prefix-model-doubled", lambda name: re.sub(r"^model\.(?=model\.)", "", name),
     "'model.' stands twice before the names, so the modules are not found"),
)  # fmt: skip
"""Wrong names of a wrapped model: the code, what takes the wrapper's part out of a name, and the text.

A name goes through all of them: a row gets what the one before leaves.
"""
SEEING = (
    WRONG,
    "prefix-language-model",
    "'language_model.' is in the names, and this model has none: the adapter is of a model that sees, or of its "
    "language part alone",
)
NOT_SEEING = (
    "prefix-language-model-missing",
    "the model's names have 'language_model.' in them and the adapter's do not: right for its language part alone, and "
    "ignored by what loads it whole",
)


class Spellings:
    """The model's paths, and the names that an adapter may have for them."""

    def __init__(self, adapter: AdapterFile, model: ModelHeaders) -> None:
        self.adapter, self.model = adapter, model
        self.paths = {*model.paths}
        self.flat = {path.replace(".", "_"): path for path in model.modules} if "kohya" in adapter.format else {}
        self.sees = any(MULTIMODAL.search(path) for path in self.paths)
        self.mixtures = {match[1] for path in self.paths if (match := re.fullmatch(r"(.+\.experts)\.\d+\.[^.]+", path))}

    def place(self, path: str, module: Module) -> tuple[str | None, Fault | None]:
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
        return path in self.paths or (module.kind == "experts" and path.rpartition(".")[0] in self.mixtures)

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
        if ".switch_mlp." in path:  # mlx-lm's name of a mixture's experts
            yield from self._same(path.replace(".switch_mlp.", ".experts."), module)
        if path == HEAD and self.model.tied:
            yield from (name for name in self.model.paths if name.rpartition(".")[2] in (EMBEDDING, "wte"))
        first, _, rest = path.partition(".")
        if rest and first in BODIES and not any(name.startswith(f"{first}.") for name in self.paths):
            yield rest  # a checkpoint of the model without its head
        if self.sees:
            yield from (re.sub(one, other, path) for one, other in PREFIX_ALIASES)
        for mlp in (path, path.replace(".mlp.", f".{MIXTRAL_MLP}."), path.replace(f".{MIXTRAL_MLP}.", ".mlp.")):
            yield mlp
            before, _, last = mlp.rpartition(".")
            if ".experts." in mlp and last in OF_EXPERTS:
                yield f"{before}.{OF_EXPERTS[last]}"
            if self.model.config.get("model_type") in (*CONVERTED, "mixtral"):
                yield from self._array(mlp)

    def _array(self, path: str) -> Iterator[str]:
        """Yield the array in which the model has a layer of one expert."""
        array, expert, _ = unit_of(path)
        if expert is not None and expert < self.model.arrays.get(array, (0,))[0]:
            yield array

    def _mistaken(self, path: str) -> Iterator[tuple[Fault, str]]:
        """Yield the mistakes that a name may have in it, and the name without it."""
        for code, without, text in WRAPPED:
            if (bare := without(path)) != path:
                path = bare
                yield (WRONG, code, text), path
        without_sight = re.sub(r"(^|\.)language_model\.", r"\1", path)
        if without_sight != path:
            for start in ("", "model."):
                yield SEEING, f"{start}{without_sight}"
        whole = self.sees and not _of_text_alone(self.model)
        fault = (SUSPICIOUS if whole else NOTE, *NOT_SEEING)
        yield fault, f"language_model.{path}"
        yield fault, re.sub(r"^model\.", "model.language_model.", path)
        level = _level_without_head(self.adapter)
        for first in ("model", "transformer", "language_model.model", "model.language_model", "bert", "roberta"):
            text = f"{first + '.'!r} is missing before the names"
            text += ", so the modules are not found" if level == WRONG else RIGHT_WITHOUT_HEAD
            yield (level, "prefix-model-missing", text), f"{first}.{path}"
        first, _, rest = path.partition(".")
        if rest:
            text = f"{first + '.'!r} before the names is none of the model's, so the modules are not found"
            yield (WRONG, "prefix-unknown", text), rest


def _of_text_alone(model: ModelHeaders) -> bool:
    classes = model.config.get("architectures")
    return isinstance(classes, list) and any("ForCausalLM" in str(name) for name in classes)


def _level_without_head(adapter: AdapterFile) -> str:
    """Return how bad it is that names lack the first part: an adapter of the model without its head has such names."""
    mapping, task = adapter.get("auto_mapping"), adapter.get("task_type")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if task == "FEATURE_EXTRACTION" or (isinstance(name, str) and not WITH_HEAD.search(name)):
        return NOTE
    return WRONG if task or name else SUSPICIOUS


# --- what is said of it ---


def misnamed(adapter: AdapterFile, landing: Landing) -> Iterator[Finding]:
    """Find modules that land once a mistake is taken out of their names."""
    faults: dict[Fault, list[str]] = {}
    for path, fault in landing.misnamed.items():
        faults.setdefault(fault, []).append(path)
    for (level, code, text), paths in faults.items():
        yield Finding(level, code, f"{text}: {some(paths)}", tuple(paths))


def wrapped(adapter: AdapterFile) -> Iterator[Finding]:
    """Find the names of wrappers where there is no model to look them up in: it may be one that is wrapped."""
    for code, without, text in WRAPPED[:2]:
        yield from found(SUSPICIOUS, code, f"{text}: {{names}}", [p for p in adapter.modules if without(p) != p])


def another_part(adapter: AdapterFile, landing: Landing) -> Iterator[Finding]:
    """Find modules of an image model's text encoder beside its U-Net, or the other way round."""
    text = "{count} of another part than this model: {names}"
    yield from found(NOTE, "another-part", text, landing.elsewhere)


def lost(adapter: AdapterFile, landing: Landing) -> Iterator[Finding]:
    """Find modules that land nowhere, and what the model has in their place."""
    paths, model = landing.lost, landing.model
    if not paths:
        return
    if _untranslated(adapter, landing):
        text = "{names}: llama.cpp's names do not tell all, so whether they land is not known"
        yield from found(NOTE, "module-unknown", text, paths)
        return
    deepest = max((int(n) for path in model.modules for n in BODY.findall(path)), default=None)
    first, others = paths[0], [*model.modules, "nothing"]
    like = next((path for path in others if path.rpartition(".")[2] == first.rpartition(".")[2]), others[0])
    if deepest is not None and all(any(int(n) > deepest for n in BODY.findall(p)) for p in paths):
        instead = f"the model has layers up to {deepest}: the adapter is of a deeper one"
    else:
        instead = _in_one(first, model) or f"the model has such as {short(like)}"
    text = "{count} of {total} that the model has not ({instead}): {names}"
    yield from found(WRONG, "module-unknown", text, paths, total=len(adapter.modules), instead=instead)


def _in_one(path: str, model: ModelHeaders) -> str:
    """Say that the model keeps several modules in one matrix and the adapter each by itself, or the other way round."""
    module, _, name = path.rpartition(".")
    for whole, parts in FUSED.items():
        if name in parts and f"{module}.{whole}" in model.modules:
            return f"the model has {', '.join(parts)} in one matrix, {short(f'{module}.{whole}')}"
        if name == whole and all(f"{module}.{part}" in model.modules for part in parts):
            return f"the model has {', '.join(parts)} apart, and the adapter has them in one matrix"
    return ""


def _untranslated(adapter: AdapterFile, landing: Landing) -> bool:
    """Return whether llama.cpp has names, in one of the two files, that are not known in transformers' words."""
    if landing.model.is_gguf:
        return "GGUF" not in adapter.format and any(path.startswith("blk.") for path in landing.model.modules)
    return "GGUF" in adapter.format and all(path.startswith("blk.") for path in landing.lost)


def other_architecture(adapter: AdapterFile, landing: Landing) -> Iterator[Finding]:
    """Find a GGUF adapter of another kind of model."""
    ours, theirs = adapter.tensors.notes.get(ARCHITECTURE), landing.model.config.get(ARCHITECTURE)
    if not landing.model.is_gguf:
        theirs = ARCHITECTURES.get(str(landing.model.config.get("model_type")))
    if adapter.tensors.weights is None and isinstance(ours, str) and isinstance(theirs, str) and ours != theirs:
        text = f"general.architecture is {ours!r} in the adapter and {theirs!r} in the model: llama.cpp refuses it"
        yield Finding(WRONG, "architecture-differs", text)


def tied_head(adapter: AdapterFile, landing: Landing) -> Iterator[Finding]:
    """Find a change of one of the two modules that are one array in the model."""
    tied = [path for path in adapter.modules if path.rpartition(".")[2] in (EMBEDDING, HEAD, "wte")]
    text = (
        "the head is the embedding in this model, of which the adapter changes the one and not the other; some engines "
        "change both, and GGUF adapters cannot hold it: {names}"
    )
    yield from found(NOTE, "tied-head", text, tied if landing.model.tied else ())


RULES = (misnamed, another_part, lost, other_architecture, tied_head)
