"""The protocol of layers, and models built from them.

    y, cache  = layer.forward(x)                            pure: what backward needs is in the cache
    dx, grads = layer.backward(dy, cache, need_dx=True)     grads have the names of trainable()
    y         = layer(x)                                    inference

A NEW LAYER declares the axes of its arrays, and defines a forward and a backward. This is all of y_nj = x_nj g_j:

    @dataclass(eq=False, repr=False)
    class Scale(Layer):
        gain: Annotated[Array, "in"]

        def forward(self, x):  # (..., in) -> (..., in)
            return x * self.gain, (x,)

        def backward(self, dy, cache, *, need_dx=True):
            (x,) = cache
            dx = dy * self.gain if need_dx else None
            return dx, {} if self.frozen else {"gain": rows(dy * x).sum(axis=0)}

ANNOTATIONS declare the parts of a layer: ``Annotated[Array, "out in"]`` is an array of two axes,
``Annotated[Linear, "in -> out"]`` a layer of these widths, and ``Annotated[float, "> 0"]`` a number. Each name of an
axis stands for one size throughout the layer. A new layer checks that its parts agree in sizes, library and precision.

THE GUARDS. `Layer` wraps every forward and every backward. The wrapped forward requires that x has the layer's library
and precision, and `in` entries on its last axis if an array of the layer has the axis `in`; other classes declare their
input, as in ``takes = "... T in"``. It returns the cache as a record: the layer, the shape of y, and what the forward
kept. The wrapped backward requires a record of the same layer and a dy of that shape, and passes on what was kept.
There is no guard between a subclass and its parent: ``super().forward(x)`` returns what the parent kept.

A MODEL is a layer whose attributes are layers, or lists of layers. Its names nest: ``"layers.3.fc1.weight"`` is the
weight of ``model.layers[3].fc1``. Two functions find arrays and layers among attributes:

    members(layer)                     list a layer's own arrays and layers, by name
    rebuild(model, array, layer)       copy the model with every array and layer passed through a function

Everything else is written with them, in particular:

    model.trainable()                  list the arrays that train, by name
    walk(model)                        list every layer, by path
    nest(name, grads)                  put a child's gradients under its name

WHY NEED_DX. A backward computes the gradients of the layer's own arrays, and dx, which is the dy of the layer below.
Below the lowest layer that trains, dx is not needed, and it can be half of the work. So the caller says whether it
needs dx, which is all that ``dx = ... if need_dx else None`` in a backward means. A model requests dx from a layer if a
layer below it trains (`trains`), or if dx is requested from the model itself.

A frozen layer trains nothing and only passes dx. Its cache has only what dx needs: nothing for a linear layer, the
input for a norm. An array in two places (a tied array) is one parameter with two names; `Adam` and `gradcheck` sum its
gradients.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from functools import cache, wraps
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar

import numpy as np

from .backend import backend_of
from .checks import (
    ASTYPE,
    REAL_DTYPES,
    RECAST,
    Array,
    check_array,
    check_instance,
    check_number,
    check_shape,
    is_array,
    kind_of,
)

Cache: TypeAlias = Any
"""The values that a forward keeps for its backward: only data, so that memory can be counted."""
Model = TypeVar("Model", bound="Layer")
POSITIVE = "> 0"
"""The annotation of a number that must be above 0."""


class Record(NamedTuple):
    """The cache of a guarded forward."""

    layer: Layer
    shape: tuple[int, ...]  # the shape of y
    kept: Any


class Layer:
    """The protocol. A subclass defines `forward` and `backward`; arrays and layers are found among its attributes."""

    frozen = False
    takes: ClassVar[str | None] = None  # the axes of x, if no array of the layer determines them
    _forward_of: ClassVar[type[Layer]]  # the class that defines the forward, or the backward
    _backward_of: ClassVar[type[Layer]]

    def __init_subclass__(cls, **options: Any) -> None:
        """Wrap the forward and the backward in guards."""
        super().__init_subclass__(**options)
        own = vars(cls)
        if "fits" in own:
            raise TypeError(f'{cls.__name__} has `fits`: annotate instead, as in gain: Annotated[Array, "in"]')
        if "forward" in own:
            cls.forward = _guarded_forward(own["forward"], cls)  # type: ignore[method-assign]
            cls._forward_of = cls
        if "backward" in own:
            cls.backward = _guarded_backward(own["backward"], cls)  # type: ignore[method-assign]
            cls._backward_of = cls

    def __setattr__(self, name: str, value: Any) -> None:
        """Require that a number annotated ``"> 0"`` is above 0 whenever it is set."""
        positive = self.fits().get(name, ("", None))[0] == POSITIVE
        super().__setattr__(name, check_number(name, value, above=0) if positive else value)

    def __post_init__(self) -> None:
        check_fits(self)

    def forward(self, x: Array) -> tuple[Array, Cache]:
        """Return the output, and the cache for `backward`."""
        raise NotImplementedError(f"{type(self).__name__} has no forward(x) -> (y, cache)")

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return the loss's gradients with respect to the input and the trainable arrays.

        Parameters
        ----------
        dy : array, of the output's shape
            The gradient of the loss at the output.
        cache : Record
            The cache from `forward`. The body of a backward receives what its forward kept.
        need_dx : bool
            Whether the caller needs dx; False below the lowest layer that trains.

        Returns
        -------
        dx : array, of the input's shape, or None
            None if `need_dx` is false, and for inputs without a derivative, such as token ids.
        grads : dict of str to array
            The gradients under the names of `trainable`.

        Raises
        ------
        ValueError, TypeError
            If the cache belongs to another layer, or dy does not fit the output.
        """
        raise NotImplementedError(f"{type(self).__name__} has no backward(dy, cache, *, need_dx=True) -> (dx, grads)")

    def __call__(self, x: Array) -> Array:
        """Return the output only."""
        return self.forward(x)[0]

    @classmethod
    @cache
    def fits(cls) -> dict[str, tuple[str, Any]]:
        """Return the annotations of a class's parts by name: the axes, and the class of the part."""
        found: dict[str, tuple[str, Any]] = {}
        for owner in reversed(cls.__mro__):
            for name, hint in inspect.get_annotations(owner).items():
                if isinstance(hint, str) and hint.startswith("Annotated["):  # strings, by the future import
                    hint = eval(hint, vars(sys.modules[owner.__module__]))
                if hasattr(hint, "__metadata__"):
                    found[name] = hint.__metadata__[0], hint.__origin__
        return found

    @classmethod
    @cache
    def _axes_of_x(cls) -> str | None:
        """Return the axes of x that the class requires; None if it checks x itself."""
        arrays = (_letters(axes) for axes, _ in cls.fits().values() if "->" not in axes)
        return cls.takes or ("... in" if any("in" in letters for letters in arrays) else None)

    @classmethod
    @cache
    def _places(cls) -> dict[str, tuple[str, int]]:
        """Return the location of each axis's size: the name of a part, and the index in its shape."""
        places: dict[str, tuple[str, int]] = {}
        for name, (axes, _) in cls.fits().items():
            if axes == POSITIVE:
                continue
            letters = _letters(axes)
            numbers = (1, 0) if "->" in axes else range(len(letters))  # a layer's shape is (out, in)
            for letter, number in zip(letters, numbers, strict=True):
                places.setdefault(letter, (name, number))
        return places

    def trainable(self) -> dict[str, Array]:
        """Return the arrays that training updates, by name: the layer's own, not copies."""
        arrays: dict[str, Array] = {}
        for name, part in members(self):
            if isinstance(part, Layer):
                arrays |= nest(name, part.trainable())
            elif not self.frozen:
                arrays[name] = part
        return arrays

    def parameter_counts(self) -> dict[int, int]:
        """Return the parameter count of each of the layer's own arrays, by the array's identity."""
        return {id(part): part.size for _, part in members(self) if is_array(part)}

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), the widths of the output and the input; (in, in) if no part has the axis `out`."""
        places = self._places()
        if "in" not in places:
            raise AttributeError(f"a {type(self).__name__} has no shape (out, in)")
        (out, o), (name, i) = places.get("out", places["in"]), places["in"]
        return getattr(self, out).shape[o], getattr(self, name).shape[i]

    @property
    def in_features(self) -> int:
        """The width of the input."""
        return int(self.shape[1])

    @property
    def out_features(self) -> int:
        """The width of the output."""
        return int(self.shape[0])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={_show(v)}' for name, v in vars(self).items())})"


def members(layer: Layer) -> Iterator[tuple[str, Any]]:
    """Yield the arrays and layers among a layer's attributes by name, with an index if they are in lists."""
    for name, value in vars(layer).items():
        if _is_member(value):
            yield name, value
        elif isinstance(value, list):
            yield from ((f"{name}.{key}", part) for key, part in enumerate(value) if _is_member(part))


