"""Adapters of a model's layers: adapt, attach, merge.

    adapted = adapt(model, ["q_proj", "v_proj"], rank=8, alpha=16, rng=rng)     everything frozen except adapters
    train(adapted, X, Y, rng=rng)
    save_adapter("folder", adapters(adapted))                                   the adapters by module path
    same = attach(model, load_adapter("folder"))                                existing adapters
    plain = merge(adapted)                                                      the adapters merged into the weights

None of these changes the given model. `Linear`, `Embedding`, `Conv1d` and `Conv2d` can have adapters, and so can the
arrays with the weights of a mixture's experts, which `target_parameters` selects. An adapted layer has an ``adapter``
and a method ``merge()``; `put_beside` inserts your own class of adapted layers.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from .backend import backend_of
from .checks import RECAST, check_choice, check_flag, check_instance, check_sizes, kind_of, restoring_rng, warn_of_rank
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
INITS = ("lora", "pissa")


def adapt(
    model: Layer, target_modules: str | Sequence[str], *, rank: int, alpha: float, rng: np.random.Generator,
    use_rslora: bool = False, use_dora: bool = False, dora_norm: str = "constant", init: str = "lora",
    target_parameters: Sequence[str] | None = None,
) -> Any:  # fmt: skip
    """Return a frozen model with a new adapter of each layer that `target_modules` selects.

    A model with adapters can be adapted again, for instance to give other layers another rank. As in PEFT, its adapters
    still train: ``adapt(adapt(model, ["q_proj"], rank=8, ...), ["v_proj"], rank=2, ...)`` trains both. To train only
    the new ones, freeze the model first: ``adapt(minilora.layer.freeze(model), ...)``.

    Parameters
    ----------
    model : Layer
        A model, or a single layer. It does not change; the result shares its arrays.
    target_modules : list of str, or str
        As in PEFT. A list has module paths or suffixes: ``"q_proj"`` matches ``layers.0.self_attn.q_proj`` too. A
        string is a regular expression that must match the full path; ``"all-linear"`` selects every `Linear` except
        ``lm_head``.
    rank, alpha
        Rank and alpha of each adapter, as in `LoRA.init`.
    rng : numpy.random.Generator
        Draws the initial adapters, in the order of the model's layers.
    use_rslora : bool
        Whether the scaling is alpha / sqrt(r), see `minilora.variants.scaling`.
    use_dora : bool
        Whether to train the norm of each row of the weight separately, see `minilora.variants.dora`.
    dora_norm : {"constant", "full"}
        Whether DoRA's backward treats the norm as a constant, as in PEFT, or includes its full gradient.
    init : {"lora", "pissa"}
        Whether adapters start at zero, or from the leading singular vectors, see `minilora.variants.pissa`. With
        ``"pissa"`` the bases are new layers, the remainders of the given ones.
    target_parameters : list of str, optional
        As in PEFT: names, or suffixes, of the arrays with the weights of a mixture's experts, such as
        ``"mlp.experts.gate_up_proj"``, or of the router, ``"mlp.gate.weight"``. Each expert has its own factors of this
        rank: see `minilora.variants.stackedlora`. `target_modules` may then be ``[]``.

    Returns
    -------
    Layer
        A model of the same class; for a single layer, an adapted layer such as a `LoRALinear`. Its output is unchanged
        until the first training step, with PiSSA up to rounding.

    Raises
    ------
    ValueError, TypeError
        If `target_modules`, or a name in it, matches no layer without an adapter, or a name in `target_parameters` no
        such array; if `target_parameters` comes with `use_dora` or PiSSA, as in PEFT; if an argument has a wrong type
        or value.

    Warns
    -----
    UserWarning
        If the rank exceeds the smaller width of a layer, which has no benefit.
    """
    (rank,) = check_sizes(rank=rank)
    check_choice("dora_norm", dora_norm, NORMS)
    check_choice("init", init, INITS)
    use_dora = check_flag("use_dora", use_dora)
    stacks = named_parameters(model, target_parameters) if target_parameters else {}
    if stacks and (use_dora or init != "lora"):
        raise ValueError(f"target_parameters excludes {'use_dora' if use_dora else f'init={init!r}'}, as in PEFT")
    check_target_modules(target_modules)
    no_modules = not isinstance(target_modules, str) and not len(target_modules)
    targets = stacks if stacks and no_modules else stacks | named_layers(model, target_modules)
    numbers: dict[str, Any] = {"rank": rank, "alpha": alpha, "rng": rng, "use_rslora": use_rslora}

    def adapted(path: str, layer: Any) -> Layer:
        if path in stacks:
            return over(layer, _start_stacked(layer, **numbers))
        base, adapter = _start(layer, **numbers, init=init)
        return over(base, with_magnitude(_matrix(base), adapter, dora_norm) if use_dora else adapter)

    like: Any = first_array(_matrix(next(iter(targets.values()))))
    if str(like.dtype) not in ("float32", "float64"):
        convert = RECAST.format(name="model", dtype="float32")
        raise TypeError(f"model has dtype {like.dtype}, in which adapters cannot be trained: convert it with {convert}")
    with restoring_rng(rng):
        result = _replaced(model, targets, adapted)
    warn_of_rank(rank, {path: min(_matrix(layer).shape) for path, layer in targets.items()})
    return result


def put_beside(model: Layer, target_modules: str | Sequence[str], beside: Callable[[str, Any], Layer]) -> Any:
    """Return a frozen model in which your own layer replaces each one that `target_modules` selects.

    ``beside(path, layer)`` is called with a frozen copy of each selected layer, in the model's order. It must return a
    layer with an attribute ``adapter`` and a method ``merge()`` that returns a plain layer; anything else is a
    TypeError.
    """

    def adapted(path: str, layer: Any) -> Layer:
        result = beside(path, layer)
        if not (isinstance(result, Layer) and is_adapted(result) and hasattr(result, "adapter")):
            raise TypeError(f"beside({path!r}, ...) must return a Layer with adapter and merge, got {kind_of(result)}")
        return result

    return _replaced(model, named_layers(model, target_modules), adapted)


def attach(model: Layer, adapters: Mapping[str, LoRA]) -> Any:
    """Return a frozen model with the given adapters of the layers at their paths; adapters that it has still train.

    Parameters
    ----------
    model : Layer
        A model, or a single layer with the path ``""``. It does not change.
    adapters : mapping of str to LoRA
        By module path, as `load_adapter` and `minilora.adapters` return them. They are shared, not copied, but an
        adapter initialised with PiSSA becomes one of rank 2r, with new arrays, for the original base, which the model
        must have.

    Returns
    -------
    Layer
        A model of the same class; for a single layer, an adapted layer.

    Raises
    ------
    ValueError, TypeError
        If there is no layer without an adapter at a path, or an adapter's widths, dtype or kind do not fit.
    """
    check_model(model)
    check_adapters("adapters", adapters)
    free = _free(model)
    adapters = dict(_of_layer(path, adapter, free) for path, adapter in adapters.items())
    if unknown := [path for path in adapters if path not in free]:
        raise ValueError(
            f"adapters names {_listed(unknown)}, which are not layers without an adapter; there are {_listed(free)}"
        )

    def adapted(path: str, layer: Any) -> Layer:
        check_instance(f"adapters[{path!r}]", adapters[path], LoRA)
        with named(f"adapters[{path!r}]"):
            return _attached(layer, adapters[path])

    return _replaced(model, adapters, adapted)


def _of_layer(path: str, adapter: LoRA, free: Mapping[str, Layer]) -> tuple[str, LoRA]:
    """Return an adapter and its layer's path, also if a file names the layer's weight instead of the layer."""
    layer = path.removesuffix(".weight")
    if path in free or layer not in free or not isinstance(adapter, StackedLoRA) or adapter.experts > 1:
        return path, adapter
    return layer, Adapter(adapter.lora_A, adapter.lora_B, adapter.alpha, use_rslora=adapter.use_rslora)


def merge(model: Layer, *, requantize: bool = False) -> Any:
    """Return the model with its adapters merged into the weights, as fast as before adapting.

    Each adapted layer is replaced by the result of its ``merge()``. The output is unchanged up to rounding. All arrays
    are new, and all layers train again.

    Parameters
    ----------
    model : Layer
        The adapted model. It does not change.
    requantize : bool
        Whether the merged weight of a quantised base is quantised again, in the base's format. That loses most of a
        small change, which a `UserWarning` reports. By default it becomes a `Linear` in the base's dtype.

    Raises
    ------
    ValueError, TypeError
        With `requantize`, if no adapted layer is quantised, or one has a format that can only be read.
    """
    check_model(model)
    requantize, sums = check_flag("requantize", requantize), [0.0, 0.0]
    if requantize and not any(isinstance(getattr(one, "base", None), FrozenQuantizedLinear) for _, one in walk(model)):
        raise ValueError("requantize=True, and no adapted layer is quantised")

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
    """Return the adapters of a model by module path, as `save_adapter` expects them.

    Each is an `Adapter` that shares the model's arrays. It has ``delta()``, the change of the module's matrix (out, in)
    before DoRA's norm, and knows its `kind` of layer, its `kernel` and, with PiSSA, its start. For your own adapted
    layer it is the layer's ``adapter`` of any class. Further arrays that a LoRA would lose are a TypeError.
    """
    check_model(model)
    return {path: _described(path, layer) for path, layer in walk(model) if is_adapted(layer)}


def ends_of(model: Layer) -> list[str]:
    """Return the shortest suffixes that select exactly the adapted layers, for PEFT's ``target_modules``."""
    stacks = {path for path, layer in walk(model) if isinstance(layer, (StackedLinear, StackedLoRALinear))}
    adapted = {path: is_adapted(layer) for path, layer in walk(model)}

    def name(path: str) -> str:
        end = path.rpartition(".")[2]
        every = all(there for other, there in adapted.items() if f".{other}".endswith(f".{end}"))
        # In other programs a mixture's experts are modules, and a suffix would select their layers too.
        return end if every and not stacks else path

    return [*dict.fromkeys(name(path) for path, there in adapted.items() if there and path not in stacks)]


