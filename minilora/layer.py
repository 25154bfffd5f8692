"""What a layer is, and how a model is made of layers.

    y, cache  = layer.forward(x)                            pure: what backward needs travels in the cache
    dx, grads = layer.backward(dy, cache, need_dx=True)     grads stand under the names of trainable()
    y         = layer(x)                                    inference

A NEW LAYER says which axes its arrays have, and writes a forward and a backward. This is all of y_nj = x_nj g_j:

    @dataclass(eq=False, repr=False)
    class Scale(Layer):
        gain: Annotated[Array, "in"]

        def forward(self, x):  # (..., in) -> (..., in)
            return x * self.gain, (x,)

        def backward(self, dy, cache, *, need_dx=True):
            (x,) = cache
            dx = dy * self.gain if need_dx else None
            return dx, {} if self.frozen else {"gain": rows(dy * x).sum(axis=0)}

WHAT FITS. An annotation says what a part of a layer must be: ``Annotated[Array, "out in"]`` is an array of two axes,
``Annotated[Linear, "in -> out"]`` a layer of these widths, and ``Annotated[float, "> 0"]`` a number. Each name of an
axis is one size throughout the layer. A new layer checks its parts: one size for each name, one library, one precision.

THE GUARDS. `Layer` puts one around every forward and one around every backward. The first requires that x has the
layer's library and precision, and `in` entries on its last axis where an array of the layer has the axis `in`; another
class says what it takes, as in ``takes = "... T in"``. It returns the cache as a record: the layer, the shape of y, and
what the forward kept. The second requires the record of the same layer and a dy of that shape, and hands on what was
kept. Between a subclass and its parent there is no guard: ``super().forward(x)`` returns what the parent kept.

A MODEL is a layer whose attributes are layers, or lists of layers. Its names nest: ``"layers.3.fc1.weight"`` is the
weight of ``model.layers[3].fc1``. Two functions look for arrays and layers among attributes:

    members(layer)                     list a layer's own arrays and layers, by name
    rebuild(model, array, layer)       copy the model with every array and layer passed through a function

Everything else is written with them, above all:

    model.trainable()                  list the arrays that train, by name
    walk(model)                        list every layer, by path
    nest(name, grads)                  put a child's gradients under its name

WHY NEED_DX. A backward computes the gradients of the layer's own arrays, and dx, which the layer below takes as its dy.
Below the lowest layer that trains nobody takes it, and it can be half of the work. So the caller says whether it needs
dx, and ``dx = ... if need_dx else None`` in a backward means this and nothing more. A model asks a layer for dx while a
layer below that one trains (`trains`), or while the model itself is asked.

A frozen layer trains nothing and only passes dx. Its cache keeps what dx needs: of a linear layer nothing, of a norm
its input. An array that stands in two places (a tied array) is one parameter: it has two names here, and `Adam` and
`gradcheck` sum its gradients.
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
    FLOATS,
    RECAST,
    Array,
    check_array,
    check_instance,
    check_library,
    check_number,
    check_shape,
    check_trainable,
    is_array,
    kind_of,
)

Cache: TypeAlias = Any
"""What a forward keeps for its backward. Only data, so that memory can be counted."""
Model = TypeVar("Model", bound="Layer")
POSITIVE = "> 0"
"""How a class annotates a number that must be above 0."""


class Record(NamedTuple):
    """What a guarded forward returns as its cache."""

    layer: Layer
    shape: tuple[int, ...]  # of y
    kept: Any


class Layer:
    """The protocol. A subclass writes `forward` and `backward`; arrays and layers among its attributes are found."""

    frozen = False
    takes: ClassVar[str | None] = None  # the axes of x, where no array of the layer says them
    _forward_of: ClassVar[type[Layer]]  # the class whose forward, or backward, this one has
    _backward_of: ClassVar[type[Layer]]

    def __init_subclass__(cls, **options: Any) -> None:
        """Put the guards around the forward and the backward."""
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
        """Require a number that is annotated ``"> 0"`` to be above 0, whenever it is set."""
        positive = self.fits().get(name, ("", None))[0] == POSITIVE
        super().__setattr__(name, check_number(name, value, above=0) if positive else value)

    def __post_init__(self) -> None:
        check_fits(self)

    def forward(self, x: Array) -> tuple[Array, Cache]:
        """Return the output, and the cache for `backward`."""
        raise NotImplementedError(f"{type(self).__name__} has no forward(x) -> (y, cache)")

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return the loss's gradients at the input, and at what trains.

        Parameters
        ----------
        dy : array, of the output's shape
            The gradient of the loss at the output.
        cache : Record
            As `forward` returned it. The body of a backward gets what its forward kept.
        need_dx : bool
            Whether the caller needs dx; False below the lowest layer that trains.

        Returns
        -------
        dx : array, of the input's shape, or None
            None where `need_dx` is false, and for inputs that have no derivative, such as token ids.
        grads : dict of str to array
            Under the names of `trainable`.

        Raises
        ------
        ValueError, TypeError
            If the cache is of another layer, or dy does not fit the output.
        """
        raise NotImplementedError(f"{type(self).__name__} has no backward(dy, cache, *, need_dx=True) -> (dx, grads)")

    def __call__(self, x: Array) -> Array:
        """Return the output only."""
        return self.forward(x)[0]

    @classmethod
    @cache
    def fits(cls) -> dict[str, tuple[str, Any]]:
        """Return by name what the class's annotations say of its parts: the axes, and the class of a part."""
        found: dict[str, tuple[str, Any]] = {}
        for owner in reversed(cls.__mro__):
            for name, hint in inspect.get_annotations(owner).items():
                if isinstance(hint, str) and hint.startswith("Annotated["):  # by `from __future__ import annotations`
                    hint = eval(hint, vars(sys.modules[owner.__module__]))
                if hasattr(hint, "__metadata__"):
                    found[name] = hint.__metadata__[0], hint.__origin__
        return found

    @classmethod
    @cache
    def _axes_of_x(cls) -> str | None:
        """Return the axes of x that the class requires; None where it looks at x itself."""
        arrays = (_letters(axes) for axes, _ in cls.fits().values() if "->" not in axes)
        return cls.takes or ("... in" if any("in" in letters for letters in arrays) else None)

    @classmethod
    @cache
    def _places(cls) -> dict[str, tuple[str, int]]:
        """Return where the size of each axis stands: the name of a part, and the place in its shape."""
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
        """Return how many numbers each of the layer's own arrays stands for, by the array's identity."""
        return {id(part): part.size for _, part in members(self) if is_array(part)}

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), the widths of the output and the input; (in, in) where no part has the axis `out`."""
        places = self._places()
        if "in" not in places:
            raise AttributeError(f"a {type(self).__name__} has no shape (out, in)")
        (out, o), (name, i) = places.get("out", places["in"]), places["in"]
        return getattr(self, out).shape[o], getattr(self, name).shape[i]

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return int(self.shape[1])

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return int(self.shape[0])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={_show(v)}' for name, v in vars(self).items())})"


def members(layer: Layer) -> Iterator[tuple[str, Any]]:
    """Yield the arrays and layers among a layer's attributes, by name, those in lists by number too."""
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
    """Return the arrays and layers among a layer's attributes that have other names than these."""
    return {name: part for name, part in members(layer) if name not in names}


