"""Loading and saving adapters in PEFT's layout, without torch.

An adapter is a folder of two files. ``adapter_config.json`` defines its scaling. ``adapter_model.safetensors`` contains
its factors: two tensors for each adapted module, named after the module's path in the model. For a linear layer:

=============================================  =============  ======================
in the file                                    shape          here
=============================================  =============  ======================
``base_model.model.<path>.lora_A.weight``      (r, in)        ``lora.lora_A``
``base_model.model.<path>.lora_B.weight``      (out, r)       ``lora.lora_B``
``lora_alpha``, or its ``alpha_pattern``                      ``lora.alpha``
``r``, or its ``rank_pattern``                                ``lora.rank``
=============================================  =============  ======================

For embeddings, convolutions and DoRA, `minilora.files.peft` has the names and shapes.

Alpha, rank and ``use_rslora`` are the file's, so every scaling is restored. PEFT's configuration has a single
``use_rslora``, and a single flag such as ``use_dora``, for all modules:

- If only some adapters are rank-stabilised, the file has ``use_rslora: false``. ``alpha_pattern`` then has alpha
  sqrt(r) for these, which gives the same scaling up to rounding. The file no longer shows which ones they were.
- A mixture of DoRA and adapters without magnitudes is refused.

An adapter that was initialised with PiSSA is written as the difference from its start, of rank 2r, for the original
base (`minilora.variants.pissa`). DoRA's backward (``dora_norm="full"``) is recorded in the tensors' metadata: PEFT
ignores the entry and trains with a constant norm; the outputs are the same. The metadata also contains the system
message that a language model's adapter was trained with.

A file is either understood completely or refused with a `FileRefused` that names the file and the reason: an adapter
that is only half understood would silently compute wrong results.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..adaptation import adapters, check_adapters
from ..backend import Backend, backend_of, backend_or_numpy
from ..checks import (
    MAX_ALPHA,
    MIN_ALPHA,
    check_choice,
    check_flag,
    check_float_dtype,
    check_instance,
    check_number,
    check_path,
    dtype_name,
    kind_of,
)
from ..lora import LoRA, LoRALinear
from ..texts import FileRefused, short
from ..variants.adapter import AdaptedRows, Adapter
from ..variants.dora import DoRA, DoRAAdapter
from ..variants.pissa import over_original
from ..variants.stackedlora import StackedLoRA, StackedLoRALinear
from .disk import (
    TENSORS_PATTERN,
    check_replaceable,
    check_writable,
    check_written_here,
    synced,
    written_folder,
    written_into,
)
from .dtypes import FLOATS, cast
from .expert_adapters import WRITTEN_AS, layer_paths
from .peft import (
    BASE_WEIGHT,
    CONFIG_NAME,
    DIGEST_KEY,
    KERNEL_AXES,
    NORM_KEY,
    PREFIX,
    SYSTEM_KEY,
    WEIGHTS_NAME,
    AdapterFolder,
    Config,
    Form,
    config_digest,
    config_text,
    is_module_path,
)
from .tensors import MODEL_CONFIG, in_dtype, write_tensors

__all__ = ["load_adapter", "save_adapter"]

SAVED_DTYPES = ("float16", "float32", "float64")
FILE_DTYPES = {dtype.name: dtype for dtype in FLOATS.values()}
"""The dtypes that a tensor in a file can have, by name. NumPy has no bfloat16, so arrays cannot have it."""
SAVED_CLASSES = (LoRA, Adapter, DoRAAdapter, StackedLoRA, LoRALinear, DoRA, AdaptedRows, StackedLoRALinear)
"""The adapters and adapted layers that PEFT's layout can represent. A subclass may compute something else."""


