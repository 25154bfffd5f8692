"""Under which names a module may stand: those of other files of the same model, and those that a mistake makes.

The same module has these names in one file and another:

    transformer.h.0.attn         h.0.attn                        a checkpoint of the model without its head
    model.language_model.X       language_model.model.X          a model that sees: its files have older names
    model.layers.0.mlp           model.layers.0.block_sparse_moe

A mistake makes others: ``_orig_mod.`` of a compiled model, ``module.`` of a distributed one, ``model.`` once too often
or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..files.experts import MIXTRAL, MIXTRAL_MLP
from ..files.modelfolder import EMBEDDING, HEAD
from ..files.peft import PREFIX
from .adapterfile import AdapterFile, Module
from .findings import NOTE, SUSPICIOUS, WRONG
from .modelheaders import ModelHeaders

Fault = tuple[str, str, str]
"""What is wrong with a name: level, code and text."""
COMPILED: Fault = (
    WRONG,
    "prefix-orig-mod",
    "'_orig_mod.' of a compiled model is in the names, so the modules are not found: unwrap the model before saving, "
    "or take it out of the names",
)
DISTRIBUTED: Fault = (
    WRONG,
    "prefix-module",
    "'module.' of a distributed model stands before the names, so the modules are not found",
)
WRAPPERS = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
WRAPPED: Fault = (
    WRONG,
    "prefix-wrapped",
    "the names have the part of a wrapper in them, as of FSDP, DeepSpeed or activation checkpointing, so the modules "
    "are not found",
)
DOUBLED: Fault = (
    WRONG,
    "prefix-doubled",
    f"the prefix {PREFIX!r} stands twice, so the modules are not found",
)
MODEL_TWICE: Fault = (
    WRONG,
    "prefix-model-doubled",
    "'model.' stands twice before the names, so the modules are not found",
)
SEEING: Fault = (
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
SIGHT = re.compile(r"(?:^|[._])(?:visual|vision|image|audio|multi_modal|mm_)")
KOHYA_PREFIXES = (
    "lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lycoris_", "",
)  # fmt: skip
BODIES = ("model", "transformer", "bert", "roberta", "deberta", "distilbert", "gpt_neox")
"""What a model without its head is called in the one with it."""
HEADLESS_TASKS = ("FEATURE_EXTRACTION",)
WITH_HEAD = re.compile(r"For[A-Z]|LMHead")


class Spellings:
    """The model's paths, and the names that an adapter may have for them."""

    def __init__(self, adapter: AdapterFile, model: ModelHeaders) -> None:
        self.adapter, self.model = adapter, model
        self.paths = {*model.modules, *model.arrays}
        self.flat = {re.sub(r"[.]", "_", path): path for path in model.modules} if "kohya" in adapter.format else {}
        self.sees = any(SIGHT.search(path) for path in self.paths)
        self.expert_modules = {path for path in (_mixture_of(path) for path in self.paths) if path}

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
        if ".switch_mlp." in path:  # mlx-lm's name of a mixture's experts
            yield from self._same(path.replace(".switch_mlp.", ".experts."), module)
        if path == HEAD and self.model.tied:
            yield from (name for name in self.paths if name.rpartition(".")[2] in (EMBEDDING, "wte"))
        first, _, rest = path.partition(".")
        if rest and first in BODIES and not any(name.startswith(f"{first}.") for name in self.paths):
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

    def _mistaken(self, path: str) -> Iterator[tuple[Fault, str]]:
        """Yield the mistakes that a name may have in it, and the name without it."""
        bare = path.replace("_orig_mod.", "")
        if bare != path:
            yield COMPILED, bare
        if (unwrapped := WRAPPERS.sub("", bare)) != bare:
            bare = unwrapped
            yield WRAPPED, bare
        if bare.startswith("module."):
            yield DISTRIBUTED, bare.removeprefix("module.")
        while bare.startswith((PREFIX, "module.")):
            bare = bare.removeprefix(PREFIX).removeprefix("module.")
            yield DOUBLED, bare
        if bare.startswith("model.model."):
            yield MODEL_TWICE, bare.removeprefix("model.")
        without = re.sub(r"(^|\.)language_model\.", r"\1", bare)
        if without != bare:
            for spelled in (without, f"model.{without}", without.replace("model.model.", "model.")):
                yield SEEING, spelled
        yield from self._with_parts_before(bare)

    def _with_parts_before(self, bare: str) -> Iterator[tuple[Fault, str]]:
        """Yield the name with parts before it that the model's names have."""
        whole = self.sees and not _of_text_alone(self.model.config)
        fault = (SUSPICIOUS if whole else NOTE, *NOT_SEEING)
        yield fault, f"language_model.{bare}"
        yield fault, re.sub(r"^model\.", "model.language_model.", bare)
        level = _level_without_head(self.adapter.config)
        for first in ("model", "transformer", "language_model.model", "model.language_model", "bert", "roberta"):
            what = f"{first + '.'!r} is missing before the names"
            if level == WRONG:
                yield (level, "prefix-model-missing", f"{what}, so the modules are not found"), f"{first}.{bare}"
            else:
                text = f"{what}: right for the model without its head, and not found in the whole one"
                yield (level, "prefix-model-missing", text), f"{first}.{bare}"
        first, _, rest = bare.partition(".")
        if rest:
            text = f"{first + '.'!r} before the names is none of the model's, so the modules are not found"
            yield (WRONG, "prefix-unknown", text), rest


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
