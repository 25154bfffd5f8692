"""An adapter beside each layer that you name: adapt, attach, merge.

    adapted = adapt(model, ["q_proj", "v_proj"], rank=8, alpha=16, rng=rng)     everything frozen but new adapters
    train(adapted, X, Y, rng=rng)
    save_adapter("folder", adapters(adapted))                                   the adapters by module path
    same = attach(model, load_adapter("folder"))                                adapters that exist already
    plain = merge(adapted)                                                      the adapters folded into the weights

None of them changes the model it is given. `Linear`, `Embedding`, `Conv1d` and `Conv2d` take adapters, and so do the
arrays with the weights of a mixture's experts, which `target_parameters` names. An adapted layer is one that has an
``adapter`` and can ``merge()``: this module's own, or yours, placed by `put_beside`.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from .backend import backend_of
from .checks import check_choice, check_flag, check_instance, check_sizes, kind_of, restoring_rng, warn_of_rank
from .layer import Layer, check_model, first_array, members_besides, rebuild, walk
from .layers.embedding import Embedding
from .layers.quantized import FrozenQuantizedLinear
from .layers.stacked import StackedLinear
from .linear import Linear
from .lora import LoRA
from .texts import named
from .variants.adapter import Adapter, kind_of_layer, over, place_of
from .variants.dora import NORMS, with_magnitude
from .variants.pissa import over_original, pissa
from .variants.stackedlora import StackedLoRA, StackedLoRALinear

ALL_LINEAR = "all-linear"
STARTS = ("lora", "pissa")


def adapt(
    model: Layer, target_modules: str | Sequence[str], *, rank: int, alpha: float, rng: np.random.Generator,
    use_rslora: bool = False, use_dora: bool = False, dora_norm: str = "constant", init: str = "lora",
    target_parameters: Sequence[str] | None = None,
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
        Whether the scaling is alpha / sqrt(r), see `minilora.variants.scaling`.
    use_dora : bool
        Whether the length of each row of the weight trains apart from its direction, see `minilora.variants.dora`.
    dora_norm : {"constant", "full"}
        How DoRA's backward treats the norm: as a constant, as PEFT does, or with its full gradient.
    init : {"lora", "pissa"}
        How adapters start: at zero, or from the leading singular vectors, see `minilora.variants.pissa`. With
        ``"pissa"`` the bases are new layers, what is left of the given ones.
    target_parameters : list of str, optional
        As PEFT reads it: names of arrays that hold the weights of a mixture's experts, or their ends, such as
        ``"mlp.experts.gate_up_proj"``; the router's ``"mlp.gate.weight"`` is one too. Each expert has factors of its
        own, of this rank: see `minilora.variants.stackedlora`. Beside them, `target_modules` may be ``[]``.

    Returns
    -------
    Layer
        A model of the same class; of a single layer, the adapted one, such as a `LoRALinear`. Its output is the same
        until the first training step, after PiSSA up to rounding.

    Raises
    ------
    ValueError, TypeError
        If `target_modules`, or a name in it, names no layer without an adapter, a name in `target_parameters` no such
        array, or they come with `use_dora` or PiSSA, as in PEFT. If an argument is out of range, or of another type.

    Warns
    -----
    UserWarning
        If the rank is above the smaller width of a layer, where it gains nothing.
    """
    (rank,) = check_sizes(rank=rank)
    check_choice("dora_norm", dora_norm, NORMS)
    check_choice("init", init, STARTS)
    use_dora = check_flag("use_dora", use_dora)
    stacks = named_parameters(model, target_parameters) if target_parameters else {}
    if stacks and (use_dora or init != "lora"):
        raise ValueError(f"target_parameters takes no {'use_dora' if use_dora else f'init={init!r}'}, as in PEFT")
    check_target_modules(target_modules)
    no_modules = not isinstance(target_modules, str) and not len(target_modules)
    targets = stacks if stacks and no_modules else stacks | named_layers(model, target_modules)
    numbers: dict[str, Any] = {"rank": rank, "alpha": alpha, "rng": rng, "use_rslora": use_rslora}

    def adapted(path: str, layer: Any) -> Layer:
        if path in stacks:
            return over(layer, _start_stacked(layer, **numbers))
        base, adapter = _start(layer, **numbers, init=init)
        return over(base, with_magnitude(_matrix(base), adapter, dora_norm) if use_dora else adapter)

    with restoring_rng(rng):
        result = _replaced(model, targets, adapted)
    warn_of_rank(rank, {path: min(_matrix(layer).shape) for path, layer in targets.items()})
    return result