def load_adapter(path: str | Path, *, dtype: Any = None, backend: Backend | None = None) -> dict[str, Adapter]:
    """Read an adapter in PEFT's layout.

    Parameters
    ----------
    path : path
        The folder.
    dtype : float dtype, optional
        The adapters' dtype; by default the file's, or float32 for bfloat16, which NumPy does not have.
    backend : Backend, optional
        The backend of the arrays; NumPy by default.

    Returns
    -------
    dict of str to Adapter
        The adapters by module path, such as ``"enc.q_proj"``. ``attach(model, adapters)`` adds them to a model,
        ``attach(layer, {"": adapter})`` adds one to a single layer. Each records its kind of layer, its kernel and its
        magnitude. The adapter of a mixture's array is a `StackedLoRA`, under the array's path.

    Raises
    ------
    FileRefused
        If a file is missing, damaged or inconsistent, or if it needs an unsupported feature.

    Warns
    -----
    UserWarning
        If the file also contains a base weight, which PEFT saves with an adapted ``embed_tokens`` or ``lm_head``. That
        weight is not loaded.
    """
    if dtype is not None:
        check_float_dtype("dtype", dtype)
    folder = AdapterFolder.open(check_path("path", path))
    folder.warn_of_base()
    return read_adapters(folder, dtype=dtype, backend=backend)


def read_adapters(folder: AdapterFolder, *, dtype: Any = None, backend: Backend | None = None) -> dict[str, Adapter]:
    """Read the adapters in an open folder, like `load_adapter`."""
    backend = backend_or_numpy(backend)
    by_path: dict[str, Any] = {}
    for path, module in folder.modules.items():
        arrays = folder.read(path)
        if dtype is not None:
            subject = f"the factors of {short(path)} reach"
            arrays = [in_dtype(array, dtype, folder.file.path, subject) for array in arrays]
        A, B, *magnitude = (backend.asarray(array) for array in arrays)
        form, root = module.form, module.use_rslora
        like: dict[str, Any] = {"kind": form.kind, "kernel": form.kernel, "use_rslora": root}
        if form.experts:
            by_path[path] = StackedLoRA(A, B, module.alpha, experts=form.experts, use_rslora=root)
        elif form.dora:
            norm = "full" if module.full_norm else "constant"
            by_path[path] = DoRAAdapter(A, B, module.alpha, **like, magnitude=magnitude[0], dora_norm=norm)
        else:
            by_path[path] = Adapter(A, B, module.alpha, **like)
    return by_path


def system_message(path: str | Path) -> str | None:
    """Return the system message that `save_adapter` stored with an adapter; None if there is none."""
    return kept_system_message(AdapterFolder.open(check_path("path", path)))


def kept_system_message(folder: AdapterFolder) -> str | None:
    """Return the system message in an open folder, like `system_message`."""
    return folder.file.metadata.get(SYSTEM_KEY)


def check_base_weights(folder: AdapterFolder, weight: Callable[[str], Any]) -> None:
    """Require that base weights in an adapter's folder equal those of the model, which `weight` looks up by path."""
    for module in sorted(folder.with_base):
        key, base = f"{PREFIX}{module}.{BASE_WEIGHT}", weight(module)
        if base is None:
            continue
        theirs, dtype = folder.file.read(key), FLOATS[folder.file.tensors[key].dtype]
        if base.shape != theirs.shape or not np.array_equal(cast(base, dtype), cast(theirs, dtype)):
            raise FileRefused(
                folder.file.path, f"{short(key)} is not the model's {short(module)}: the adapter is for another base"
            )


