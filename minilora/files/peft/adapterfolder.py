"""A folder with an adapter in PEFT's layout, every key and every shape checked before a factor is read."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...checks import FileRefused, hub_hint, short
from ...variants.variant import DORA
from ..tensors import TensorFile
from .adapterconfig import CONFIG_NAME, LayerConfig, PeftConfig, read_config
from .adapterkeys import Form, check_arrays, check_variant, forms_of, natural, with_base
from .expertkeys import ExpertForm, expert_forms

WEIGHTS_NAME = "adapter_model.safetensors"
DIGEST_KEY = "minilora_config_sha256"
"""Where `save_adapter` notes, beside the factors, the digest of the configuration that they go with."""
NORM_KEY = "minilora_dora_norm_full"
"""Where `save_adapter` notes which modules train DoRA by its full gradient, one path a line: PEFT has no such thing."""


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on the disk, checked, its factors not yet read. What it says of a module stands under its path."""

    config: PeftConfig  # adapter_config.json
    file: TensorFile  # adapter_model.safetensors
    layers: dict[str, LayerConfig]  # rank, alpha and scaling
    forms: dict[str, Form]  # the kind of layer, and how its arrays lie in the file
    full_norms: frozenset[str]  # the modules whose DoRA trains by its full gradient
    with_base: frozenset[str]  # the modules of which the file holds the base's own weight too

    @classmethod
    def open(cls, folder: Path) -> AdapterFolder:
        """Check a folder in PEFT's layout: both files, every key, and each shape against the configuration."""
        if not os.path.isdir(folder):
            expected = f"expected one with {CONFIG_NAME} and {WEIGHTS_NAME}"
            raise FileRefused(folder, f"not a folder; {expected}{hub_hint(folder)}")
        config = read_config(folder / CONFIG_NAME)
        if os.path.exists(folder / "adapter_model.bin") and not os.path.exists(folder / WEIGHTS_NAME):
            raise FileRefused(
                folder / "adapter_model.bin", "a pickle, which can run code when it is read: save it as safetensors"
            )
        file = TensorFile(folder / WEIGHTS_NAME)
        _check_of_one_save(config, file)
        forms = forms_of(file)
        check_variant(config.path, config.variant, forms)
        experts, of_experts = expert_forms(config, file, forms) if config.target_parameters else ({}, {})
        taken = {form.place for form in experts.values()}
        forms = {module: form for module, form in forms.items() if module not in taken}
        if config.target_modules == "all-linear":
            _check_all_linear(config, forms)
        layers = (config.layers(list(forms)) if forms else {}) | of_experts
        forms |= experts
        layers = {module: layers[module] for module in sorted(layers, key=natural)}
        for module, layer in layers.items():
            many = experts[module].experts if module in experts else 1
            check_arrays(file, module, forms[module], many * layer.rank)
        return cls(config, file, layers, forms, _full_norms(file, forms), with_base(file))

    def warn_of_base(self) -> None:
        """Say that the file also holds a base's own weight, where it does."""
        if self.with_base:
            warnings.warn(
                f"{self.file.path} also holds the base's own weight of {short(min(self.with_base))}, which is not "
                "loaded: the adapter belongs beside that weight. A merge compares it with the base's",
                stacklevel=3,
            )

    def shapes(self, module: str) -> tuple[int, int]:  # -> (out, in)
        """Return the shape of the matrix that a module's adapter is made for."""
        form = self.forms[module]
        A, B, *_ = (self.file.tensors[key].shape for key in form.keys(module))
        out, width = B[0], math.prod(A[1:])
        return (width, out) if isinstance(form, ExpertForm) and form.turned else (out, width)

    def read(self, module: str) -> list[np.ndarray]:  # -> (r, in), (out, r), maybe (out,)
        """Return a module's matrices, and a variant's further array; refuse NaN and infinity."""
        form, arrays = self.forms[module], []
        for key in form.keys(module):
            arrays.append(self.file.read(key))
            if not np.isfinite(arrays[-1]).all():
                raise FileRefused(self.file.path, f"{short(key)} holds NaN or infinity")
        return form.matrices(tuple(arrays))


def _full_norms(file: TensorFile, forms: dict[str, Form]) -> frozenset[str]:
    """Return the modules that the file's metadata names for DoRA's full gradient; refuse others than DoRA's."""
    note = file.metadata.get(NORM_KEY)
    modules = frozenset(note.split("\n") if note is not None else ())
    of_dora = {module for module, form in forms.items() if form.variant is DORA}
    stranger = min(modules - of_dora, default=None)
    if stranger is not None:
        raise FileRefused(file.path, f"{NORM_KEY} names {short(stranger)}, which is no module with DoRA")
    return modules


def _check_all_linear(config: PeftConfig, forms: dict[str, Form]) -> None:
    """Refuse tensors of layers that PEFT passes over for all-linear: all but linear ones, and the head."""
    for module, form in forms.items():
        if form.kind != "linear" or module.rpartition(".")[2] == "lm_head":
            what = "the head" if form.kind == "linear" else f"a layer of the kind {form.kind}"
            raise FileRefused(
                config.path, f"target_modules is 'all-linear', and there are tensors for {short(module)}, {what}"
            )


def _check_of_one_save(config: PeftConfig, file: TensorFile) -> None:
    """Refuse two files that `save_adapter` wrote and that do not belong together.

    Nothing else shows that an alpha is not that of the factors beside it. Where another program wrote one of the two,
    there is nothing to compare.
    """
    digest = file.metadata.get(DIGEST_KEY)
    if None not in (digest, config.digest) and digest != config.digest:
        raise FileRefused(
            config.path,
            f"not the configuration that was saved with {WEIGHTS_NAME}: the two files are of different saves, or one "
            "was edited. Save the adapter again",
        )
