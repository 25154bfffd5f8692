r"""Adapters as files, in PEFT's layout, without torch.

An adapter is a folder of two files. ``adapter_config.json`` says how to scale it, ``adapter_model.safetensors`` holds
its factors, two tensors for each adapted module, under the module's path in the model:

=============================================  =============  ======================
in the file                                    shape          here
=============================================  =============  ======================
``base_model.model.<path>.lora_A.weight``      (r, in)        ``lora.lora_A``
``base_model.model.<path>.lora_B.weight``      (out, r)       ``lora.lora_B``
``lora_alpha``, or its ``alpha_pattern``                      ``lora.alpha``
``r``, or its ``rank_pattern``                                ``lora.rank``
=============================================  =============  ======================

A rank-stabilised adapter (``use_rslora``) is scaled by :math:`\alpha/\sqrt r`. It becomes an ordinary one with
:math:`\alpha' = \alpha \sqrt r`, since :math:`\alpha'/r` is that scaling.

What is read is either understood whole or refused with an `AdapterFileError` that names the file and the reason:
half an adapter would compute something, and nobody would notice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from .backend import Backend, backend_of, get_backend
from .checks import check_number, dtype_name
from .lora import LoRA, LoRALinear
from .peftconfig import CONFIG_NAME, MAX_ALPHA, MIN_ALPHA, PeftConfig, read_config
from .tensorfile import FLOATS, AdapterFileError, TensorFile, member, sync_folder, written_whole

__all__ = ["AdapterFileError", "AdapterFolder", "load_adapter", "save_adapter"]

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.(?P<factor>lora_[AB])\.weight", re.DOTALL)
SAVED_DTYPES = ("float16", "float32", "float64")


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on the disk, checked, its factors not yet read.

    Attributes
    ----------
    config : PeftConfig
        What its adapter_config.json says.
    file : TensorFile
        Its adapter_model.safetensors.
    layers : dict of str to (int, float, float)
        Rank, lora_alpha as written, and scaling, by module path.
    """

    config: PeftConfig
    file: TensorFile
    layers: dict[str, tuple[int, float, float]]

    @classmethod
    def open(cls, path: str | Path) -> AdapterFolder:
        """Check a folder in PEFT's layout: both files, every key, and each shape against the configuration."""
        folder = Path(path)
        if not folder.is_dir():
            raise AdapterFileError(folder, f"not a folder; expected one with {CONFIG_NAME} and {WEIGHTS_NAME}")
        config = read_config(member(folder, CONFIG_NAME))
        if (folder / "adapter_model.bin").exists() and not (folder / WEIGHTS_NAME).exists():
            raise AdapterFileError(
                folder / "adapter_model.bin", "a pickle, which can run code when it is read: save it as safetensors"
            )
        file = TensorFile(member(folder, WEIGHTS_NAME))
        layers = config.layers(_modules(file))
        for module, (rank, _, _) in layers.items():
            _check_factors(file, module, rank)
        return cls(config, file, layers)

    def shapes(self, module: str) -> tuple[int, int]:  # -> (out, in)
        """Return the shape of the weight that a module's adapter is made for."""
        A, B = (self.file.tensors[key] for key in _keys(module))
        return B.shape[0], A.shape[1]

    def read(self, module: str) -> tuple[np.ndarray, np.ndarray]:  # -> (r, in), (out, r)
        """Return a module's two factors; refuse NaN and infinity."""
        A, B = (self.file.read(key) for key in _keys(module))
        for key, factor in zip(_keys(module), (A, B), strict=True):
            if not np.isfinite(factor).all():
                raise AdapterFileError(self.file.path, f"{key} holds NaN or infinity")
        return A, B


def _keys(module: str) -> tuple[str, str]:
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def _modules(file: TensorFile) -> list[str]:
    """Return the paths of the adapted modules; refuse keys that are not one of a pair of factors."""
    factors: dict[str, set[str]] = {}
    for key in file.tensors:
        match = KEY.fullmatch(key)
        if match is None:
            raise AdapterFileError(file.path, f"the key {key!r} is {_what_is(key)}")
        factors.setdefault(match["module"], set()).add(match["factor"])
    for module, found in factors.items():
        if len(found) != 2:
            (missing,) = {"lora_A", "lora_B"} - found
            raise AdapterFileError(file.path, f"the module {module!r} has no {missing}.weight")
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


def _check_module(path: Path, module: str) -> None:
    if not all(module.split(".")) or not module.isprintable():
        raise AdapterFileError(path, f"{module!r} is not a module's path: names with dots between them")