def save_adapter(
    path: str | Path,
    layers: Mapping[str, LoRA | LoRALinear | DoRA | AdaptedRows],
    *,
    fan_in_fan_out: bool = False,
    base_model: str | None = None,
    task_type: str | None = None,
    target_modules: Sequence[str] | None = None,
    target_parameters: Sequence[str] = (),
    lora_dropout: float = 0.0,
    system: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    before: Callable[[bytes, bytes], object] | None = None,
) -> None:
    """Write adapters in PEFT's layout.

    Parameters
    ----------
    path : path
        The folder; it is created if it does not exist.
    layers : mapping of str to LoRA, or to an adapted layer
        The adapters by the path of the module that each belongs to, as `minilora.adapters` returns them. A plain `LoRA`
        is saved as the adapter of a linear layer.
    fan_in_fan_out : bool
        Whether the base stores its weights (in, out). The adapters' factors are the same either way.
    base_model : str, optional
        The base's name or path, for programs that read it.
    task_type : str, optional
        The model's task, such as "CAUSAL_LM": PEFT's ``AutoPeftModelForCausalLM`` loads no adapter without it.
    target_modules : sequence of str, optional
        Suffixes of paths, such as "q_proj", that match exactly these modules of the base
        (`minilora.adaptation.ends_of`). By default the file has the full paths.
    target_parameters : sequence of str
        Full paths of weights of linear layers, such as "model.layers.0.mlp.gate_proj.weight", by which PEFT must find
        these layers: in a Qwen3-MoE it would take the layers' own names for names of experts
        (`minilora.language.found_by_weight`). PEFT supports neither dropout nor DoRA for them.
    lora_dropout : float
        The probability of dropout on the adapters' inputs during training, for programs that continue it.
    system : str, optional
        The system message of the chats that the adapter was trained on; `system_message` returns it.
    dtype : {"float16", "bfloat16", "float32", "float64"}, optional
        The dtype of the tensors in the file, rounded to nearest with ties to even; by default each array's own.
    overwrite : bool
        Whether to replace an adapter in the folder.
    before : callable, optional
        ``before(config, weights)`` is called with the bytes of both files before anything is written. An exception
        that it raises stops the save.

    Raises
    ------
    ValueError, TypeError
        If an adapter cannot be represented, only some adapters have a magnitude, a number is too large for `dtype`, the
        folder already has an adapter, or the two file names belong to something other than regular files. Nothing has
        been written then.
    OSError
        If the files cannot be written. An adapter that was there stays as it was, unless the error comes while the new
        files are renamed into place: its configuration has been removed by then, so the old adapter is lost, and
        readers refuse the folder until the next save.

    Warns
    -----
    UserWarning
        If an adapter's product B A is zero, as that of a new adapter: it was not trained.
    """
    path, fan_in_fan_out = check_path("path", path), check_flag("fan_in_fan_out", fan_in_fan_out)
    dropout = check_number("lora_dropout", lora_dropout, above=0, below=1, or_equal=True)
    if dtype is not None:
        check_choice("dtype", dtype, FILE_DTYPES)
    if base_model is not None:
        check_instance("base_model", base_model, str)
    check_adapters("layers", layers)
    if not layers:
        raise ValueError("layers must have at least one adapter, got an empty dict")
    saved = {module: _adapter_to_save(module, layer) for module, layer in layers.items()}
    forms = _forms(saved)
    tensors = _tensors(path, saved, forms, dtype)
    arrays = [module for module, adapter in saved.items() if isinstance(adapter, StackedLoRA)]
    if arrays and dropout:
        raise ValueError(
            f"lora_dropout is {dropout}, but {short(arrays[0])} is a mixture's array: expected 0, as in PEFT"
        )
    by_weight = _by_weight(target_parameters, forms, dropout)
    modules = [module for module in saved if module not in (*arrays, *by_weight)]
    parameters = [*arrays, *(f"{module}.weight" for module in by_weight)]
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "target_modules": modules if target_modules is None else [*target_modules],
        **({"target_parameters": parameters, "peft_version": WRITTEN_AS} if parameters else {}),
        **_scaling_keys({f"{module}.weight" if module in by_weight else module: a for module, a in saved.items()}),
        "use_dora": any(isinstance(adapter, DoRAAdapter) for adapter in saved.values()),
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "lora_dropout": dropout,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    read_as = Config(peft_type="LORA", target_modules=config["target_modules"], use_dora=config["use_dora"])
    if len({form.dora for form in forms.values()}) > 1:
        raise ValueError(
            "only some of the layers have DoRA's magnitude, and PEFT has one use_dora for all: save them in two folders"
        )
    read_as.check_targets({module: forms[module] for module in modules})
    text = config_text(config)
    full = [module for module, a in saved.items() if isinstance(a, DoRAAdapter) and a.dora_norm == "full"]
    notes = {"format": "pt", DIGEST_KEY: config_digest(text), **({NORM_KEY: "\n".join(full)} if full else {})}
    notes |= {SYSTEM_KEY: system} if system else {}
    check_adapter_target(path)
    check_no_adapter(path, check_flag("overwrite", overwrite), "path", "overwrite=True")
    if before is not None:
        weights = BytesIO()
        write_tensors(weights, tensors, notes)
        before(text, weights.getvalue())
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, tensors, notes, text)
    keys = {module: form.keys(module) for module, form in forms.items() if not form.dora}
    if unmoved := [module for module, (A, B) in keys.items() if not (tensors[A].any() and tensors[B].any())]:
        warnings.warn(
            f"{len(unmoved)} of the {len(saved)} saved adapters, such as {short(unmoved[0])}, change no weight: "
            "B A is zero, as before training",
            stacklevel=2,
        )


