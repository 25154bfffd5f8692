"""An adapter beside each layer that you name: adapt, attach, merge.

    adapted = adapt(model, ["q_proj", "v_proj"], rank=8, alpha=16, rng=rng)     everything frozen but new adapters
    train(adapted, X, Y, rng=rng)
    save_adapter("folder", adapters(adapted))                                   the adapters by module path
    same = attach(model, load_adapter("folder"))                                adapters that exist already
    plain = merge(adapted)                                                      the adapters folded into the weights

None of them changes the model it is given. `Linear`, `Embedding`, `Conv1d` and `Conv2d` take adapters.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from .backend import backend_of
from .checks import check_choice, check_flag, check_instance, check_rng, check_target_modules
from .layer import Layer, freeze, rebuild, walk
from .layers.convolution import Conv1d, Conv2d
from .layers.embedding import Embedding
from .linear import Linear
from .lora import LoRA, LoRALinear
from .variants.adapter import NORMS, Adapter
from .variants.dora import DoRA, with_magnitude
from .variants.pissa import over_original, pissa
from .variants.rewritten import Rewritten, beside
from .variants.scaling import rslora_alpha

ALL_LINEAR = "all-linear"
KINDS: dict[type, str] = {Linear: "linear", Embedding: "embedding", Conv1d: "conv1d", Conv2d: "conv2d"}
ADAPTED = (LoRALinear, DoRA, Rewritten)
STARTS = ("lora", "pissa")


def adapt(
    model: Layer, target_modules: str | Sequence[str], *, rank: int, alpha: float, rng: np.random.Generator,
    use_rslora: bool = False, use_dora: bool = False, dora_norm: str = "constant", init: str = "lora",
) -> Any:  # fmt: skip
    """Return the model frozen, with a new adapter beside each layer that `target_modules` names.

    Parameters
    ----------
    model : Layer
        A model, or a single layer. It stays as it is; the frozen arrays are shared with it, not copied.
    target_modules : list of str, or str
        As PEFT reads it. A list has module paths or their ends: ``"q_proj"`` names ``layers.0.self_attn.q_proj`` too. A
        string is one regular expression that must match the whole path; ``"all-linear"`` names every `Linear` but
        ``lm_head``.
    rank, alpha
        Of each adapter, as in `LoRA.init`.
    rng : numpy.random.Generator
        Draws the adapters' starts, in the order of the model's layers.
    use_rslora : bool
        Whether the scaling is alpha / sqrt(r). The adapters' own `alpha` is then alpha sqrt(r), see
        `minilora.variants.scaling`.
    use_dora : bool
        Whether each output has a magnitude that trains, see `minilora.variants.dora`.
    dora_norm : {"constant", "full"}
        How DoRA's backward treats the norm: as a constant, as PEFT does, or with its full gradient.
    init : {"lora", "pissa"}
        How adapters start: at zero, or from the leading singular vectors, see `minilora.variants.pissa`. With
        ``"pissa"`` the bases are new layers, what is left of the given ones.

    Returns
    -------
    Layer
        A model of the same class. Its output is the same until the first training step, after PiSSA up to rounding.

    Raises
    ------
    ValueError
        If `target_modules` names no layer, or one that has an adapter already, or an argument is out of range.
    TypeError
        If an argument is of another type.
    """
    check_instance("model", model, Layer)
    check_rng(rng)
    check_choice("dora_norm", dora_norm, NORMS)
    check_choice("init", init, STARTS)
    check_target_modules(target_modules)
    use_rslora, use_dora = check_flag("use_rslora", use_rslora), check_flag("use_dora", use_dora)
    free = _free(model)
    targets = [path for path, layer in free.items() if _named(path, layer, target_modules)]
    if not targets:
        how = "; a string must match a whole path" if isinstance(target_modules, str) else ""
        raise ValueError(
            f"target_modules={target_modules!r} names no layer without an adapter; there are {_listed(free)}{how}"
        )

    def start(path: str, layer: Any) -> Layer:
        if path not in targets:
            return layer  # type: ignore[no-any-return]
        base, adapter = _start(layer, rank=rank, alpha=alpha, rng=rng, use_rslora=use_rslora, init=init)
        if use_dora:
            adapter.dora_norm = dora_norm
            with_magnitude(_matrix(base), adapter)
        return _beside(base, adapter)

    return rebuild(freeze(model), layer=start)


def attach(model: Layer, adapters: Mapping[str, LoRA]) -> Any:
    """Return the model frozen, with the given adapters beside the layers at their paths.

    Parameters
    ----------
    model : Layer
        A model, or a single layer with the path ``""``. It stays as it is.
    adapters : mapping of str to LoRA
        By module path, as `load_adapter` and `minilora.adapters` return them. They are shared, not copied; but one that
        started by PiSSA becomes one over the original base, which the model must have, of rank 2r with new arrays.

    Returns
    -------
    Layer
        A model of the same class.

    Raises
    ------
    ValueError
        If a path is not that of a layer without an adapter, or an adapter's widths or kind do not fit.
    TypeError
        If an argument is of another type.
    """
    check_instance("model", model, Layer)
    check_instance("adapters", adapters, Mapping)
    free = _free(model)
    if unknown := [path for path in adapters if path not in free]:
        raise ValueError(
            f"adapters names {_listed(unknown)}, which are no layers without an adapter; there are {_listed(free)}"
        )
    for path, adapter in adapters.items():
        if getattr(adapter, "kind", _kind(free[path])) != _kind(free[path]):
            raise ValueError(f"adapters[{path!r}] is not of kind {_kind(free[path])!r}, as {free[path]!r} is")
        kernel = tuple(getattr(free[path], "kernel", ()))
        if getattr(adapter, "kernel", kernel) != kernel:
            raise ValueError(f"adapters[{path!r}] has a kernel of {adapter.kernel}, expected {kernel}")  # type: ignore[attr-defined]

    def put(path: str, layer: Any) -> Layer:
        if path not in adapters:
            return layer  # type: ignore[no-any-return]
        adapter = adapters[path]
        try:
            return _beside(layer, over_original(adapter) if isinstance(adapter, Adapter) else adapter)
        except (TypeError, ValueError) as error:
            raise type(error)(f"adapters[{path!r}]: {error}") from None

    return rebuild(freeze(model), layer=put)


def merge(model: Layer) -> Any:
    """Return the model with its adapters folded into the weights: as fast as before adapting.

    The output is the same up to rounding. Every array is new, and every layer trains again.
    """
    check_instance("model", model, Layer)

    def fold(path: str, layer: Layer) -> Layer:
        vars(layer).pop("frozen", None)
        return layer.merge() if isinstance(layer, ADAPTED) else layer

    return rebuild(model, array=lambda a: a.copy(), layer=fold)


def adapters(model: Layer) -> dict[str, Adapter]:
    """Return the adapters of a model by the path of the module that each stands beside: what `save_adapter` takes.

    Each has ``delta()``, the change of the module's matrix (out, in) before DoRA's norm, and knows its `kind` of layer,
    its `kernel`, its `magnitude` and, after PiSSA, how it started. The arrays are the model's own.
    """
    check_instance("model", model, Layer)
    return {path: _described(layer) for path, layer in walk(model) if isinstance(layer, ADAPTED)}


def _start(
    layer: Any, *, rank: int, alpha: float, rng: np.random.Generator, use_rslora: bool, init: str
) -> tuple[Any, Adapter]:
    """Return a base and a new adapter for it: as PEFT starts, or from the base's singular vectors."""
    known: dict[str, Any] = {"kind": _kind(layer), "kernel": tuple(getattr(layer, "kernel", ()))}
    known["use_rslora"] = use_rslora
    matrix = _matrix(layer)
    where: dict[str, Any] = {"dtype": matrix.weight.dtype, "backend": backend_of(matrix.weight)}
    new = LoRA.init(matrix.in_features, matrix.out_features, rank=rank, alpha=alpha, rng=rng, **where)
    A, B, alpha = new.lora_A, new.lora_B, rslora_alpha(new.alpha, new.rank) if use_rslora else new.alpha
    if init == "pissa":
        rest, first = pissa(matrix, rank=new.rank, alpha=alpha)
        base = rest if isinstance(layer, Linear) else layer.from_linear(rest)
        first.frozen = base.frozen = True
        return base, Adapter(first.lora_A.copy(), first.lora_B.copy(), alpha, start=first, **known)
    if isinstance(layer, Embedding):  # A = 0 and B normal, the other way round
        A, B = where["backend"].zeros(A.shape, A.dtype), where["backend"].asarray(rng.standard_normal(B.shape), B.dtype)
    return layer, Adapter(A, B, alpha, **known)