def put_beside(model: Layer, target_modules: str | Sequence[str], beside: Callable[[str, Any], Layer]) -> Any:
    """Return the model frozen, with a layer of your making in the place of each that `target_modules` names.

    ``beside(path, layer)`` is called with a frozen copy of each named layer, in the model's order. What it returns has
    the adapter as its attribute ``adapter``, and a method ``merge()`` that returns one layer without it; anything else
    is a TypeError.
    """

    def adapted(path: str, layer: Any) -> Layer:
        result = beside(path, layer)
        if not (isinstance(result, Layer) and is_adapted(result) and hasattr(result, "adapter")):
            got = type(result).__name__
            raise TypeError(f"beside({path!r}, ...) returned a {got}, expected a Layer with an adapter and merge()")
        return result

    return _replaced(model, named_layers(model, target_modules), adapted)


def attach(model: Layer, adapters: Mapping[str, LoRA]) -> Any:
    """Return the model frozen, with the given adapters beside the layers at their paths.

    Parameters
    ----------
    model : Layer
        A model, or a single layer with the path ``""``. It stays as it is.
    adapters : mapping of str to LoRA
        By module path, as `load_adapter` and `minilora.adapters` return them. They are shared, not copied. But one that
        started by PiSSA becomes one of rank 2r, with new arrays, beside the original base, which the model must have.

    Returns
    -------
    Layer
        A model of the same class; of a single layer, the adapted one.

    Raises
    ------
    ValueError, TypeError
        If a path is not that of a layer without an adapter, or an adapter's widths, dtype or kind do not fit.
    """
    check_model(model)
    check_adapters("adapters", adapters)
    free = _free(model)
    adapters = dict(_of_layer(path, adapter, free) for path, adapter in adapters.items())
    if unknown := [path for path in adapters if path not in free]:
        raise ValueError(
            f"adapters names {_listed(unknown)}, which are no layers without an adapter; there are {_listed(free)}"
        )

    def adapted(path: str, layer: Any) -> Layer:
        check_instance(f"adapters[{path!r}]", adapters[path], LoRA)
        with named(f"adapters[{path!r}]"):
            return _attached(layer, adapters[path])

    return _replaced(model, adapters, adapted)


def _of_layer(path: str, adapter: LoRA, free: Mapping[str, Layer]) -> tuple[str, LoRA]:
    """Return an adapter and its layer's path, also where a file names the layer's weight in place of the layer."""
    layer = path.removesuffix(".weight")
    if path in free or layer not in free or not isinstance(adapter, StackedLoRA) or adapter.experts > 1:
        return path, adapter
    return layer, Adapter(adapter.lora_A, adapter.lora_B, adapter.alpha, use_rslora=adapter.use_rslora)


def merge(model: Layer, *, requantize: bool = False) -> Any:
    """Return the model with its adapters folded into the weights: as fast as before adapting.

    Each adapted layer's own ``merge()`` says what it becomes. The output is the same up to rounding. Every array is
    new, and every layer trains again.

    Parameters
    ----------
    model : Layer
        It stays as it is.
    requantize : bool
        Of an adapted layer whose base is quantised: whether the sum is quantised again, in the base's format. It loses
        most of a small change, as a `UserWarning` says. By default it becomes a `Linear` in the base's dtype.

    Raises
    ------
    ValueError, TypeError
        With `requantize`, if no adapter stands beside a quantised layer, or one in a format that only files are read
        from.
    """
    check_model(model)
    requantize, sums = check_flag("requantize", requantize), [0.0, 0.0]
    if requantize and not any(
        isinstance(getattr(layer, "base", None), FrozenQuantizedLinear) for _, layer in walk(model)
    ):
        raise ValueError("requantize=True, and no adapter stands beside a quantised layer")

    def fold(path: str, layer: Any) -> Any:
        vars(layer).pop("frozen", None)
        if not is_adapted(layer):
            return layer
        merged, base = layer.merge(), getattr(layer, "base", None)
        if not (requantize and isinstance(base, FrozenQuantizedLinear)):
            return merged
        again, W = base.encode(merged), base.weight
        for i, change in enumerate((merged.weight - W, merged.weight - again.weight)):
            sums[i] += float((change**2).sum())
        return again

    folded = rebuild(model, array=lambda a: a.copy(), layer=fold)
    if sums[1]:
        share = math.sqrt(sums[1] / sums[0]) if sums[0] else math.inf
        warnings.warn(
            f"quantising the merged weights again loses {share:.0%} of the change (|merged - wanted| / |change|): keep "
            "the adapter beside its base instead",
            stacklevel=2,
        )
    return folded