def _write(path: Path, tensors: Mapping[str, np.ndarray], notes: Mapping[str, str], text: bytes) -> None:
    """Write both files. A kill leaves the old adapter, the new one, or a folder without a configuration."""
    with written_into(path, CONFIG_NAME) if path.exists() else written_folder(path) as part:
        with synced(part / CONFIG_NAME) as file:
            file.write(text)
        with synced(part / WEIGHTS_NAME) as file:
            write_tensors(file, tensors, notes)


def check_adapter_target(path: Path) -> None:
    """Require a new or existing folder that an adapter can be written to."""
    check_writable(path)
    if os.path.lexists(path / MODEL_CONFIG):  # a program that loads the model would apply the adapter, too
        raise ValueError(f"save {str(path)!r} is a model's folder, expected a separate one for the adapter")
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        check_replaceable(path / name)


def check_no_adapter(path: Path, overwrite: bool, name: str = "save", option: str = "--overwrite") -> None:
    """Require that a folder has no adapter, unless it may be replaced."""
    if not overwrite and any(os.path.lexists(path / file) for file in (CONFIG_NAME, WEIGHTS_NAME)):
        raise ValueError(f"{name} {str(path)!r} already has an adapter: choose another folder, or pass {option}")


def check_own_adapter(path: Path) -> None:
    """Require that minilora wrote the adapter in a folder, if there is one."""
    if any(os.path.lexists(path / file) for file in (CONFIG_NAME, WEIGHTS_NAME)):
        check_written_here("save", path / WEIGHTS_NAME, TENSORS_PATTERN)


# --- the contents of a save ---


def _by_weight(target_parameters: Sequence[str], forms: Mapping[str, Form], dropout: float) -> list[str]:
    """Return the linear layers that PEFT must find by the path of their weight."""
    modules = [name.removesuffix(".weight") for name in target_parameters]
    for name, module in zip(target_parameters, modules, strict=True):
        if module == name or module not in forms or forms[module].kind != "linear" or forms[module].dora or dropout:
            raise ValueError(
                f"target_parameters names {short(name)}, expected the weight of a linear layer in layers, without "
                "DoRA or lora_dropout"
            )
    return modules


def _adapter_to_save(module: Any, layer: Any) -> Adapter | StackedLoRA:
    """Return a layer's adapter, or the given one, with its kind of layer and relative to the original base."""
    if not isinstance(module, str) or not is_module_path(module):
        raise ValueError(f"layers has the key {short(module)}, expected a module's path such as 'enc.q_proj'")
    own = layer if isinstance(layer, LoRA) else getattr(layer, "adapter", None)
    for part in (layer, own):
        if type(part) not in SAVED_CLASSES:
            raise TypeError(
                f"layers[{short(module)}] must be a LoRA or a LoRALinear, got {kind_of(part)}, which PEFT's layout "
                "of LoRA cannot represent"
            )
    adapter: Any = layer if layer is own else adapters(layer)[""]
    if isinstance(adapter, StackedLoRA):
        return adapter
    if not isinstance(adapter, Adapter):  # a plain LoRA is saved as the adapter of a linear layer
        adapter = Adapter(adapter.lora_A, adapter.lora_B, adapter.alpha)
    return over_original(adapter)