def is_adapted(layer: Any) -> bool:
    """Return whether a layer has an adapter, and so can merge."""
    return callable(getattr(layer, "merge", None))


def _replaced(model: Layer, targets: Collection[str], adapted: Callable[[str, Any], Layer]) -> Any:
    """Return a frozen model with the layers at these paths replaced; adapted layers stay as they are, and train."""
    plain = _without_adapter(model)

    def replaced(path: str, layer: Layer) -> Layer:
        if path in plain:
            layer.frozen = True  # a copy
        return adapted(path, layer) if path in targets else layer

    return rebuild(model, layer=replaced)


def _start(layer: Any, *, use_rslora: bool, init: str, **numbers: Any) -> tuple[Any, Adapter]:
    """Return a base with a new adapter: PEFT's initialisation, or the base's singular vectors."""
    matrix = _matrix(layer)
    like: Any = first_array(matrix)
    backend = backend_of(like)
    new = LoRA.init(matrix.in_features, matrix.out_features, **numbers, dtype=like.dtype, backend=backend)
    A, B, start = new.lora_A, new.lora_B, None
    if init == "pissa":
        rest, start = pissa(matrix, rank=new.rank, alpha=new.alpha, use_rslora=use_rslora)
        layer = rest if isinstance(layer, Linear) else layer.from_linear(rest)
        layer.frozen = start.frozen = True
        A, B = start.lora_A.copy(), start.lora_B.copy()
    elif isinstance(layer, Embedding):  # A = 0 and B normal, the reverse
        A, B = backend.zeros(A.shape, A.dtype), backend.asarray(numbers["rng"].standard_normal(B.shape), B.dtype)
    return layer, Adapter(A, B, new.alpha, **place_of(layer), use_rslora=use_rslora, start=start)