def adapters(model: Layer) -> dict[str, Any]:
    """Return the adapters of a model by the path of the module that each stands beside: what `save_adapter` takes.

    Each is an `Adapter` with the model's own arrays: it has ``delta()``, the change of the module's matrix (out, in)
    before DoRA's norm, and knows its `kind` of layer, its `kernel` and, after PiSSA, how it started. Of a layer of your
    own it is that layer's ``adapter``, whatever its class. Arrays beside it that a LoRA would lose are a TypeError.
    """
    check_model(model)
    return {path: _described(path, layer) for path, layer in walk(model) if is_adapted(layer)}


def ends_of(model: Layer) -> list[str]:
    """Return the shortest names of the layers that have adapters, for PEFT's ``target_modules``: ends, or paths."""
    stacks = {path for path, layer in walk(model) if isinstance(layer, (StackedLinear, StackedLoRALinear))}
    adapted = {path: is_adapted(layer) for path, layer in walk(model)}

    def name(path: str) -> str:
        end = path.rpartition(".")[2]
        every = all(there for other, there in adapted.items() if f".{other}".endswith(f".{end}"))
        # Elsewhere a mixture's experts are modules of their own, and an end would name their layers too.
        return end if every and not stacks else path

    return [*dict.fromkeys(name(path) for path, there in adapted.items() if there and path not in stacks)]


def is_adapted(layer: Any) -> bool:
    """Return whether a layer has an adapter beside it: whether it can merge."""
    return callable(getattr(layer, "merge", None))


def _replaced(model: Layer, targets: Collection[str], adapted: Callable[[str, Any], Layer]) -> Any:
    """Return the model frozen, with another layer in the place of each at these paths."""

    def replaced(path: str, layer: Layer) -> Layer:
        layer.frozen = True  # it is a copy
        return adapted(path, layer) if path in targets else layer

    return rebuild(model, layer=replaced)


def _start(
    layer: Any, *, rank: int, alpha: float, rng: np.random.Generator, use_rslora: bool, init: str
) -> tuple[Any, Adapter]:
    """Return a base and a new adapter for it: as PEFT starts, or from the base's singular vectors."""
    matrix = _matrix(layer)
    like: Any = first_array(matrix)
    where: dict[str, Any] = {"dtype": like.dtype, "backend": backend_of(like)}
    new = LoRA.init(matrix.in_features, matrix.out_features, rank=rank, alpha=alpha, rng=rng, **where)
    A, B, start = new.lora_A, new.lora_B, None
    if init == "pissa":
        rest, start = pissa(matrix, rank=new.rank, alpha=new.alpha, use_rslora=use_rslora)
        layer = rest if isinstance(layer, Linear) else layer.from_linear(rest)
        layer.frozen = start.frozen = True
        A, B = start.lora_A.copy(), start.lora_B.copy()
    elif isinstance(layer, Embedding):  # A = 0 and B normal, the other way round
        A, B = where["backend"].zeros(A.shape, A.dtype), where["backend"].asarray(rng.standard_normal(B.shape), B.dtype)
    return layer, Adapter(A, B, new.alpha, **place_of(layer), use_rslora=use_rslora, start=start)


def _start_stacked(
    layer: StackedLinear, *, rank: int, alpha: float, rng: np.random.Generator, use_rslora: bool
) -> StackedLoRA:
    """Return a new adapter of each of a stack of weights, as PEFT starts: A uniform, B zero."""
    (n_out, n_in), E = layer.shape, layer.experts
    like = layer.weight
    new = LoRA.init(n_in, n_out, rank=rank * E, alpha=alpha, rng=rng, dtype=like.dtype, backend=backend_of(like))
    return StackedLoRA(new.lora_A, new.lora_B, new.alpha, experts=E, use_rslora=use_rslora)


def _attached(layer: Any, adapter: LoRA) -> Layer:
    """Return a layer with an adapter that exists already and knows, unless it is a plain `LoRA`, where it belongs."""
    for name, expected in place_of(layer).items():
        if (got := getattr(adapter, name, expected)) != expected:
            raise ValueError(f"adapter is of {name} {got!r}, expected {expected!r} beside {layer!r}")
    return over(layer, over_original(adapter) if isinstance(adapter, Adapter) else adapter)


def _matrix(layer: Any) -> Any:
    """Return the linear layer that a layer is, on rewritten inputs."""
    return layer.as_linear() if hasattr(layer, "as_linear") else layer