def _check_factors(file: TensorFile, module: str, rank: int) -> None:
    """Refuse factors that are not two matrices of one type and of the rank that the configuration says."""
    (key_A, key_B), (A, B) = _keys(module), (file.tensors[key] for key in _keys(module))
    for key, spec in ((key_A, A), (key_B, B)):
        if len(spec.shape) != 2:
            what = ": a convolution, which is not supported" if len(spec.shape) > 2 else ", expected a matrix"
            raise AdapterFileError(file.path, f"{key} has shape {list(spec.shape)}{what}")
        if 0 in spec.shape:
            raise AdapterFileError(file.path, f"{key} has shape {list(spec.shape)}, which is empty")
        if spec.dtype not in FLOATS:
            raise AdapterFileError(file.path, f"{key} has dtype {spec.dtype}, expected one of {', '.join(FLOATS)}")
    if A.dtype != B.dtype:
        raise AdapterFileError(file.path, f"{key_A} has dtype {A.dtype} and {key_B} has dtype {B.dtype}")
    if A.shape[0] != rank:
        raise AdapterFileError(file.path, f"{key_A} has shape {list(A.shape)}, expected [{rank}, in] by the rank")
    if B.shape[1] != rank:
        raise AdapterFileError(file.path, f"{key_B} has shape {list(B.shape)}, expected [out, {rank}] by the rank")


def load_adapter(path: str | Path, *, dtype: Any = None, backend: Backend | None = None) -> dict[str, LoRA]:
    """Read an adapter in PEFT's layout.

    Parameters
    ----------
    path : path
        The folder.
    dtype : float dtype, optional
        Of the adapters; by default that of the file, and float32 for bfloat16, which NumPy does not have.
    backend : Backend, optional
        Where the arrays are to live; NumPy by default.

    Returns
    -------
    dict of str to LoRA
        The adapters by module path, such as ``"enc.q_proj"``. ``LoRALinear(base, adapter)`` puts one on a base.

    Raises
    ------
    AdapterFileError
        If a file is missing, damaged or inconsistent, or asks for what is not supported.
    """
    folder, backend = AdapterFolder.open(path), backend or get_backend("numpy")
    adapters = {}
    for module, (rank, _, scaling) in folder.layers.items():
        A, B = (backend.asarray(factor, dtype) for factor in folder.read(module))
        adapters[module] = LoRA(A, B, scaling * rank)
    return adapters


def save_adapter(
    path: str | Path,
    layers: Mapping[str, LoRA | LoRALinear],
    *,
    fan_in_fan_out: bool = False,
    base_model: str | None = None,
) -> None:
    """Write adapters in PEFT's layout.

    Parameters
    ----------
    path : path
        The folder; it is made where there is none, and an adapter that it holds is replaced.
    layers : mapping of str to LoRA or LoRALinear
        The adapters by the path of the module that each belongs to.
    fan_in_fan_out : bool
        Whether the base stores its weights (in, out). The adapters' factors are the same either way.
    base_model : str, optional
        The base's name or path, for readers that look for it.

    Raises
    ------
    ValueError, TypeError
        If an adapter cannot be written. Nothing has been written then.
    """
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(f"layers must be a dict of module paths and adapters with at least one entry, got {layers!r}")
    adapters, tensors = {}, {}
    for module, layer in layers.items():
        if not isinstance(layer, LoRA | LoRALinear):
            raise TypeError(f"layers[{module!r}] must be a LoRA or a LoRALinear, got {type(layer).__name__}")
        if not isinstance(module, str) or not all(module.split(".")) or not module.isprintable():
            raise ValueError(f"layers has the key {module!r}, expected a module's path such as 'enc.q_proj'")
        adapters[module] = adapter = layer.adapter if isinstance(layer, LoRALinear) else layer
        check_number(f"alpha of layers[{module!r}]", adapter.alpha, above=MIN_ALPHA, below=MAX_ALPHA)
        for key, factor in zip(_keys(module), (adapter.lora_A, adapter.lora_B), strict=True):
            if dtype_name(factor) not in SAVED_DTYPES:
                raise TypeError(f"layers[{module!r}] has dtype {factor.dtype}, expected one of {SAVED_DTYPES}")
            tensors[key] = np.ascontiguousarray(backend_of(factor).to_numpy(factor))
            if not np.isfinite(tensors[key]).all():
                raise ValueError(f"layers[{module!r}] holds NaN or infinity")
    config = json.dumps(_config(adapters, fan_in_fan_out, base_model), indent=2, allow_nan=False) + "\n"

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    # The configuration goes first and comes last: a folder without one is refused, so whoever is killed between the
    # two files never leaves new factors with an old alpha.
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    sync_folder(folder)
    with written_whole(folder / WEIGHTS_NAME) as file:
        file.write(save(tensors, metadata={"format": "pt"}))
    with written_whole(folder / CONFIG_NAME) as file:
        file.write(config.encode())


def _config(adapters: Mapping[str, LoRA], fan_in_fan_out: bool, base_model: str | None) -> dict[str, Any]:
    """Return adapter_config.json: the first adapter's rank and alpha, and patterns for those that differ."""
    ranks = {module: adapter.rank for module, adapter in adapters.items()}
    # PEFT writes whole alphas as integers.
    alphas = {m: int(a.alpha) if a.alpha == int(a.alpha) else a.alpha for m, a in adapters.items()}
    r, lora_alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "target_modules": list(adapters),
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": _pattern(ranks, r),
        "alpha_pattern": _pattern(alphas, lora_alpha),
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": bool(fan_in_fan_out),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return the exceptions, keyed so that each matches its own module alone: "fc" would also match "enc.fc"."""
    return {"^" + re.escape(module): value for module, value in values.items() if value != default}