def _forms(saved: Mapping[str, Adapter | StackedLoRA]) -> dict[str, Form]:
    """Return the form of each module's adapter in the file."""
    arrays = layer_paths(module for module, adapter in saved.items() if isinstance(adapter, StackedLoRA))
    return {
        module: Form(adapter.kind, place=arrays[module], experts=adapter.experts)
        if isinstance(adapter, StackedLoRA)
        else Form(adapter.kind, tuple(adapter.kernel), isinstance(adapter, DoRAAdapter))
        for module, adapter in saved.items()
    }


def _tensors(
    path: Path, saved: Mapping[str, Adapter | StackedLoRA], forms: Mapping[str, Form], dtype: str | None
) -> dict[str, np.ndarray]:
    """Return the arrays with PEFT's names and shapes, in file order."""
    tensors: dict[str, np.ndarray] = {}
    for module, adapter in saved.items():
        form, (rank, width), (out, _) = forms[module], adapter.lora_A.shape, adapter.lora_B.shape
        if len(form.kernel) != KERNEL_AXES.get(form.kind, 0) or width % math.prod(form.kernel):
            raise ValueError(
                f"layers[{short(module)}] has in = {width} and the kernel {form.kernel}, which do not fit its kind of "
                f"layer, {form.kind!r}"
            )
        arrays = [adapter.lora_A, adapter.lora_B, *([adapter.magnitude] if isinstance(adapter, DoRAAdapter) else [])]
        for key, array, shape in zip(form.keys(module), arrays, form.shapes(rank, out, width), strict=False):
            if key in tensors:
                raise ValueError(f"layers[{short(module)}] and another layer have the same key, {short(key)}")
            host, subject = _host_array(module, array).reshape(shape), f"layers[{short(module)}] reaches"
            tensors[key] = in_dtype(host, FILE_DTYPES[dtype or host.dtype.name], path, subject)
    # The widest dtypes come first, so that each tensor starts at a multiple of its item size.
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))


def _host_array(module: str, array: Any) -> np.ndarray:
    """Return a copy of the array on the host; require a supported dtype and finite numbers."""
    if dtype_name(array) not in SAVED_DTYPES:
        raise TypeError(f"layers[{short(module)}] has dtype {array.dtype}, expected one of {SAVED_DTYPES}")
    host = np.ascontiguousarray(backend_of(array).to_numpy(array))
    if not np.isfinite(host).all():
        raise ValueError(f"layers[{short(module)}] holds NaN or infinity")
    return host


def _scaling_keys(saved: Mapping[str, Adapter | StackedLoRA]) -> dict[str, Any]:
    """Return the configuration's keys for ranks and alphas: the first adapter's, and patterns for those that differ."""
    use_rslora = all(adapter.use_rslora for adapter in saved.values())
    ranks = {module: adapter.rank for module, adapter in saved.items()}
    alphas = {module: _lora_alpha(module, adapter, use_rslora) for module, adapter in saved.items()}
    r, lora_alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": _pattern(ranks, r),
        "alpha_pattern": _pattern(alphas, lora_alpha),
        "use_rslora": use_rslora,
    }


def _lora_alpha(module: str, adapter: Adapter | StackedLoRA, use_rslora: bool) -> float:
    """Return the alpha to write; if not all adapters are rank-stabilised, the one that gives the same scaling."""
    alpha = adapter.alpha if adapter.use_rslora == use_rslora else adapter.scaling * adapter.rank
    check_number(f"alpha of layers[{short(module)}]", alpha, above=MIN_ALPHA, below=MAX_ALPHA)
    return int(alpha) if alpha.is_integer() else alpha  # PEFT writes integral alphas as integers


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return the values that differ from the default. A key is anchored by ^, since "fc" would also match "enc.fc"."""
    return {"^" + re.escape(module): value for module, value in values.items() if value != default}
