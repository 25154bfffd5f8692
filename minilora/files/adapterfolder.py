"""A folder with an adapter in PEFT's layout, every key and every shape checked before a factor is read."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .errors import AdapterFileError, short
from .peftconfig import CONFIG_NAME, LayerConfig, PeftConfig, read_config
from .tensorfile import FLOATS, TensorFile, member
from .writing import locked

WEIGHTS_NAME = "adapter_model.safetensors"
DIGEST_KEY = "minilora_config_sha256"
"""Where `save_adapter` notes, beside the factors, the digest of the configuration that they go with."""
PREFIX = "base_model.model."
KEY = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.(?P<factor>lora_[AB])\.weight", re.DOTALL)


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on the disk, checked, its factors not yet read.

    Attributes
    ----------
    config : PeftConfig
        What its adapter_config.json says.
    file : TensorFile
        Its adapter_model.safetensors.
    layers : dict of str to LayerConfig
        Rank, alpha and scaling, by module path.
    """

    config: PeftConfig
    file: TensorFile
    layers: dict[str, LayerConfig]

    @classmethod
    def open(cls, path: str | Path) -> AdapterFolder:
        """Check a folder in PEFT's layout: both files, every key, and each shape against the configuration."""
        folder = Path(path)
        if not os.path.isdir(folder):
            raise AdapterFileError(folder, f"not a folder; expected one with {CONFIG_NAME} and {WEIGHTS_NAME}")
        with locked(folder, shared=True):
            config = read_config(member(folder, CONFIG_NAME))
            if os.path.exists(folder / "adapter_model.bin") and not os.path.exists(folder / WEIGHTS_NAME):
                raise AdapterFileError(
                    folder / "adapter_model.bin", "a pickle, which can run code when it is read: save it as safetensors"
                )
            file = TensorFile(member(folder, WEIGHTS_NAME))
        _check_of_one_save(config, file)
        layers = config.layers(_modules(file))
        for module, layer in layers.items():
            _check_factors(file, module, layer.rank)
        return cls(config, file, layers)

    def shapes(self, module: str) -> tuple[int, int]:  # -> (out, in)
        """Return the shape of the weight that a module's adapter is made for."""
        A, B = (self.file.tensors[key] for key in keys(module))
        return B.shape[0], A.shape[1]

    def read(self, module: str, file: BinaryIO) -> tuple[np.ndarray, np.ndarray]:  # -> (r, in), (out, r)
        """Return a module's two factors from the opened file; refuse NaN and infinity."""
        A, B = (self.file.read(key, file) for key in keys(module))
        for key, factor in zip(keys(module), (A, B), strict=True):
            if not np.isfinite(factor).all():
                raise AdapterFileError(self.file.path, f"{short(key)} holds NaN or infinity")
        return A, B


def _check_of_one_save(config: PeftConfig, file: TensorFile) -> None:
    """Refuse two files that `save_adapter` wrote and that do not belong together.

    Nothing else shows that an alpha is not that of the factors beside it. Where another program wrote one of the two,
    there is nothing to compare.
    """
    noted = file.metadata.get(DIGEST_KEY)
    if None not in (noted, config.digest) and noted != config.digest:
        raise AdapterFileError(
            config.path,
            f"not the configuration that was saved with {WEIGHTS_NAME}: the two files are of different saves, or one "
            "was edited. Save the adapter again",
        )


def keys(module: str) -> tuple[str, str]:
    """Return the names of a module's two factors in the file."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def _modules(file: TensorFile) -> list[str]:
    """Return the paths of the adapted modules; refuse keys that are not one of a pair of factors."""
    factors: dict[str, set[str]] = {}
    for key in file.tensors:
        match = KEY.fullmatch(key)
        if match is None:
            raise AdapterFileError(file.path, f"the key {short(key)} is {_what_is(key)}")
        factors.setdefault(match["module"], set()).add(match["factor"])
    for module, found in factors.items():
        if len(found) != 2:
            (missing,) = {"lora_A", "lora_B"} - found
            raise AdapterFileError(file.path, f"the module {short(module)} has no {missing}.weight")
        _check_module(file.path, module)
    if not factors:
        raise AdapterFileError(file.path, "there are no tensors in it")
    return sorted(factors)


def _what_is(key: str) -> str:
    """Say in words what a key that cannot be read belongs to."""
    for part, meaning in (
        ("lora_embedding_", "of an adapted embedding, which is not supported"),
        ("lora_magnitude_vector", "of DoRA, which is not supported"),
        (".bias", "a bias (lora_bias, or bias of the base), which is not supported"),
        ("modules_to_save", "of a module trained in full, which is not supported"),
    ):
        if part in key:
            return meaning
    if not key.startswith(PREFIX) and ".lora_" in key:
        return f"without the prefix {PREFIX!r}"
    return f"unexpected, expected {PREFIX}<module>.lora_A.weight and the like for lora_B"


def is_module_path(module: str) -> bool:
    """Return whether a text can be a module's path: names with dots between them."""
    return all(module.split(".")) and module.isprintable()


def _check_module(path: Path, module: str) -> None:
    if not is_module_path(module):
        raise AdapterFileError(path, f"{short(module)} is not a module's path: names with dots between them")


def _check_factors(file: TensorFile, module: str, rank: int) -> None:
    """Refuse factors that are not two matrices of one type and of the rank that the configuration says."""
    (key_A, key_B), (A, B) = keys(module), (file.tensors[key] for key in keys(module))
    for key, spec in ((key_A, A), (key_B, B)):
        if len(spec.shape) != 2:
            what = ": a convolution, which is not supported" if len(spec.shape) > 2 else ", expected a matrix"
            raise AdapterFileError(file.path, f"{short(key)} has shape {list(spec.shape)}{what}")
        if 0 in spec.shape:
            raise AdapterFileError(file.path, f"{short(key)} has shape {list(spec.shape)}, which is empty")
        if spec.dtype not in FLOATS:
            raise AdapterFileError(
                file.path, f"{short(key)} has dtype {spec.dtype}, expected one of {', '.join(FLOATS)}"
            )
    if A.dtype != B.dtype:
        raise AdapterFileError(file.path, f"{short(key_A)} has dtype {A.dtype} and {short(key_B)} has dtype {B.dtype}")
    if A.shape[0] != rank:
        raise AdapterFileError(
            file.path, f"{short(key_A)} has shape {list(A.shape)}, expected [{rank}, in] by the rank"
        )
    if B.shape[1] != rank:
        raise AdapterFileError(
            file.path, f"{short(key_B)} has shape {list(B.shape)}, expected [out, {rank}] by the rank"
        )
