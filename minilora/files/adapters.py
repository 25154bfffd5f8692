"""Adapters as files, in PEFT's layout, without torch.

An adapter is a folder of two files. ``adapter_config.json`` says how to scale it, ``adapter_model.safetensors`` holds
its factors, two tensors for each adapted module, under the module's path in the model. For a linear layer:

=============================================  =============  ======================
in the file                                    shape          here
=============================================  =============  ======================
``base_model.model.<path>.lora_A.weight``      (r, in)        ``lora.lora_A``
``base_model.model.<path>.lora_B.weight``      (out, r)       ``lora.lora_B``
``lora_alpha``, or its ``alpha_pattern``                      ``lora.alpha``
``r``, or its ``rank_pattern``                                ``lora.rank``
=============================================  =============  ======================

For embeddings, convolutions and DoRA, `minilora.files.peft.adapterkeys` has the names and shapes.

Alpha, rank and ``use_rslora`` are those of the file, so that every scaling comes back as it was. PEFT's configuration
has one ``use_rslora``, and one flag such as ``use_dora``, for all modules:

- Where only some of the adapters are rank-stabilised, the file says ``use_rslora: false``. ``alpha_pattern`` then has
  alpha sqrt(r) for those, which gives the same scaling up to rounding; which they were is forgotten.
- DoRA beside adapters without magnitudes is refused.

An adapter that started by PiSSA is written as the difference to its start, of rank 2r over the original base
(`minilora.variants.pissa`). The backward of DoRA (``dora_norm="full"``) is noted in the tensors' metadata: PEFT passes
over the note and trains with the norm as a constant; the outputs are the same.

What is read is either understood whole or refused with a `FileRefused` that names the file and the reason:
half an adapter would compute something, and nobody would notice.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..adaptation import adapters, check_adapters
from ..backend import Backend, backend_of, backend_or_numpy
from ..checks import FileRefused, check_flag, check_float_dtype, check_number, check_path, dtype_name, short
from ..layer import Layer, parts_besides
from ..lora import LoRA, LoRALinear
from ..variants.adapter import Adapter, Rewritten
from ..variants.dora import DoRA, DoRAAdapter
from ..variants.pissa import over_original
from ..variants.stackedlora import StackedLoRA, StackedLoRALinear
from ..variants.variant import LORA, of_its_own, variant_of
from .atomic import replaceable, written_together
from .peft.adapterconfig import CONFIG_NAME, MAX_ALPHA, MIN_ALPHA, config_text, digest
from .peft.adapterfolder import DIGEST_KEY, NORM_KEY, WEIGHTS_NAME, AdapterFolder
from .peft.adapterkeys import BASE, CONVOLUTIONS, PEFT_NAMES, PREFIX, Form, is_module_path
from .peft.expertkeys import WRITTEN_AS, ExpertForm, places
from .tensors import FLOATS, in_dtype, write_tensors

__all__ = ["load_adapter", "save_adapter"]

SAVED_DTYPES = ("float16", "float32", "float64")
FILE_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
"""The types that a file can have, and their names there."""
PLACES: tuple[Any, ...] = (LORA.beside, *(variant.beside for variant in PEFT_NAMES), Rewritten)
"""The classes of adapted layers that PEFT's layout can hold."""