def _start_stacked(layer: StackedLinear, *, rank: int, use_rslora: bool, **numbers: Any) -> StackedLoRA:
    """Return new adapters of a stack of weights with PEFT's initialisation: A uniform, B zero."""
    (n_out, n_in), E = layer.shape, layer.experts
    new = LoRA.init(n_in, n_out, rank=rank * E, **numbers, dtype=layer.weight.dtype, backend=backend_of(layer.weight))
    return StackedLoRA(new.lora_A, new.lora_B, new.alpha, experts=E, use_rslora=use_rslora)


def _attached(layer: Any, adapter: LoRA) -> Layer:
    """Return a layer with an existing adapter, which must belong there unless it is a plain `LoRA`."""
    for name, expected in place_of(layer).items():
        if (got := getattr(adapter, name, expected)) != expected:
            raise ValueError(f"adapter is of {name} {got!r}, expected {expected!r} for {layer!r}")
    return over(layer, over_original(adapter) if isinstance(adapter, Adapter) else adapter)


def _matrix(layer: Any) -> Any:
    """Return a layer as a linear layer on rows."""
    return layer.as_linear() if hasattr(layer, "as_linear") else layer


def _described(path: str, layer: Any) -> Any:
    """Return a layer's adapter; a plain `LoRA` is wrapped in an `Adapter` that shares its arrays."""
    if not hasattr(layer, "adapter"):
        raise TypeError(f"the layer {path!r}, a {type(layer).__name__}, has a method merge(), but no attribute adapter")
    adapter, more = layer.adapter, members_besides(layer, "base", "adapter")
    if not isinstance(adapter, LoRA):
        return adapter
    if more:
        raise TypeError(
            f"the layer {path!r}, a {type(layer).__name__}, has a {next(iter(more))} besides base and adapter: its "
            "adapter alone is not its change of weight"
        )
    if type(adapter) is not LoRA:  # it knows its kind of layer, or is of your own class
        return adapter
    described = Adapter(adapter.lora_A, adapter.lora_B, adapter.alpha, **place_of(getattr(layer, "base", None)))
    described.frozen = adapter.frozen
    return described