def _described(path: str, layer: Any) -> Any:
    """Return a layer's adapter; of a plain `LoRA` one that shares its arrays and knows where it stands."""
    adapter, more = layer.adapter, members_besides(layer, "base", "adapter")
    if not isinstance(adapter, LoRA):
        return adapter
    if more:
        raise TypeError(
            f"the layer {path!r}, a {type(layer).__name__}, has a {next(iter(more))} besides base and adapter: its "
            "adapter alone is not its change of weight"
        )
    if type(adapter) is not LoRA:  # it knows where it stands, or is of a class of yours
        return adapter
    described = Adapter(adapter.lora_A, adapter.lora_B, adapter.alpha, **place_of(getattr(layer, "base", None)))
    described.frozen = adapter.frozen
    return described


def named_layers(model: Layer, target_modules: str | Sequence[str]) -> dict[str, Layer]:
    """Return the layers without an adapter that `target_modules` names, by path: at least one for each name."""
    check_target_modules(target_modules)
    every = _free(model)
    free = {path: layer for path, layer in every.items() if kind_of_layer(layer)}
    targets = {path: layer for path, layer in free.items() if _named(path, layer, target_modules)}
    names = [] if isinstance(target_modules, str) else target_modules
    unused = [name for name in names if not any(_named(path, layer, [name]) for path, layer in targets.items())]
    if unused or not targets:
        what = f"{unused[0]!r} in target_modules" if targets else f"target_modules={target_modules!r}"
        expression = isinstance(target_modules, str) and target_modules != ALL_LINEAR
        if not every and any(is_adapted(layer) for _, layer in walk(model)):
            raise ValueError("every layer of the model has an adapter already: merge(model) folds them in")
        if [*every] == [""]:
            raise ValueError(
                f"{what} names no layer, and the model is one layer, without a name: "
                "LoRALinear.from_linear(layer, rank=..., alpha=..., rng=...) puts an adapter beside it"
            )
        how = "; a string must match a whole path" if expression else ""
        if arrays := every.keys() - free.keys():
            how += f". Arrays of a mixture, such as {min(arrays)!r}, are named in target_parameters"
        raise ValueError(f"{what} names no layer without an adapter; there are {_listed(free)}{how}")
    return targets


def named_parameters(model: Layer, target_parameters: Collection[str]) -> dict[str, Layer]:
    """Return the stacks of weights without an adapter that `target_parameters` names, by the name of their array."""
    if isinstance(target_parameters, str) or not isinstance(target_parameters, Collection):
        raise TypeError(f"target_parameters must be a list of names, and no expression, got {target_parameters!r}")
    free = {path: layer for path, layer in _free(model).items() if isinstance(layer, StackedLinear)}
    for target in target_parameters:
        if not any(_named(path, layer, [target]) for path, layer in free.items()):
            raise ValueError(
                f"target_parameters names {target!r}, which is no array of a mixture without an adapter; there are "
                f"{_listed(free)}. The layers of a shared expert, and all others, are named in target_modules"
            )
    return {path: layer for path, layer in free.items() if _named(path, layer, [*target_parameters])}


def _free(model: Layer) -> dict[str, Layer]:
    """Return the layers that can take an adapter and have none yet, by path."""
    check_model(model)
    free: dict[str, Layer] = {}
    taken: list[str] = []  # the paths of adapted layers, each with all that is in it
    for path, layer in walk(model):
        if any(path == other or path.startswith(f"{other}.".removeprefix(".")) for other in taken):
            continue
        if is_adapted(layer):
            taken.append(path)
        elif kind_of_layer(layer) or isinstance(layer, StackedLinear):
            free[path] = layer
    return free


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


def check_adapters(name: str, value: Any) -> None:
    """Require a dict of adapters by module path."""
    if not isinstance(value, Mapping):
        such = "such as {'q_proj': adapter}, or what minilora.adapters(model) returns"
        raise TypeError(f"{name} must be a dict of adapters by module path, {such}; got {kind_of(value)}")


def check_target_modules(target_modules: Any) -> None:
    """Require a list of module paths or their ends, or one regular expression."""
    if isinstance(target_modules, str):
        try:
            re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"target_modules={target_modules!r} is not a regular expression: {error}") from None
    elif not isinstance(target_modules, Collection) or not all(isinstance(name, str) for name in target_modules):
        raise TypeError(f"target_modules must be a list of names or a regular expression, got {target_modules!r}")
