"""A training as one watches it: a bar that moves, and a stop where its numbers are no longer finite."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

from tqdm import tqdm

from .backend import all_finite
from .state import TrainingState


class TrainingDiverged(ArithmeticError):
    """Training met a number that is NaN or infinite. The model keeps what the epoch left."""

    epoch: int  # the epoch in which it happened, counted from 1
    step: int  # 0: the numbers are looked at when the epoch ends

    def __init__(self, message: str, epoch: int = 0, step: int = 0) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.step = step


class LossGrew(UserWarning):
    """Training ended with a loss far above the one that it began with, and finite."""


GROWTH = 1000


def warn_of_growth(before: float, last: float, state: TrainingState) -> None:
    """Warn where the loss ends a thousand times above where it began."""
    if last > GROWTH * before:
        warnings.warn(
            f"the loss grew from {before:.3g} to {last:.3g}: lr = {state.optimizer.lr} is too large; start again with a "
            "smaller one, since the model is worse than before",
            LossGrew,
            stacklevel=3,
        )


def check_parameters(state: TrainingState, epoch: int) -> None:
    """Refuse to go on where a parameter holds NaN or infinity. Asked once an epoch: asking waits for the device."""
    params = state.optimizer.params
    if all_finite(list(params.values())):
        return
    bad = [name for name, p in params.items() if not all_finite([p])]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    raise TrainingDiverged(
        f"epoch {epoch}: {', '.join(bad[:3])}{more} is no longer finite, {_last_loss(state)}. The model keeps what the "
        f"epoch left. Either lr = {state.optimizer.lr} is too large, or X or Y is not finite",
        epoch,
    )


def check_loss(loss: float, epoch: int, state: TrainingState, data: str) -> float:
    """Return the loss that is to be reported, or refuse to go on where it is NaN or infinite."""
    if not math.isfinite(loss):
        message = f"the loss over all of {data} is {loss} after epoch {epoch}, {_last_loss(state)}"
        raise TrainingDiverged(f"{message}. The model keeps what the epoch left", epoch)
    return loss


def _last_loss(state: TrainingState) -> str:
    """Say which finite loss was the last one reported."""
    history = state.history
    if not history.losses:
        return "and no loss was reported before"
    return f"and the last loss reported was {history.losses[-1]:.7g} after epoch {history.epochs[-1]}"


def progress_bar(done: int, epochs: int, tokens: int | None, *, shown: bool) -> Any:
    """Return tqdm's bar over the epochs, of which some are done. It counts tokens, where an epoch has so many.

    In a notebook it shows itself there; elsewhere on stderr, if that is a terminal.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    in_notebook = shell is not None and "IPKernelApp" in shell.config
    bar: Any = tqdm
    if in_notebook:
        with warnings.catch_warnings():  # without ipywidgets it is a line of text, and says so
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm as bar
    size, unit = (tokens, "token") if tokens else (1, "epoch")
    hidden = None if shown and not in_notebook else not shown  # None: where stderr is no terminal
    return bar(initial=done * size, total=epochs * size, disable=hidden, unit=unit, unit_scale=bool(tokens))


def move(bar: Any, state: TrainingState, tokens: int | None) -> None:
    """Move the bar on by an epoch, and show the loss where it was logged."""
    if state.history.epochs[-1:] == [state.epoch]:
        bar.set_postfix(loss=f"{state.history.losses[-1]:.4g}", refresh=False)
    bar.update(tokens or 1)