def load_adapter(path: str | Path, *, dtype: Any = None, backend: Backend | None = None) -> dict[str, Adapter]:
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
    dict of str to Adapter
        The adapters by module path, such as ``"enc.q_proj"``. ``attach(model, adapters)`` puts them on a model,
        ``attach(layer, {"": adapter})`` one on a single layer. Each knows its kind of layer, its kernel and its
        magnitude. The adapter of a mixture's array is a `StackedLoRA`, by the array's path.

    Raises
    ------
    FileRefused
        If a file is missing, damaged or inconsistent, or asks for what is not supported.

    Warns
    -----
    UserWarning
        If the file also holds a base's own weight, as PEFT saves it beside an adapted ``embed_tokens`` or ``lm_head``.
        It is not loaded.
    """
    backend, path = backend_or_numpy(backend), check_path("path", path)
    if dtype is not None:
        check_float_dtype("dtype", dtype)
    by_path: dict[str, Any] = {}
    folder = AdapterFolder.open(path)
    folder.warn_of_base()
    for module, layer in folder.layers.items():
        form = folder.forms[module]
        reaches = f"the factors of {short(module)} reach"
        arrays = (
            array if dtype is None else in_dtype(array, dtype, folder.file.path, reaches)
            for array in folder.read(module)
        )
        A, B, *further = (backend.asarray(array) for array in arrays)
        if isinstance(form, ExpertForm):
            experts = form.experts
            by_path[module] = StackedLoRA(A, B, layer.alpha, experts=experts, use_rslora=layer.use_rslora)
            continue
        more: dict[str, Any] = {form.variant.array: further[0]} if further else {}
        if module in folder.full_norms:
            more["dora_norm"] = "full"
        by_path[module] = form.variant.adapter(
            A,
            B,
            layer.alpha,
            kind=form.kind,
            kernel=form.kernel,
            use_rslora=layer.use_rslora,
            **more,
        )
    return by_path


def check_base_weights(path: str | Path, weight: Callable[[str], Any]) -> None:
    """Refuse an adapter that brings a weight of another base with it: PEFT would compute with that weight.

    Parameters
    ----------
    path : path
        The adapter's folder.
    weight : callable
        Returns the base's weight at a module's path, on the host; None where there is none to compare.

    Raises
    ------
    FileRefused
        If a weight in the file is not the base's, rounded to the file's type.
    """
    folder = AdapterFolder.open(check_path("path", path))
    for module in sorted(folder.with_base):
        key, base = f"{PREFIX}{module}.{BASE}", weight(module)
        if base is None:
            continue
        theirs, dtype = folder.file.read(key), FLOATS[folder.file.tensors[key].dtype]
        if base.shape != theirs.shape or not np.array_equal(base.astype(dtype), theirs.astype(dtype)):
            raise FileRefused(
                folder.file.path, f"{short(key)} is not the model's {short(module)}: the adapter is of another base"
            )


def save_adapter(
    path: str | Path,
    layers: Mapping[str, LoRA | LoRALinear | DoRA | Rewritten],
    *,
    fan_in_fan_out: bool = False,
    base_model: str | None = None,
    task_type: str | None = None,
    target_modules: Sequence[str] | None = None,
    lora_dropout: float = 0.0,
    dtype: str | None = None,
) -> None:
    """Write adapters in PEFT's layout.

    Parameters
    ----------
    path : path
        The folder; it is made where there is none, and an adapter that it holds is replaced.
    layers : mapping of str to LoRA, or to an adapted layer
        The adapters by the path of the module that each belongs to, as `minilora.adapters` returns them. A plain `LoRA`
        is taken for one of a linear layer.
    fan_in_fan_out : bool
        Whether the base stores its weights (in, out). The adapters' factors are the same either way.
    base_model : str, optional
        The base's name or path, for readers that look for it.
    task_type : str, optional
        What the model is for, such as "CAUSAL_LM": PEFT's ``AutoPeftModelForCausalLM`` loads no adapter without it.
    target_modules : sequence of str, optional
        Ends of the paths, such as "q_proj", that name these modules of the base and no other
        (`minilora.adaptation.ends_of`). Without them the file has the whole paths.
    lora_dropout : float
        The probability with which an entry of an adapter's input was dropped in the training, for one that goes on
        elsewhere.
    dtype : {"float16", "bfloat16", "float32", "float64"}, optional
        Of the tensors in the file, each number rounded to nearest with ties to even; by default that of each
        array.

    Raises
    ------
    ValueError, TypeError
        If an adapter cannot be written, some have a magnitude and others not, a number is too large for `dtype`, or
        the folder holds under these names anything but files. Nothing has been written then.
    OSError
        If the disk does not take the files. The adapter that was there is left as it was.
    """
    path, fan_in_fan_out = check_path("path", path), check_flag("fan_in_fan_out", fan_in_fan_out)
    if base_model is not None and not isinstance(base_model, str):
        raise TypeError(f"base_model must be a text or None, got {base_model!r}")
    if isinstance(layers, Layer):
        check_adapters("layers", layers)
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(f"layers must be a dict of module paths and adapters with at least one entry, got {layers!r}")
    if dtype is not None and dtype not in FILE_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(FILE_DTYPES)} or None, got {dtype!r}")
    by_path: dict[str, Adapter | StackedLoRA] = {}
    tensors: dict[str, np.ndarray] = {}
    for module, layer in layers.items():
        _check_saved(module, layer)
        if not isinstance(module, str) or not is_module_path(module):
            raise ValueError(f"layers has the key {short(module)}, expected a module's path such as 'enc.q_proj'")
        by_path[module] = _over_original(layer)
    where = places(module for module, adapter in by_path.items() if isinstance(adapter, StackedLoRA))
    for module, adapter in by_path.items():
        new = _tensors(module, adapter, where.get(module))
        if clash := new.keys() & tensors.keys():
            raise ValueError(f"layers[{short(module)}] and another layer would both be {short(min(clash))} in the file")
        tensors |= new
    if dtype is not None:
        tensors = {key: _rounded(key, array, FILE_DTYPES[dtype]) for key, array in tensors.items()}
    _check_alike(by_path)
    use_rslora = all(adapter.use_rslora for adapter in by_path.values())
    for module, adapter in by_path.items():
        alpha = _lora_alpha(adapter, use_rslora)
        check_number(f"alpha of layers[{short(module)}]", alpha, above=MIN_ALPHA, below=MAX_ALPHA)
    # The widest types first, so that each tensor begins at a multiple of its own size.
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))
    dropout = check_number("lora_dropout", lora_dropout, above=0, below=1, or_equal=True)
    further: dict[str, Any] = {"task_type": task_type, "lora_dropout": dropout}
    if target_modules is not None:
        _check_ends(target_modules, by_path)
        further["target_modules"] = [*target_modules]
    config = config_text(_config(by_path, use_rslora, fan_in_fan_out, base_model) | further)
    full = [module for module, a in by_path.items() if isinstance(a, DoRAAdapter) and a.dora_norm == "full"]
    notes = {"format": "pt", DIGEST_KEY: digest(config), **({NORM_KEY: "\n".join(full)} if full else {})}
    check_adapter_target(path)
    path.mkdir(parents=True, exist_ok=True)
    with written_together(path / WEIGHTS_NAME, path / CONFIG_NAME) as (weights_file, config_file):
        write_tensors(weights_file, tensors, notes)
        config_file.write(config)


def _check_saved(module: Any, layer: Any) -> None:
    """Refuse what PEFT's layout has no place for: another class, another array, another formula."""
    if type(layer) in (StackedLoRA, StackedLoRALinear) and type(getattr(layer, "adapter", layer)) is StackedLoRA:
        return
    claims: list[tuple[Any, Any, Any]] = [(layer, LoRA, _beyond)]
    if not isinstance(layer, LoRA):
        claims = [(layer, PLACES, _beyond_place), (getattr(layer, "adapter", None), LoRA, _beyond)]
    for part, classes, beyond in claims:
        known = isinstance(part, classes)
        reasons = beyond(part) if known else []
        if reasons or not known:
            raise TypeError(
                f"layers[{short(module)}] must be a LoRA or a LoRALinear, got {type(part).__name__}, for which PEFT's "
                f"layout of LoRA has no place{': it has ' if reasons else ''}{' and '.join(reasons)}"
            )