def _beside(base: Any, adapter: LoRA) -> Layer:
    """Return a layer with its adapter, in the class that this takes."""
    return beside(base, adapter) if isinstance(base, Linear) else Rewritten(base, adapter)


def _matrix(layer: Any) -> Linear:
    """Return the linear layer that a layer is, on rewritten inputs."""
    return layer if isinstance(layer, Linear) else layer.as_linear()


def _kind(layer: Layer) -> str | None:
    """Return the kind of a layer that can take an adapter, and None for others."""
    return next((kind for cls, kind in KINDS.items() if isinstance(layer, cls)), None)


def _described(layer: Any) -> Adapter:
    """Return a layer's adapter, which knows where it stands."""
    adapter = layer.adapter
    if isinstance(adapter, Adapter):
        return adapter
    kernel = tuple(getattr(layer.base, "kernel", ()))
    return Adapter(adapter.lora_A, adapter.lora_B, adapter.alpha, kind=str(_kind(layer.base)), kernel=kernel)


def _free(model: Layer) -> dict[str, Layer]:
    """Return the layers that can take an adapter and have none yet, by path."""
    taken = [path for path, layer in walk(model) if isinstance(layer, ADAPTED)]
    bases = {f"{path}.base".removeprefix(".") for path in taken}
    return {path: layer for path, layer in walk(model) if _kind(layer) and path not in bases}


def _listed(paths: Collection[str], most: int = 8) -> str:
    """Return the first of some paths, to print, and how many there are besides: a model can have hundreds."""
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return f"{list(paths)[:most]}{more}"


def _named(path: str, layer: Layer, target_modules: str | Sequence[str]) -> bool:
    """Return whether `target_modules` names the module at a path, as PEFT decides it."""
    if target_modules == ALL_LINEAR:
        return isinstance(layer, Linear) and path.rpartition(".")[2] != "lm_head"
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in target_modules)
