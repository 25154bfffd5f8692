"""The lookup of an adapter's modules in a model, which finds the weight that each one changes.

A path is looked up as it is, and under the names that the same module has in other files of the model:

    transformer.h.0.attn         h.0.attn                        a checkpoint of the model without its head
    model.language_model.X       language_model.model.X          a vision-language model with older names
    model.layers.0.mlp           model.layers.0.block_sparse_moe
    experts.0.w1                 experts.gate_up_proj            an array that contains it

Then it is looked up without the traces of common mistakes: ``_orig_mod.`` of a compiled model, ``module.`` of a
distributed one, a repeated or missing ``model.``. So the mistake can be named, and the shapes can still be compared.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from ..files.experts import MIXTRAL, MIXTRAL_MLP
from ..files.modelfolder import EMBEDDING, HEAD
from ..files.peft import MERGED_KEY, PREFIX
from ..files.placement import MULTIMODAL, PREFIX_ALIASES
from ..language.files.gguf import ARCHITECTURES
from ..texts import short
from .findings import NOTE, SUSPICIOUS, WRONG, Fault, Finding, about, listed
from .headers import AdapterFile, ModelHeaders, Module, Shape
from .units import Source, unit_of

ARCHITECTURE = "general.architecture"
BODY = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
"""Matches the index of a layer in a path."""
EXPERT = re.compile(r"\.experts\.(?:\d+\.)?")
FUSED_MODULES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Modules that some models fuse into one matrix, by its name."""
KOHYA_PREFIXES = (
    "lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lycoris_", "",
)  # fmt: skip
BODIES = ("model", "transformer", "bert", "roberta", "deberta", "distilbert", "gpt_neox")
"""Names of the submodule that is the model without its head."""
HEAD_CLASS = re.compile(r"For[A-Z]|LMHead")
RIGHT_WITHOUT_HEAD = ": right for the model without its head, but not found in the full model"
CONVERTED = ("qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "olmoe")
"""Model types for which PEFT 0.21.2 converts adapters of single experts into one of an array, besides Mixtral.

It has no such rule for Qwen2-MoE.
"""
OF_EXPERTS = MIXTRAL | {old: new for new, old in MIXTRAL.items()}


@dataclass
class Landing:
    """The result of the lookup: where each module of an adapter lands in a model, and whether it fits there."""

    model: ModelHeaders
    places: dict[str, str] = field(default_factory=dict)  # the model's path of each module that lands
    misnamed: dict[str, Fault] = field(default_factory=dict)  # naming faults of modules that land
    lost: list[str] = field(default_factory=list)  # the modules that land nowhere
    elsewhere: list[str] = field(default_factory=list)  # modules of another part of an image model
    misfits: dict[str, Fault] = field(default_factory=dict)  # faults in the shapes, see `.fitting`
    fitting: set[str] = field(default_factory=set)  # the modules whose shapes were compared and fit
    transposed: set[str] = field(default_factory=set)  # the modules whose weight is stored (in, out)
    packed: set[str] = field(default_factory=set)  # the modules whose weight is quantised, so that its shape is unknown

    @cached_property
    def source(self) -> Source:
        """The model's tensors, for reading."""
        return Source(self.model)

    @cached_property
    def experts(self) -> dict[str, list[Shape | None]]:
        """The shapes of single experts' layers, by the array that they are parts of."""
        shapes: dict[str, list[Shape | None]] = {}
        for path, shape in self.model.modules.items():
            array, expert, _ = unit_of(path)
            if expert is not None:
                shapes.setdefault(array, []).append(shape)
        return shapes

    @property
    def found(self) -> int:
        """The number of modules that the model has under a correct name."""
        return len(self.places) - sum(level == WRONG for level, *_ in self.misnamed.values())


def land(adapter: AdapterFile, model: ModelHeaders) -> Landing:
    """Look up every module of an adapter in a model."""
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
    """Return a module's path in the base, where `layer_replication` may have repeated its layer."""
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
    """Return the prefix that marks the part of an image model in kohya's names."""
    return next(prefix for prefix in KOHYA_PREFIXES if path.startswith(prefix))


def to_adapter(landing: Landing) -> Callable[[str], str]:
    """Return a function from the model's paths to the adapter's, using the most frequent pair of prefixes."""
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


WRAPPER_PREFIXES = re.compile(rf"^(?:{re.escape(PREFIX)}|module\.)+")
WRAPPER = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
WRAPPED_NAMES: tuple[tuple[str, Callable[[str], str], str], ...] = (
    ("prefix-orig-mod", lambda name: name.replace("_orig_mod.", ""),
     "the names contain '_orig_mod.' of a compiled model, so the modules are not found: unwrap the model before you "
     "save it, or remove that part from the names"),
    ("prefix-wrapped", lambda name: WRAPPER.sub("", name),
     "the names contain a wrapper's part, as of FSDP, DeepSpeed or activation checkpointing, so the modules are not "
     "found"),
    ("prefix-module", lambda name: name.removeprefix("module."),
     "the names begin with 'module.' of a distributed model, so the modules are not found"),
    ("prefix-doubled", lambda name: WRAPPER_PREFIXES.sub("", name),
     f"the prefix {PREFIX!r} is repeated, so the modules are not found"),
    ("prefix-model-doubled", lambda name: re.sub(r"^model\.(?=model\.)", "", name),
     "the names begin with 'model.' twice, so the modules are not found"),
)  # fmt: skip
"""Names of a wrapped model: the finding's code, a function that removes the wrapper's part, and the text.

They are applied in this order, each to the result of the one before.
"""
EXTRA_LANGUAGE_MODEL = (
    WRONG,
    "prefix-language-model",
    "the names contain 'language_model.', but the model's do not: the adapter is for a vision-language model, or for "
    "its language part",
)
MISSING_LANGUAGE_MODEL = (
    "prefix-language-model-missing",
    "the model's names contain 'language_model.', but the adapter's do not: right for only its language part, but "
    "ignored by programs that load the full model",
)


class Spellings:
    """The different names that an adapter may use for each of the model's paths."""

    def __init__(self, adapter: AdapterFile, model: ModelHeaders) -> None:
        self.adapter, self.model = adapter, model
        self.paths = {*model.paths}
        self.flat = {path.replace(".", "_"): path for path in model.modules} if "kohya" in adapter.format else {}
        self.has_vision = any(MULTIMODAL.search(path) for path in self.paths)
        self.mixtures = {match[1] for path in self.paths if (match := re.fullmatch(r"(.+\.experts)\.\d+\.[^.]+", path))}

    def place(self, path: str, module: Module) -> tuple[str | None, Fault | None]:
        """Return a module's path in the model, or None, and the fault in the module's name, if any."""
        if self.flat:
            return self._unflattened(path), None
        for spelled in self._equivalent(path, module):
            if self._has(spelled, module):
                return spelled, None
        for fault, spelled in self._mistaken(path):
            for again in self._equivalent(spelled, module):
                if again != path and self._has(again, module):
                    return again, fault
        return None, None

    def _has(self, path: str, module: Module) -> bool:
        return path in self.paths or (module.kind == "experts" and path.rpartition(".")[0] in self.mixtures)

    def _unflattened(self, path: str) -> str | None:
        """Return the model's path for one of kohya's names, whose dots became underscores after a prefix."""
        for prefix in KOHYA_PREFIXES:
            name = path.removeprefix(prefix).replace(".", "_")
            if path.startswith(prefix) and name in self.flat:
                return self.flat[name]
        return None

    def _equivalent(self, path: str, module: Module) -> Iterator[str]:
        """Yield the correct names that the model's files may have for a module, its own name first."""
        path = path.removesuffix(".weight") if module.kind == "experts" else path  # the array is a module's weight
        yield path
        if ".switch_mlp." in path:  # mlx-lm's name of a mixture's experts
            yield from self._equivalent(path.replace(".switch_mlp.", ".experts."), module)
        if path == HEAD and self.model.tied:
            yield from (name for name in self.model.paths if name.rpartition(".")[2] in (EMBEDDING, "wte"))
        first, _, rest = path.partition(".")
        if rest and first in BODIES and not any(name.startswith(f"{first}.") for name in self.paths):
            yield rest  # the checkpoint is of the model without its head
        if self.has_vision:
            yield from (re.sub(one, other, path) for one, other in PREFIX_ALIASES)
        for mlp in (path, path.replace(".mlp.", f".{MIXTRAL_MLP}."), path.replace(f".{MIXTRAL_MLP}.", ".mlp.")):
            yield mlp
            before, _, last = mlp.rpartition(".")
            if ".experts." in mlp and last in OF_EXPERTS:
                yield f"{before}.{OF_EXPERTS[last]}"
            if self.model.config.get("model_type") in (*CONVERTED, "mixtral"):
                yield from self._array(mlp)

    def _array(self, path: str) -> Iterator[str]:
        """Yield the array of the model that contains a single expert's layer, if there is one."""
        array, expert, _ = unit_of(path)
        if expert is not None and expert < self.model.arrays.get(array, (0,))[0]:
            yield array

    def _mistaken(self, path: str) -> Iterator[tuple[Fault, str]]:
        """Yield each mistake that a name may contain, with the corrected name."""
        for code, without, text in WRAPPED_NAMES:
            if (bare := without(path)) != path:
                path = bare
                yield (WRONG, code, text), path
        without_language = re.sub(r"(^|\.)language_model\.", r"\1", path)
        if without_language != path:
            for start in ("", "model."):
                yield EXTRA_LANGUAGE_MODEL, f"{start}{without_language}"
        whole = self.has_vision and not _is_text_only(self.model)
        fault = (SUSPICIOUS if whole else NOTE, *MISSING_LANGUAGE_MODEL)
        yield fault, f"language_model.{path}"
        yield fault, re.sub(r"^model\.", "model.language_model.", path)
        level = _level_without_head(self.adapter)
        for first in ("model", "transformer", "language_model.model", "model.language_model", "bert", "roberta"):
            text = f"{first + '.'!r} is missing at the start of the names"
            text += ", so the modules are not found" if level == WRONG else RIGHT_WITHOUT_HEAD
            yield (level, "prefix-model-missing", text), f"{first}.{path}"
        first, _, rest = path.partition(".")
        if rest:
            text = f"the names begin with {first + '.'!r}, which the model does not have, so the modules are not found"
            yield (WRONG, "prefix-unknown", text), rest


def _is_text_only(model: ModelHeaders) -> bool:
    classes = model.config.get("architectures")
    return isinstance(classes, list) and any("ForCausalLM" in str(name) for name in classes)


def _level_without_head(adapter: AdapterFile) -> str:
    """Return the level for names without the first part, which are right for the model without its head."""
    mapping, task = adapter.get("auto_mapping"), adapter.get("task_type")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if task == "FEATURE_EXTRACTION" or (isinstance(name, str) and not HEAD_CLASS.search(name)):
        return NOTE
    return WRONG if task or name else SUSPICIOUS


# --- findings ---


def misnamed(adapter: AdapterFile, landing: Landing) -> Iterator[Finding]:
    """Find modules that land only after a mistake in their names is corrected."""
    faults: dict[Fault, list[str]] = {}
    for path, fault in landing.misnamed.items():
        faults.setdefault(fault, []).append(path)
    for (level, code, text), paths in faults.items():
        yield Finding(level, code, f"{text}: {listed(paths)}", tuple(paths))


def wrapped(adapter: AdapterFile) -> Iterator[Finding]:
    """Find wrappers' names without a model to look them up in; they are suspicious, since a model may be wrapped."""
    for code, without, text in WRAPPED_NAMES[:2]:
        yield from about(SUSPICIOUS, code, f"{text}: {{names}}", [p for p in adapter.modules if without(p) != p])


def another_part(adapter: AdapterFile, landing: Landing) -> Iterator[Finding]:
    """Find modules of an image model's text encoder if the model is its U-Net, or the reverse."""
    text = "{count} of another part of the image model: {names}"
    yield from about(NOTE, "another-part", text, landing.elsewhere)


def lost(adapter: AdapterFile, landing: Landing) -> Iterator[Finding]:
    """Find modules that land nowhere, and name what the model has instead."""
    paths, model = landing.lost, landing.model
    if not paths:
        return
    if _untranslated(adapter, landing):
        text = "{names}: some of llama.cpp's names have no known translation, so whether they land is unknown"
        yield from about(NOTE, "module-unknown", text, paths)
        return
    deepest = max((int(n) for path in model.modules for n in BODY.findall(path)), default=None)
    first, others = paths[0], [*model.modules, "nothing"]
    like = next((path for path in others if path.rpartition(".")[2] == first.rpartition(".")[2]), others[0])
    if deepest is not None and all(any(int(n) > deepest for n in BODY.findall(p)) for p in paths):
        instead = f"the model has layers up to {deepest}: the adapter is for a deeper one"
    else:
        instead = _fused(first, model) or f"the model has, for example, {short(like)}"
    text = "{count} of {total} that the model does not have ({instead}): {names}"
    yield from about(WRONG, "module-unknown", text, paths, total=len(adapter.modules), instead=instead)


def _fused(path: str, model: ModelHeaders) -> str:
    """Return a text if only one of model and adapter fuses several modules into one matrix, and "" otherwise."""
    module, _, name = path.rpartition(".")
    for whole, parts in FUSED_MODULES.items():
        if name in parts and f"{module}.{whole}" in model.modules:
            return f"the model fuses {', '.join(parts)} into one matrix, {short(f'{module}.{whole}')}"
        if name == whole and all(f"{module}.{part}" in model.modules for part in parts):
            return f"the model keeps {', '.join(parts)} separate, but the adapter fuses them into one matrix"
    return ""


def _untranslated(adapter: AdapterFile, landing: Landing) -> bool:
    """Return whether either file has llama.cpp names without a known name in transformers."""
    if landing.model.is_gguf:
        return "GGUF" not in adapter.format and any(path.startswith("blk.") for path in landing.model.modules)
    return "GGUF" in adapter.format and all(path.startswith("blk.") for path in landing.lost)


def other_architecture(adapter: AdapterFile, landing: Landing) -> Iterator[Finding]:
    """Find a GGUF adapter for another architecture."""
    ours, theirs = adapter.tensors.metadata.get(ARCHITECTURE), landing.model.config.get(ARCHITECTURE)
    if not landing.model.is_gguf:
        theirs = ARCHITECTURES.get(str(landing.model.config.get("model_type")))
    if adapter.tensors.weights is None and isinstance(ours, str) and isinstance(theirs, str) and ours != theirs:
        text = f"general.architecture is {ours!r} in the adapter but {theirs!r} in the model: llama.cpp refuses it"
        yield Finding(WRONG, "architecture-differs", text)


def tied_head(adapter: AdapterFile, landing: Landing) -> Iterator[Finding]:
    """Find an adapter of the head or the embedding where the model ties the two."""
    tied = [path for path in adapter.modules if path.rpartition(".")[2] in (EMBEDDING, HEAD, "wte")]
    text = (
        "this model ties the head to the embedding, but the adapter changes only one of the two uses; some engines "
        "change both, and a GGUF adapter cannot express it: {names}"
    )
    yield from about(NOTE, "tied-head", text, tied if landing.model.tied else ())


def merged_before(adapter: AdapterFile, landing: Landing) -> Iterator[Finding]:
    """Find an adapter that minilora merged into the model."""
    mark, weights = str(landing.model.tensors.metadata.get(MERGED_KEY, "")), adapter.tensors.weights
    if mark and weights is not None and weights.files[0].digest() in mark:
        yield Finding(WRONG, "merged-before", "the model has this adapter merged already: it would be applied twice")


RULES = (merged_before, misnamed, another_part, lost, other_architecture, tied_head)