def _beyond(adapter: LoRA) -> list[str]:
    """Return what an adapter has that a file cannot hold, in words."""
    variant = variant_of(adapter)
    return of_its_own(adapter) or ([f"a {variant.array}"] if variant not in (LORA, *PEFT_NAMES) else [])


def _beyond_place(layer: Layer) -> list[str]:
    """Return what a subclass of an adapted layer has and computes besides its adapter, in words."""
    place = next(place for place in PLACES if isinstance(layer, place))
    arrays = [f"a {name}" for name in parts_besides(layer, "base", "adapter")]
    methods = [name for name in ("forward", "merge") if getattr(type(layer), name) != getattr(place, name)]
    return arrays + [f"a {name} of its own" for name in methods]


def _over_original(layer: LoRA | LoRALinear | DoRA | Rewritten | StackedLoRALinear) -> Adapter | StackedLoRA:
    """Return the adapter that a layer is or has, which knows its kind of layer, for the original base."""
    adapter: Any = layer if isinstance(layer, LoRA) else adapters(layer)[""]
    if isinstance(adapter, StackedLoRA):
        return adapter
    if not isinstance(adapter, Adapter):  # a plain LoRA is taken for one of a linear layer
        adapter = Adapter(adapter.lora_A, adapter.lora_B, adapter.alpha)
    return over_original(adapter)


def _tensors(module: str, adapter: Adapter | StackedLoRA, place: str | None) -> dict[str, np.ndarray]:
    """Return an adapter's arrays with the names and shapes that PEFT gives them; of an array, in its place."""
    if isinstance(adapter, StackedLoRA):
        keys = ExpertForm(place=place or "").keys(module)
        return {
            key: _written(module, factor, factor.shape)
            for key, factor in zip(keys, (adapter.lora_A, adapter.lora_B), strict=True)
        }
    variant = variant_of(adapter)
    form = Form(adapter.kind, tuple(adapter.kernel), variant)
    (out, width), axes = adapter.shape, 1 + CONVOLUTIONS.index(form.kind) if form.kind in CONVOLUTIONS else 0
    if len(form.kernel) != axes or width % math.prod(form.kernel):
        raise ValueError(
            f"layers[{short(module)}] has in = {width} and a kernel of {form.kernel}, which do not fit its kind, "
            f"{form.kind!r}"
        )
    arrays = [adapter.lora_A, adapter.lora_B, *([getattr(adapter, variant.array)] if variant.array else [])]
    shapes = form.shapes(adapter.rank, out, width)
    return {
        key: _written(module, array, shape) for key, array, shape in zip(form.keys(module), arrays, shapes, strict=True)
    }