parts = members
"""The name in the fifth edition."""


def _is_member(value: Any) -> bool:
    return isinstance(value, Layer) or is_array(value)


def members_besides(layer: Layer, *names: str) -> dict[str, Any]:
    """Return the arrays and layers among a layer's attributes, except those with these names."""
    return {name: part for name, part in members(layer) if name not in names}


def first_array(layer: Layer) -> Array | None:
    """Return the first array of a layer, whose library and precision its input must have; None if there is none."""
    for value in vars(layer).values():  # a third of the time of `members`: every layer calls this at every step
        if type(value) is np.ndarray:
            return value
        for part in value if isinstance(value, list) else (value,):
            array = first_array(part) if isinstance(part, Layer) else part if is_array(part) else None
            if array is not None:
                return array
    return None


def trains(*layers: Layer) -> bool:
    """Return whether any of these layers has an array that trains; stops at the first one."""

    def this(layer: Layer) -> bool:
        if type(layer).trainable is not Layer.trainable:  # it defines itself what trains
            return bool(layer.trainable())
        return any(this(part) if isinstance(part, Layer) else not layer.frozen for _, part in members(layer))

    return any(map(this, layers))


def walk(layer: Layer, path: str = "") -> Iterator[tuple[str, Layer]]:
    """Yield a model and every layer in it, by path; the model's own is ``""``."""
    yield path, layer
    for name, part in members(layer):
        if isinstance(part, Layer):
            yield from walk(part, f"{path}.{name}" if path else name)