def named_layers(model: Layer, target_modules: str | Sequence[str]) -> dict[str, Layer]:
    """Return the layers without an adapter that `target_modules` selects, by path; each name must match one."""
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
            raise ValueError("every layer of the model already has an adapter: merge(model) first")
        if [*every] == [""]:
            raise ValueError(
                f"{what} names no layer, and the model is one layer, without a name: "
                "LoRALinear.from_linear(layer, rank=..., alpha=..., rng=...) puts an adapter beside it"
            )
        how = "; a string must match a whole path" if expression else ""
        if arrays := every.keys() - free.keys():
            how += f". Arrays of a mixture, such as {min(arrays)!r}, are named in target_parameters"
        there = free if expression else dict.fromkeys(path.rpartition(".")[2] for path in free)
        raise ValueError(f"{what} names no layer without an adapter; there are {_listed(there)}{how}")
    return targets


def named_parameters(model: Layer, target_parameters: Collection[str]) -> dict[str, Layer]:
    """Return the stacks of weights without an adapter that `target_parameters` selects, by the array's name."""
    if isinstance(target_parameters, str) or not isinstance(target_parameters, Collection):
        raise TypeError(f"target_parameters must be a list of names, not an expression, got {target_parameters!r}")
    free = {path: layer for path, layer in _free(model).items() if isinstance(layer, StackedLinear)}
    for target in target_parameters:
        if not any(_named(path, layer, [target]) for path, layer in free.items()):
            raise ValueError(
                f"target_parameters names {target!r}, which is not an array of a mixture without an adapter; there are "
                f"{_listed(free)}. The layers of a shared expert, and all others, belong in target_modules"
            )
    return {path: layer for path, layer in free.items() if _named(path, layer, [*target_parameters])}


def _free(model: Layer) -> dict[str, Layer]:
    """Return the layers that can have an adapter and have none yet, by path."""
    check_model(model)
    free = _without_adapter(model).items()
    return {path: layer for path, layer in free if kind_of_layer(layer) or isinstance(layer, StackedLinear)}


def _without_adapter(model: Layer) -> dict[str, Layer]:
    """Return the layers that are neither adapted nor part of an adapted layer, by path."""
    taken = tuple(f"{path}.".removeprefix(".") for path, layer in walk(model) if is_adapted(layer))
    return {path: layer for path, layer in walk(model) if not f"{path}.".startswith(taken)}


def _listed(paths: Collection[str], most: int = 8) -> str:
    """Return the first few paths for printing, with the number of the rest: a model can have hundreds."""
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return f"{list(paths)[:most]}{more}"


def _named(path: str, layer: Layer, target_modules: str | Sequence[str]) -> bool:
    """Return whether `target_modules` selects the module at a path, by PEFT's rules."""
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
    """Require a list of module paths or suffixes, or one regular expression."""
    if isinstance(target_modules, str):
        try:
            re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"target_modules={target_modules!r} is not a regular expression: {error}") from None
    elif not isinstance(target_modules, Collection) or not all(isinstance(name, str) for name in target_modules):
        raise TypeError(f"target_modules must be a list of names or a regular expression, got {target_modules!r}")
