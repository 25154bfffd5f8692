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
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ..backend import Backend, backend_of, backend_or_numpy
from ..checks import check_number, dtype_name
from ..lora import LoRA, LoRALinear
from .adapterfolder import WEIGHTS_NAME, AdapterFolder, is_module_path, keys
from .peftconfig import CONFIG_NAME, MAX_ALPHA, MIN_ALPHA
from .tensorfile import AdapterFileError, sync_folder, written_whole

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
    backend, folder = backend_or_numpy(backend), AdapterFolder.open(path)
    adapters = {}
    for module, layer in folder.layers.items():
        A, B = (backend.asarray(factor, dtype) for factor in folder.read(module))
        adapters[module] = LoRA(A, B, layer.scaling * layer.rank)
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
        if not isinstance(module, str) or not is_module_path(module):
            raise ValueError(f"layers has the key {module!r}, expected a module's path such as 'enc.q_proj'")
        adapters[module] = adapter = layer.adapter if isinstance(layer, LoRALinear) else layer
        check_number(f"alpha of layers[{module!r}]", adapter.alpha, above=MIN_ALPHA, below=MAX_ALPHA)
        for key, factor in zip(keys(module), (adapter.lora_A, adapter.lora_B), strict=True):
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