def rebuild(
    model: Layer,
    array: Callable[[Array], Array] = lambda a: a,
    layer: Callable[[str, Any], Layer] = lambda path, layer: layer,
) -> Any:
    """Return a copy of a model with every array and every layer passed through a function.

    Parameters
    ----------
    model : Layer
        The model. It does not change.
    array : callable
        Called once for each array, even if it occurs twice: tied arrays stay tied.
    layer : callable
        Called as ``layer(path, copy)`` for each layer, after the layers inside it.

    Returns
    -------
    Layer
        The result of `layer` for the model itself. With the defaults, a copy that shares all arrays.
    """
    done: dict[int, Array] = {}

    def go(value: Any, path: str) -> Any:
        if isinstance(value, list):
            return [go(part, f"{path}.{key}") for key, part in enumerate(value)]
        if is_array(value):
            if id(value) not in done:
                done[id(value)] = array(value)
            return done[id(value)]
        if not isinstance(value, Layer):
            return value
        new = copy(value)
        vars(new).update({name: go(v, f"{path}.{name}" if path else name) for name, v in vars(value).items()})
        return layer(path, new)

    return go(model, "")


def nest(name: str, grads: Mapping[str, Array]) -> dict[str, Array]:
    """Prefix the names of a child's gradients or arrays with the child's name; an empty name becomes it."""
    return {f"{name}.{key}" if key else name: value for key, value in grads.items()}


def freeze(model: Model) -> Model:
    """Return a copy of a model with all layers frozen. The arrays are shared."""

    def frozen(path: str, layer: Layer) -> Layer:
        layer.frozen = True
        return layer

    return rebuild(model, layer=frozen)  # type: ignore[no-any-return]