def first_array(layer: Layer) -> Array | None:
    """Return the first array of a layer, whose library and precision its input must have; None where it has none."""
    for value in vars(layer).values():  # not by `members`: every layer asks at every step, and this takes a third
        if type(value) is np.ndarray:
            return value
        for part in value if isinstance(value, list) else (value,):
            array = first_array(part) if isinstance(part, Layer) else part if is_array(part) else None
            if array is not None:
                return array
    return None


def trains(*layers: Layer) -> bool:
    """Return whether any of these layers has an array that trains. The first that is found is enough."""

    def this(layer: Layer) -> bool:
        if type(layer).trainable is not Layer.trainable:  # it says itself what trains
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
    """Return a copy of a model in which every array and every layer went through a function.

    Parameters
    ----------
    model : Layer
        It stays as it is.
    array : callable
        Called once for each array, also where it stands in two places: what was tied stays tied.
    layer : callable
        Called as ``layer(path, copy)`` for each layer, after the layers inside it.

    Returns
    -------
    Layer
        What `layer` returned for the model itself. With the defaults, a copy that shares its arrays.
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
    """Return a child's gradients, or arrays, under its name in the model; one without a name has the child's."""
    return {f"{name}.{key}" if key else name: value for key, value in grads.items()}


def freeze(model: Model) -> Model:
    """Return a copy of a model in which no layer trains. The arrays are shared."""

    def frozen(path: str, layer: Layer) -> Layer:
        layer.frozen = True
        return layer

    return rebuild(model, layer=frozen)  # type: ignore[no-any-return]


def first_names(params: Mapping[str, Array]) -> dict[str, str]:
    """Return for each name the first name of its array: two names of one array share their home."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in params.items()}


