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

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import Backend, backend_of, backend_or_numpy
from ..checks import check_flag, check_float_dtype, check_number, check_path, dtype_name
from ..lora import LoRA, LoRALinear
from .adapterfolder import DIGEST_KEY, WEIGHTS_NAME, AdapterFolder, is_module_path, keys
from .errors import AdapterFileError, short
from .peftconfig import CONFIG_NAME, MAX_ALPHA, MAX_CONFIG, MIN_ALPHA, config_text, digest
from .tensorfile import MAX_HEADER, tensor_header
from .writing import locked, replaceable, written_together

__all__ = ["AdapterFileError", "load_adapter", "save_adapter"]

SAVED_DTYPES = ("float16", "float32", "float64")


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
    backend, path = backend_or_numpy(backend), check_path("path", path)
    if dtype is not None:
        check_float_dtype("dtype", dtype)
    if not os.path.isdir(path):
        raise AdapterFileError(path, f"not a folder; expected one with {CONFIG_NAME} and {WEIGHTS_NAME}")
    adapters = {}
    with locked(path, shared=True):  # a `save_adapter` of another process waits until both files are read
        folder = AdapterFolder.open(path)
        with folder.file.opened() as file:
            for module, layer in folder.layers.items():
                A, B = (_rounded(factor, dtype, folder, module) for factor in folder.read(module, file))
                adapters[module] = LoRA(backend.asarray(A), backend.asarray(B), layer.plain_alpha)
    return adapters


def _rounded(factor: np.ndarray, dtype: Any, folder: AdapterFolder, module: str) -> np.ndarray:
    """Return a factor in the type that was asked for; refuse numbers that it cannot hold."""
    if dtype is None:
        return factor
    with np.errstate(over="ignore"):
        rounded = factor.astype(np.dtype(dtype).name, copy=False)
    if not np.isfinite(rounded).all():
        largest = float(np.abs(factor).max())
        raise AdapterFileError(
            folder.file.path, f"the factors of {short(module)} reach {largest:g}, which {np.dtype(dtype)} cannot hold"
        )
    return rounded


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
        If an adapter cannot be written, or the folder holds under these names anything but files. Nothing has been
        written then.
    OSError
        If the disk does not take the files. The adapter that was there is left as it was.
    """
    path, fan_in_fan_out = check_path("path", path), check_flag("fan_in_fan_out", fan_in_fan_out)
    if base_model is not None and not isinstance(base_model, str):
        raise TypeError(f"base_model must be a text or None, got {base_model!r}")
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(f"layers must be a dict of module paths and adapters with at least one entry, got {layers!r}")
    adapters, tensors = {}, {}
    for module, layer in layers.items():
        if not isinstance(layer, LoRA | LoRALinear):
            raise TypeError(f"layers[{short(module)}] must be a LoRA or a LoRALinear, got {type(layer).__name__}")
        if not isinstance(module, str) or not is_module_path(module):
            raise ValueError(f"layers has the key {short(module)}, expected a module's path such as 'enc.q_proj'")
        adapters[module] = adapter = layer.adapter if isinstance(layer, LoRALinear) else layer
        check_number(f"alpha of layers[{short(module)}]", adapter.alpha, above=MIN_ALPHA, below=MAX_ALPHA)
        for key, factor in zip(keys(module), (adapter.lora_A, adapter.lora_B), strict=True):
            if dtype_name(factor) not in SAVED_DTYPES:
                raise TypeError(f"layers[{short(module)}] has dtype {factor.dtype}, expected one of {SAVED_DTYPES}")
            tensors[key] = np.ascontiguousarray(backend_of(factor).to_numpy(factor))
            if not np.isfinite(tensors[key]).all():
                raise ValueError(f"layers[{short(module)}] holds NaN or infinity")
    # The widest types first, so that each tensor begins at a multiple of its own size.
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))
    config = config_text(_config(adapters, fan_in_fan_out, base_model))
    header = tensor_header(tensors, {"format": "pt", DIGEST_KEY: digest(config)})
    for what, size, at_most in (
        (CONFIG_NAME, len(config), MAX_CONFIG),
        (f"header of {WEIGHTS_NAME}", len(header) - 8, MAX_HEADER),
    ):
        if size > at_most:
            raise ValueError(
                f"layers has so many or so long names that the {what} takes {size} bytes, expected at most {at_most}"
            )
    check_adapter_target(path)
    path.mkdir(parents=True, exist_ok=True)
    with written_together(path / WEIGHTS_NAME, path / CONFIG_NAME) as (weights_file, config_file):
        weights_file.write(header)
        for factor in tensors.values():
            weights_file.write(factor.data)
        config_file.write(config)


def check_adapter_target(path: Path) -> None:
    """Refuse a folder that an adapter could not be written to."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.lexists(folder))
    if not os.path.isdir(there):
        raise ValueError(f"{str(path)!r}: {str(there)!r} is a file, expected a folder or a new name")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{str(path)!r}: the folder {str(there)!r} cannot be written")
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        replaceable(path / name)


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
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return the exceptions, keyed so that each matches its own module alone: "fc" would also match "enc.fc"."""
    return {"^" + re.escape(module): value for module, value in values.items() if value != default}
