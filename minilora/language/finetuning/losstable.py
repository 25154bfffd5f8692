"""What a fine-tuning shows while it learns: a row each time the loss is measured, its speed, and the time left.

    step  training  held-out loss  tokens/s  time left
       0                    5.291
      20     4.548          4.131    11,903       45 s

The training loss costs nothing: it is the mean of the losses that the gradients come with, over all targets since the
row before.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...checks import Array
from ...evaluation import Gradients
from ...files.atomic import replaceable
from ...files.checkpoint import CheckpointError, Saved
from ...losses import IGNORED, Loss
from ...training import History, TrainingState, evaluate_of

LOG_EVERY = 20
"""Steps from one measurement of the held-out loss to the next."""
QUIET = 60.0
"""Seconds without a row after which a line says how far it is."""


class TrainingLoss:
    """Gradients that note the losses they come with, for ``train(..., gradients=TrainingLoss(...))``.

    A step's parts may come in any order, from several threads: `math.fsum` is exact, so the mean has the same bits.
    """

    def __init__(self, gradients: Gradients, step: int = 0, sums: dict[str, Any] | None = None) -> None:
        self.gradients, self.step = gradients, step
        # As a checkpoint keeps it: the mean of each row by its step; the sum of the losses since, and their number.
        self.sums: dict[str, Any] = sums or {"rows": {}, "sum": 0.0, "targets": 0}
        self.sums.setdefault("steps", {})  # the mean of each step; an earlier version kept none
        self.began = self.ended = 0.0  # of the last call, in seconds
        self.measures: Callable[[], None] = lambda: None  # is called when a measurement of the held-out loss begins

    def __call__(self, model: Any, x: Array, y: Array, loss: Loss) -> dict[str, Array]:
        """Return the gradients of the loss."""
        self.began = time.perf_counter()
        parts: list[tuple[Array, Array]] = []

        @wraps(loss)
        def noting(prediction: Array, target: Array) -> tuple[Array, Array]:
            value, d_prediction = loss(prediction, target)
            parts.append((value, (target != IGNORED).sum()))
            return value, d_prediction

        grads = self.gradients(model, x, y, noting)
        if self.step % LOG_EVERY == 0:
            self.sums.update(sum=0.0, targets=0)
        self.step += 1
        counted = [(float(value), int(targets)) for value, targets in parts]
        total, number = math.fsum(value * targets for value, targets in counted), sum(targets for _, targets in counted)
        self.sums["sum"] += total
        self.sums["targets"] += number
        if number:
            self.sums["steps"][str(self.step)] = total / number
        if self.step % LOG_EVERY == 0 and self.sums["targets"]:
            self.sums["rows"][str(self.step)] = self.sums["sum"] / self.sums["targets"]
        self.ended = time.perf_counter()
        return grads

    def evaluate(self, model: Any, X: Array, Y: Array, loss: Loss) -> float:
        """Return the loss over all of X and Y, measured as the gradients measure it."""
        self.measures()
        return evaluate_of(self.gradients)(model, X, Y, loss)

    def each(self) -> list[tuple[int, float]]:
        """Return each step and the mean over its targets."""
        return [(int(step), float(loss)) for step, loss in self.sums["steps"].items()]

    def at(self, step: int) -> float:
        """Return the mean over the targets from the row before a step to the step; NaN where none was noted."""
        if step == self.step and self.sums["targets"]:
            return float(self.sums["sum"] / self.sums["targets"])
        return float(self.sums["rows"].get(str(step), math.nan))


class Table:
    """The rows, printed as they are measured; its call is the `report` of `train`.

    Parameters
    ----------
    steps, done : int
        Of the whole training, and of a training that goes on those before.
    tokens : int
        In a step.
    loss : TrainingLoss
        What the training is given as its gradients.
    measuring : float
        Seconds that measuring the held-out loss takes, as far as is known before.
    log : Path, optional
        A file that gets a line of JSON for each step. It begins anew, with the steps of a training that goes on.
    """

    def __init__(
        self, steps: int, done: int, tokens: int, loss: TrainingLoss, measuring: float, log: Path | None = None
    ) -> None:
        self.steps, self.done, self.tokens, self.loss, self.measuring = steps, done, tokens, loss, measuring
        self.rows: list[tuple[int, float, float]] = []  # step, training loss (NaN where there is none), held-out loss
        self.since, self.since_step = 0.0, done  # when the last row was printed
        self.written = 0.0  # when the last line was printed
        self.spent = 0.0  # seconds of all steps up to there, without the measuring
        self.log, self.logged = log, 0  # steps that are in the log
        self.best_step: int | None = None  # whose parameters are saved, where that is not the last one
        self.begins: Callable[[int], None] = lambda step: None  # is called when a step begins
        self._write("step  training  held-out loss  tokens/s  time left   (losses in nats a token)")

    def known(self, before: float, saved: Saved | None) -> None:
        """Print the rows that are known when the training begins: of the untrained adapter, and from a checkpoint."""
        self._row(0, math.nan, before)
        for step, loss in zip(saved.epochs, saved.losses, strict=True) if saved else ():
            self._row(step, self.loss.at(step), loss)
        if self.log is not None:
            replaceable(self.log)
            self.log.write_text("")
            self.note(self.done)

    def __call__(self, state: TrainingState) -> None:
        """Print the row of a step at which the loss was measured; after the first step, how long it will take.

        Where a row takes long, print how far it is.
        """
        step, now = state.epoch, time.perf_counter()
        self._check_own(step)
        self.begins(step + 1)
        if state.history.epochs[-1:] != [step] and step < self.steps:  # else the held-out loss comes first
            self.note(step)
        if step == self.done + 1:
            self.since = self.loss.began
        if state.history.epochs[-1:] == [step]:
            self.measured(step, state.history.losses[-1])
        elif step == self.done + 1 < self.steps:
            remaining = duration(self._remaining(step, now - self.since))
            self._write(f"      going by step {step}, the other {self.steps - step} take about {remaining}")
        elif step < self.steps and now - self.written > QUIET:
            remaining = duration(self._remaining(step, (self.spent + now - self.since) / (step - self.done)))
            self._write(
                f"      after step {step} the training loss is {self.loss.at(step):.3f}; about {remaining} left"
            )

    def note(self, step: int) -> None:
        """Write the steps up to this one into the log, with the losses that are known of each."""
        if self.log is None:
            return
        measured = {row[0]: row[2] for row in self.rows}
        training = self.loss.sums["steps"]
        replaceable(self.log)  # whatever lies there by now
        with self.log.open("a", encoding="utf-8") as file:
            for number in range(self.logged, step + 1):
                losses = {"training_loss": training.get(str(number)), "held_out_loss": measured.get(number)}
                known = {name: loss for name, loss in losses.items() if loss is not None}
                file.write(json.dumps({"step": number, **known}) + "\n")
        self.logged = step + 1

    def last(self, history: History) -> None:
        """Print the row of the last step, where it is not one of those at which the loss is measured anyway."""
        for step, loss in list(zip(history.epochs, history.losses, strict=True))[-1:]:
            if step > self.rows[-1][0]:
                self._check_own(step)
                self.measured(step, loss)

    def _check_own(self, step: int) -> None:
        """Refuse a training whose checkpoint another process wrote after it was read: no row would be right."""
        if step != self.loss.step:
            raise CheckpointError(
                f"the training is at step {step} of its checkpoint, expected step {self.loss.step}: another process "
                "trains with the same checkpoint"
            )

    def measured(self, step: int, held_out: float) -> None:
        """Print a row of this run."""
        new, now = step - self.since_step, time.perf_counter()
        speed = remaining = ""
        if new:
            took = self.loss.ended - self.since
            self.spent += took
            self.measuring = now - self.loss.ended
            self.since, self.since_step = now, step
            speed = f"{self.tokens * new / took:,.0f}"
            remaining = duration(self._remaining(step, self.spent / (step - self.done)))
        self._row(step, self.loss.at(step), held_out, speed, remaining)
        self.note(step)

    def _remaining(self, step: int, a_step: float) -> float:
        """Return the seconds that the steps after this one take, and measuring the loss at the rows to come."""
        return (self.steps - step) * a_step + rows_to_come(self.steps, step) * self.measuring

    def _row(self, step: int, training: float, held_out: float, speed: str = "", remaining: str = "") -> None:
        self.rows.append((step, training, held_out))
        mean = "" if math.isnan(training) else f"{training:.3f}"
        self._write(f"{step:4}  {mean:>8}  {held_out:13.3f}  {speed:>8}  {remaining:>9}".rstrip())

    def _write(self, line: str) -> None:
        """Print a line now, above the progress bar where there is one."""
        write_line(line)
        self.written = time.perf_counter()

    def lowest(self) -> tuple[int, float] | None:
        """Return the step with the lowest held-out loss, and that loss; None where the last one's is as low."""
        step, _, loss = min(self.rows, key=lambda row: round(row[2], 3))
        return None if round(loss, 3) == round(self.rows[-1][2], 3) else (step, loss)


def write_line(line: str) -> None:
    """Print a line now, above the progress bar where there is one."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def rows_to_come(steps: int, step: int) -> int:
    """Return how many times the loss is measured after a step: at every row, and behind the last step."""
    return math.ceil(steps / LOG_EVERY) - step // LOG_EVERY if step < steps else 0


def duration(seconds: float) -> str:
    """Return a time in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