def _written(module: str, array: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array as the file has it; refuse one of another type, NaN and infinity."""
    if dtype_name(array) not in SAVED_DTYPES:
        raise TypeError(f"layers[{short(module)}] has dtype {array.dtype}, expected one of {SAVED_DTYPES}")
    host = np.ascontiguousarray(backend_of(array).to_numpy(array)).reshape(shape)
    if not np.isfinite(host).all():
        raise ValueError(f"layers[{short(module)}] holds NaN or infinity")
    return host


def _rounded(key: str, array: np.ndarray, name: str) -> np.ndarray:
    """Return finite numbers in a type of the file that can hold them."""
    with np.errstate(over="ignore"):
        rounded = array.astype(FLOATS[name])
    if not np.isfinite(rounded).all():
        raise ValueError(f"{short(key)} reaches {np.abs(array).max():g}, more than {name} holds")
    return rounded


def _check_alike(by_path: Mapping[str, Adapter | StackedLoRA]) -> None:
    """Refuse adapters of two variants: PEFT's configuration has one flag for all of them."""
    for variant, names in PEFT_NAMES.items():
        having = [module for module, adapter in by_path.items() if variant_of(adapter) is variant]
        others = [module for module in by_path if module not in having]
        if having and others:
            raise ValueError(
                f"layers[{short(having[0])}] has {variant.name}'s {variant.array} and layers[{short(others[0])}] has "
                f"none: PEFT's configuration has one {names.flag} for all modules. Save them to two folders"
            )


def _check_ends(target_modules: Sequence[str], by_path: Mapping[str, Adapter | StackedLoRA]) -> None:
    """Refuse ends of paths that do not name each module; which others of the base they name, the caller knows."""
    for module, adapter in by_path.items():
        ends = (module == name or module.endswith(f".{name}") for name in target_modules)
        if not isinstance(adapter, StackedLoRA) and not any(ends):
            raise ValueError(f"target_modules does not name {short(module)}: expected an end of each path of layers")


def check_adapter_target(path: Path) -> None:
    """Refuse a folder that an adapter could not be written to."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.lexists(folder))
    if not os.path.isdir(existing):
        raise ValueError(f"{str(path)!r}: {str(existing)!r} is a file, expected a folder or a new name")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{str(path)!r}: the folder {str(existing)!r} cannot be written")
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        replaceable(path / name)


def _config(
    by_path: Mapping[str, Adapter | StackedLoRA], use_rslora: bool, fan_in_fan_out: bool, base_model: str | None
) -> dict[str, Any]:
    """Return adapter_config.json: the first adapter's rank and alpha, and patterns for those that differ."""
    ranks = {module: adapter.rank for module, adapter in by_path.items()}
    parameters = [module for module, adapter in by_path.items() if isinstance(adapter, StackedLoRA)]
    variants = {variant_of(adapter) for adapter in by_path.values()}
    flags = {names.flag: variant in variants for variant, names in PEFT_NAMES.items()}
    alphas = {module: _lora_alpha(adapter, use_rslora) for module, adapter in by_path.items()}
    r, lora_alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "target_modules": [module for module in by_path if module not in parameters],
        **({"target_parameters": parameters, "peft_version": WRITTEN_AS} if parameters else {}),
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": _pattern(ranks, r),
        "alpha_pattern": _pattern(alphas, lora_alpha),
        "use_rslora": use_rslora,
        **flags,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _lora_alpha(adapter: Adapter | StackedLoRA, use_rslora: bool) -> float:
    """Return the alpha that the file has: the adapter's own or, where only the adapter has the root, one as large."""
    alpha = adapter.alpha if adapter.use_rslora == use_rslora else adapter.scaling * adapter.rank
    return int(alpha) if alpha.is_integer() else alpha  # PEFT writes whole alphas as integers


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return the exceptions, keyed so that each matches its own module alone: "fc" would also match "enc.fc"."""
    return {"^" + re.escape(module): value for module, value in values.items() if value != default}