def sum_tied(grads: Mapping[str, Array], home: Mapping[str, str]) -> dict[str, Array]:
    """Return one gradient for each array: the sum over its names, under its home."""
    total: dict[str, Array] = {}
    for name, first in home.items():
        total[first] = total[first] + grads[name] if first in total else grads[name]
    return total


def parameter_count(model: Layer, *, trained: bool = False) -> int:
    """Return how many numbers a model has, or how many of them train. What is tied counts once."""
    if trained:
        return sum({id(array): array.size for array in model.trainable().values()}.values())
    return sum({key: count for _, layer in walk(model) for key, count in layer.parameter_counts().items()}.values())


def arrays_of(model: Layer) -> Iterator[Array]:
    """Yield every array of a model, a tied one each time."""
    return (part for _, layer in walk(model) for _, part in members(layer) if is_array(part))


def rows(x: Array) -> Array:  # (..., n) -> (N, n)
    """Flatten the leading axes into one axis of rows, without a copy where the memory allows it.

    One product then takes all rows. NumPy makes one for each leading index: 16 of (128, 128) times (128, 341) take 1.5
    ms on two cores, and one of (2048, 128) takes 1.0.
    """
    return x.reshape(-1, x.shape[-1])


def inner(a: Array, b: Array) -> Array:  # (..., n), (..., n) -> (..., 1)
    """Return for each row sum_i a_i b_i. The products are added up as they come: there is no array of them."""
    return backend_of(a).xp.einsum("...i,...i->...", a, b)[..., None]


def _show(value: Any) -> str:
    """Return an attribute for `repr`: of an array its shape, and not its numbers."""
    if isinstance(value, list):
        return f"[{', '.join(map(_show, value))}]"
    return str(tuple(value.shape)) if is_array(value) else repr(value)


def matmul(narrow: Array, factor: Array) -> Array:  # (..., r), (r, n) -> (..., n)
    """Return ``narrow @ factor``, faster at rank 1.

    NumPy does not send an outer product to the BLAS. At rank 1, as a broadcast product, 128 rows of 1000 entries take
    0.03 ms instead of 0.14, in a step of an adapter without its base that takes 0.33 ms instead of 0.45.
    """
    return narrow * factor[0] if factor.shape[0] == 1 else narrow @ factor


# --- guards ---


def _guarded_forward(forward: Callable[..., Any], cls: type[Layer]) -> Callable[..., tuple[Array, Cache]]:
    """Return a forward that requires what the layer takes, and returns its cache as a `Record`."""

    @wraps(forward)
    def guarded(self: Layer, x: Array, *more: Any, **options: Any) -> tuple[Array, Cache]:
        if self._forward_of is not cls:  # a subclass asks, by super(), and has a guard of its own
            return forward(self, x, *more, **options)  # type: ignore[no-any-return]
        axes = self._axes_of_x()
        if axes is not None and not (
            _usual(self, x) and (axes == "..." or (axes == "... in" and x.shape[-1:] == self.shape[-1:]))
        ):
            check_input(self, x, axes)
        returned = forward(self, x, *more, **options) if more or options else forward(self, x)  # the second costs less
        if not isinstance(returned, tuple) or len(returned) != 2:  # an array would give its rows
            got = f"{kind_of(returned)}, expected a tuple (y, cache)"
            raise TypeError(f"forward of {type(self).__name__} returned {got}")
        y, kept = returned
        return y, Record(self, y.shape, kept)

    return guarded