def first_names(params: Mapping[str, Array]) -> dict[str, str]:
    """Return for each name the first name of its array: all names of one array have the same first name."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in params.items()}


def sum_tied(grads: Mapping[str, Array], home: Mapping[str, str]) -> dict[str, Array]:
    """Return one gradient for each array under its first name: the sum over its names."""
    total: dict[str, Array] = {}
    for name, first in home.items():
        total[first] = total[first] + grads[name] if first in total else grads[name]
    return total


def parameter_count(model: Layer, *, trained: bool = False) -> int:
    """Return the number of parameters of a model, or of those that train. Tied arrays count once."""
    if trained:
        return sum({id(array): array.size for array in model.trainable().values()}.values())
    return sum({key: count for _, layer in walk(model) for key, count in layer.parameter_counts().items()}.values())


def arrays_of(model: Layer) -> Iterator[Array]:
    """Yield every array of a model; a tied one repeatedly."""
    return (part for _, layer in walk(model) for _, part in members(layer) if is_array(part))


def rows(x: Array) -> Array:  # (..., n) -> (N, n)
    """Flatten the leading axes into one axis of rows, without a copy if possible.

    A single product then handles all rows. NumPy would compute one per leading index: 16 products of (128, 128) and
    (128, 341) take 1.5 ms on two cores, one of (2048, 128) takes 1.0.
    """
    return x.reshape(-1, x.shape[-1])


def inner(a: Array, b: Array) -> Array:  # (..., n), (..., n) -> (..., 1)
    """Return sum_i a_i b_i for each row, without an array of the products."""
    return backend_of(a).xp.einsum("...i,...i->...", a, b)[..., None]


def _show(value: Any) -> str:
    """Return an attribute for `repr`: an array by its shape, not its numbers."""
    if isinstance(value, list):
        return f"[{', '.join(map(_show, value))}]"
    return str(tuple(value.shape)) if is_array(value) else repr(value)


def matmul(narrow: Array, factor: Array) -> Array:  # (..., r), (r, n) -> (..., n)
    """Return ``narrow @ factor``, faster at rank 1.

    NumPy does not send an outer product to the BLAS. As a broadcast product at rank 1, 128 rows of 1000 entries take
    0.03 ms instead of 0.14, and a step of an adapter without its base takes 0.33 ms instead of 0.45.
    """
    return narrow * factor[0] if factor.shape[0] == 1 else narrow @ factor


# --- guards ---


def _guarded_forward(forward: Callable[..., Any], cls: type[Layer]) -> Callable[..., tuple[Array, Cache]]:
    """Wrap a forward: check its input, and return its cache as a `Record`."""

    @wraps(forward)
    def guarded(self: Layer, x: Array, *more: Any, **options: Any) -> tuple[Array, Cache]:
        if self._forward_of is not cls:  # by super(), from a subclass with its own guard
            return forward(self, x, *more, **options)  # type: ignore[no-any-return]
        axes = self._axes_of_x()
        if axes is not None and not (
            _usual(self, x) and (axes == "..." or (axes == "... in" and x.shape[-1:] == self.shape[-1:]))
        ):
            check_input(self, x, axes)
        returned = forward(self, x, *more, **options) if more or options else forward(self, x)  # the second is cheaper
        if not isinstance(returned, tuple) or len(returned) != 2:  # unpacking an array would give its rows
            got = f"{kind_of(returned)}, expected a tuple (y, cache)"
            raise TypeError(f"forward of {type(self).__name__} returned {got}")
        y, kept = returned
        return y, Record(self, y.shape, kept)

    return guarded


def _guarded_backward(backward: Callable[..., Any], cls: type[Layer]) -> Callable[..., Any]:
    """Wrap a backward: require its forward's cache, and a dy of the shape of y."""

    @wraps(backward)
    def guarded(self: Layer, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        if self._backward_of is cls:
            fits = type(cache) is Record and cache.layer is self and _usual(self, dy) and dy.shape == cache.shape
            cache = cache.kept if fits else check_cache(self, dy, cache)
        return backward(self, dy, cache, need_dx=need_dx)  # type: ignore[no-any-return]

    return guarded


def _usual(layer: Layer, value: Any) -> bool:
    """Return whether a value is a real NumPy array in the precision of the layer.

    Between the layers of a model it always is, so comparisons suffice. The checks handle all other cases.
    """
    if type(value) is not np.ndarray or value.dtype not in REAL_DTYPES:
        return False
    like = first_array(layer)
    return like is None or (type(like) is np.ndarray and value.dtype == like.dtype)


def check_fits(layer: Layer) -> None:
    """Require one size for each axis, one library and one precision. A part may be None if that is its default."""
    sizes: dict[str, tuple[int, str]] = {}
    like, like_name = None, ""
    for name, (axes, expected) in layer.fits().items():
        part: Any = getattr(layer, name, None)
        if axes == POSITIVE or (part is None and hasattr(type(layer), name)):
            continue
        if "->" in axes:
            if isinstance(expected, type) and expected not in (Any, Layer):
                check_instance(name, part, expected)
            shape, array, how = _widths(name, part), first_array(part), RECAST
        else:
            check_array(name, part)
            shape, array, how = tuple(part.shape), part, ASTYPE
        if like is None:
            like, like_name = array, name
        elif array is not None:
            check_array(name, array, like, like_name, how)
        letters = _letters(axes)
        if len(letters) != len(shape) or 0 in shape:
            raise ValueError(f"{_sized(name, axes, shape)} with no empty axis")
        for letter, size in zip(letters, shape, strict=True):
            known, owner = sizes.setdefault(letter, (size, name))
            if size != known:
                raise ValueError(f"{_sized(name, axes, shape)} with {letter} = {known} as in {owner}")


def _widths(name: str, layer: Any) -> tuple[int, int]:
    """Return the widths of a layer, if it has any."""
    if not isinstance(layer, Layer) or not hasattr(layer, "in_features"):
        raise TypeError(f"{name} must be a Layer with in_features and out_features, got {kind_of(layer)}")
    return layer.in_features, layer.out_features


@cache
def _letters(axes: str) -> list[str]:
    return axes.replace("->", " ").split()


def _sized(name: str, axes: str, shape: tuple[int, ...]) -> str:
    """Return the start of an error: a part's sizes, and the names of its axes."""
    if "->" in axes:
        return f"{name} is {shape[0]} -> {shape[1]} wide, expected {axes}"
    letters = str(tuple(_letters(axes))).replace("'", "")
    return f"{name} has shape {shape}, expected {letters}"


def check_model(value: Any) -> None:
    """Require a model; passing adapters without one is a likely mistake."""
    if not isinstance(value, Layer):
        hint = "; minilora.attach(model, adapters) puts adapters into a model" if isinstance(value, Mapping) else ""
        raise TypeError(f"model must be a Layer, got {kind_of(value)}{hint}")


def check_input(layer: Layer, x: Array, axes: str = "... in") -> None:
    """Require that x has the layer's library, precision and axes: "...", "... in" or "... T in"."""
    check_array("x", x, like=first_array(layer))
    if axes == "...":
        return
    width, shape = layer.in_features, tuple(x.shape)
    if shape[-1:] != (width,):
        got, hint = f"{shape[-1]} entries on its last axis" if shape else "no axes", ""
        if shape[-1:] == (layer.out_features,):
            hint = f"; out_features is {shape[-1]}: is the weight transposed? It lies as (out, in)"
        raise ValueError(f"x has {got} (shape {shape}), expected in_features = {width}{hint}")
    if axes == "... T in" and (len(shape) < 2 or shape[-2] == 0):
        raise ValueError(f"x has shape {shape}, expected (..., T, {width}) with at least one position")


def check_cache(layer: Layer, dy: Array, cache: Any) -> Any:
    """Return the kept part of a cache of `layer.forward`, and require a dy of the shape of y."""
    if not isinstance(cache, Record) or cache.layer is not layer:
        if isinstance(dy, Record) and dy.layer is layer:
            raise TypeError("dy and cache are exchanged: call backward(dy, cache)")
        raise ValueError(f"cache does not come from this layer's forward: {layer!r:.200}")
    check_array("dy", dy, like=first_array(layer))
    if dy.shape != cache.shape:
        check_shape("dy", dy, cache.shape)
    return cache.kept
