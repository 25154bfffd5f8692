"""The reports of a running training: its progress, divergence, and a loss that grows."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np

from .backend import all_finite
from .checks import Array, is_array
from .extras import needed
from .layer import Layer, members, walk
from .losses import IGNORE_INDEX, Loss
from .state import TrainingState

GROWTH = 1000  # a final loss above this multiple of the initial one has grown


class TrainingDiverged(ArithmeticError):
    """Training reached a number that is NaN or infinite. The model keeps the arrays of this epoch."""

    epoch: int  # the epoch, counted from 1
    step: int  # the step after which the numbers were checked, counted from 1 over all epochs

    def __init__(self, message: str, epoch: int = 0, step: int = 0) -> None:
        super().__init__(message)
        self.epoch, self.step = epoch, step


class LossGrew(UserWarning):
    """The loss is finite, but far above the initial one."""


def first_loss(model: Layer, X: Array, Y: Array, loss: Loss) -> float:
    """Return the loss of some rows, or that of a model that outputs 0 if it is larger; refuse weights with NaN."""
    with np.errstate(all="ignore"):
        if Y.dtype.kind in "iu" and not bool((Y != IGNORE_INDEX).any()):  # no target counts
            return math.inf
        y = model(X)
        value = max(float(loss(y, Y)[0]), float(loss(0 * y, Y)[0]))
    if not math.isfinite(value) and (name := array_with_nan(model)):
        raise ValueError(f"model cannot be trained: its {name} holds NaN or infinity")
    return value


def warn_of_growth(before: float, last: float, state: TrainingState, times: float = GROWTH) -> None:
    """Warn if the loss is more than `times` times the initial one."""
    if last > times * before:
        when = f" in the first {state.unit}" if times < GROWTH else ""
        warnings.warn(
            f"the loss grew from {before:.3g} to {last:.3g}{when}: lr = {state.optimizer.lr} is too large; start again "
            "with a smaller one, since the model is worse than before",
            LossGrew,
            stacklevel=3,
        )


def array_with_nan(model: Layer, besides: Iterable[Array] = ()) -> str:
    """Return the name of the first array of a model with NaN or infinity, besides some; "" if there is none."""
    known = {id(array) for array in besides}
    parts = ((f"{path}.{name}".removeprefix("."), a) for path, layer in walk(model) for name, a in members(layer))
    return next((name for name, a in parts if is_array(a) and id(a) not in known and not all_finite([a])), "")


def check_parameters(state: TrainingState, number: int) -> None:
    """Stop if a parameter has NaN or infinity. Called once per epoch, since it waits for the device."""
    params = state.optimizer.params
    if all_finite(list(params.values())):
        return
    bad = [name for name, p in params.items() if not all_finite([p])]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    cause = f"Either lr = {state.optimizer.lr} is too large, or X or Y is not finite"
    if frozen := array_with_nan(state.model, params.values()):
        cause = f"The cause is {frozen}, which does not train: it holds NaN or infinity"
    raise TrainingDiverged(
        f"{state.unit} {number}: {', '.join(bad[:3])}{more} is no longer finite, {_last_loss(state)}. The model keeps "
        f"what the {state.unit} left. {cause}",
        *state.now,
    )


def check_loss(loss: float, number: int, state: TrainingState, data: str) -> float:
    """Return the loss to report; stop if it is NaN or infinite."""
    if not math.isfinite(loss):
        message = f"the loss over all of {data} is {loss} after {state.unit} {number}, {_last_loss(state)}"
        raise TrainingDiverged(f"{message}. The model keeps what the {state.unit} left", *state.now)
    return loss


def _last_loss(state: TrainingState) -> str:
    """Describe the last finite loss that was reported."""
    history = state.history
    if not history.losses:
        return "and no loss was reported before"
    return f"and the last loss reported was {history.losses[-1]:.7g} after {state.unit} {history.epochs[-1]}"


def progress_bar(done: int, rounds: int, tokens: int | None, unit: str = "epoch") -> Any:
    """Return tqdm's bar over epochs, steps or their tokens: in a notebook, or on stderr if it is a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    in_notebook = shell is not None and "IPKernelApp" in shell.config
    with warnings.catch_warnings():  # without ipywidgets, a notebook shows a line of text that says so
        warnings.simplefilter("ignore")
        bar = needed("tqdm.auto" if in_notebook else "tqdm", "progress=True").tqdm
    size, unit = (tokens, "token") if tokens else (1, unit)
    hidden = False if in_notebook else None  # None hides it if stderr is not a terminal
    return bar(initial=done * size, total=rounds * size, disable=hidden, unit=unit, unit_scale=bool(tokens))