def _guarded_backward(backward: Callable[..., Any], cls: type[Layer]) -> Callable[..., Any]:
    """Return a backward that requires its forward's cache, and a dy of the shape of y."""

    @wraps(backward)
    def guarded(self: Layer, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        if self._backward_of is cls:
            fits = type(cache) is Record and cache.layer is self and _usual(self, dy) and dy.shape == cache.shape
            cache = cache.kept if fits else check_cache(self, dy, cache)
        return backward(self, dy, cache, need_dx=need_dx)  # type: ignore[no-any-return]

    return guarded


def _usual(layer: Layer, value: Any) -> bool:
    """Return whether a value is NumPy's, of real numbers, in the precision of the layer.

    Between all layers of a model, and at every step, it is, and comparisons say so. Of all else the checks decide.
    """
    if type(value) is not np.ndarray or value.dtype not in FLOATS:
        return False
    like = first_array(layer)
    return like is None or (type(like) is np.ndarray and value.dtype == like.dtype)


def check_fits(layer: Layer) -> None:
    """Require one size for each axis, and one library and precision. A part may be None by default."""
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
    """Return the widths of a layer that has them."""
    if not isinstance(layer, Layer) or not hasattr(layer, "in_features"):
        raise TypeError(f"{name} must be a Layer with in_features and out_features, got {kind_of(layer)}")
    return layer.in_features, layer.out_features


@cache
def _letters(axes: str) -> list[str]:
    return axes.replace("->", " ").split()


def _sized(name: str, axes: str, shape: tuple[int, ...]) -> str:
    """Return the beginning of a refusal: what a part's sizes are, and by which names they should fit."""
    if "->" in axes:
        return f"{name} is {shape[0]} -> {shape[1]} wide, expected {axes}"
    letters = str(tuple(_letters(axes))).replace("'", "")
    return f"{name} has shape {shape}, expected {letters}"


def check_updatable(name: str, p: Array, first: Array, first_name: str) -> None:
    """Require an array that trains, of one library with the first, and whose entries can be changed one by one."""
    check_trainable(name, p)
    check_library(name, p, like=first, like_name=first_name)
    if isinstance(p, np.ndarray) and not p.flags.writeable:
        raise ValueError(f"{name} is read-only: Adam updates it in place, so give a copy")
    if isinstance(p, np.ndarray) and p.size and overlaps_itself(p):
        raise ValueError(f"{name} has entries that share memory, as of a view: give a copy")


def overlaps_itself(p: np.ndarray) -> bool:
    """Return whether an array's strides let two entries share memory: each step must reach beyond all shorter ones."""
    reach = p.itemsize
    for axis in np.argsort(np.abs(p.strides)):
        stride, size = abs(p.strides[axis]), p.shape[axis]
        if size > 1 and stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def check_model(value: Any) -> None:
    """Require a model; adapters without theirs are a likely mistake."""
    if not isinstance(value, Layer):
        hint = "; minilora.attach(model, adapters) puts adapters into a model" if isinstance(value, Mapping) else ""
        raise TypeError(f"model must be a Layer, got {kind_of(value)}{hint}")


def check_input(layer: Layer, x: Array, axes: str = "... in") -> None:
    """Require of x the layer's library and precision, and its axes: "...", "... in" or "... T in"."""
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
    """Return what a cache of `layer.forward` keeps. It is this layer's, and dy has the shape of y."""
    if not isinstance(cache, Record) or cache.layer is not layer:
        if isinstance(dy, Record) and dy.layer is layer:
            raise TypeError("dy and cache are exchanged: call backward(dy, cache)")
        raise ValueError(f"cache does not come from this layer's forward: {layer!r:.200}")
    check_array("dy", dy, like=first_array(layer))
    if dy.shape != cache.shape:
        check_shape("dy", dy, cache.shape)
    return cache.kept
