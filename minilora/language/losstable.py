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
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from tqdm import tqdm

from ..checks import Array
from ..files.checkpoint import CheckpointError, Saved
from ..files.disk import replaceable, written_whole
from ..training import History, TrainingState

LOG_EVERY = 20
"""Steps from one measurement of the held-out loss to the next."""
QUIET = 60.0
"""Seconds without a row after which a line says how far it is."""


class Learned(TypedDict):
    """The training loss so far, as a checkpoint keeps it."""

    rows: dict[str, float]  # the mean of each row, by its step
    sum: float  # of the losses since the last row
    targets: int  # and their number
    steps: dict[str, float]  # the mean of each step
    norms: dict[str, float]  # the length of each step's gradient, before it is clipped


class LossTable:
    """The rows, printed as they are measured.

    Parameters
    ----------
    steps, done : int
        Of the whole training, and of a training that goes on those before.
    tokens : int
        In a step.
    learned : Learned, optional
        What the checkpoint of a training that goes on has.
    log : Path, optional
        A file that gets a line of JSON for each step, also for those before of a training that goes on.
    """

    def __init__(
        self, steps: int, done: int, tokens: int, learned: Learned | None = None, log: Path | None = None
    ) -> None:
        self.steps, self.done, self.tokens = steps, done, tokens
        self.learned: Learned = learned or {"rows": {}, "sum": 0.0, "targets": 0, "steps": {}, "norms": {}}
        self.step = done  # how many have noted their losses
        self.rows: list[tuple[int, float, float]] = []  # step, training loss (NaN where there is none), held-out loss
        self.row_step, self.row_time = done, 0.0  # where the last row was, and when
        self.step_time = 0.0  # when the last step's gradients were there
        self.spent = 0.0  # seconds of all steps up to the last row, without the measuring
        self.measuring = 0.0  # seconds that measuring the held-out loss took
        self.written = 0.0  # when the last line was printed
        self.log, self.logged = log, 0  # the steps that are in the log
        self.best_step: int | None = None  # whose parameters are saved, where that is not the last one

    def note(self, began: float, losses: Sequence[tuple[Array, Array]], norm: Array) -> None:
        """Note a step that began at a time: the loss and the targets of each of its parts, and its gradient's length.

        The parts may come in any order, from several threads: `math.fsum` is exact, so the mean has the same bits.
        """
        if self.step == self.done:
            self.row_time = began
        counted, learned = [(float(value), int(targets)) for value, targets in losses], self.learned
        total, number = math.fsum(value * targets for value, targets in counted), sum(n for _, n in counted)
        if self.step % LOG_EVERY == 0:
            learned["sum"], learned["targets"] = 0.0, 0
        self.step += 1
        learned["sum"] += total
        learned["targets"] += number
        if number:
            learned["steps"][str(self.step)] = total / number
        learned["norms"][str(self.step)] = float(norm)
        if self.step % LOG_EVERY == 0 and learned["targets"]:
            learned["rows"][str(self.step)] = learned["sum"] / learned["targets"]
        self.step_time = time.perf_counter()

    def each_step(self) -> list[tuple[int, float]]:
        """Return each step and the mean over its targets."""
        return [(int(step), loss) for step, loss in self.learned["steps"].items()]

    def training_loss(self, step: int) -> float:
        """Return the mean over the targets from the row before a step to the step; NaN where none was noted."""
        if step == self.step and self.learned["targets"]:
            return self.learned["sum"] / self.learned["targets"]
        return self.learned["rows"].get(str(step), math.nan)

    def print_head(self) -> None:
        """Print the names of the columns."""
        self._print("step  training  held-out loss  tokens/s  time left   (losses in nats a token)")

    def print_known_rows(self, before: float, seconds: float, saved: Saved | None) -> None:
        """Print what is known when the training begins: the untrained adapter's loss, and rows of a checkpoint."""
        self.measuring = seconds
        self._print_row(0, math.nan, before)
        for step, loss in zip(saved.epochs, saved.losses, strict=True) if saved else ():
            self._print_row(step, self.training_loss(step), loss)

    def on_step(self, state: TrainingState) -> None:
        """Print the row of a step at which the loss was measured; after the first step, how long it will take.

        Where a row takes long, print how far it is. This is the `report` of `train`.
        """
        step, now = state.epoch, time.perf_counter()
        self._check_own(step)
        if state.history.epochs[-1:] == [step]:
            self.print_row(step, state.history.losses[-1])
        elif step < self.steps:  # of the last step the held-out loss comes first
            self.write_log(step)
            remaining = self._remaining(step, self.spent + now - self.row_time)
            if step == self.done + 1:
                self._print(f"      going by step {step}, the other {self.steps - step} take about {remaining}")
            elif now - self.written > QUIET:
                loss = self.training_loss(step)
                self._print(f"      after step {step} the training loss is {loss:.3f}; about {remaining} left")

    def print_last_row(self, history: History) -> None:
        """Print the row of the last step, where it is not one of those at which the loss is measured anyway."""
        if history.epochs and history.epochs[-1] > self.rows[-1][0]:
            self._check_own(history.epochs[-1])
            self.print_row(history.epochs[-1], history.losses[-1])
        self.write_log(self.steps)  # also of a training that was done

    def print_row(self, step: int, held_out: float) -> None:
        """Print a row of this run."""
        new, now, speed, remaining = step - self.row_step, time.perf_counter(), "", ""
        if new:
            took = self.step_time - self.row_time
            self.spent += took
            self.measuring = now - self.step_time
            self.row_step, self.row_time = step, now
            speed = f"{self.tokens * new / took:,.0f}"
            remaining = self._remaining(step, self.spent)
        self._print_row(step, self.training_loss(step), held_out, speed, remaining)
        self.write_log(step)

    def write_log(self, step: int) -> None:
        """Write the steps up to this one into the log, with the losses that are known of each.

        The file begins anew with the first step of this run. Where it cannot be written, the training goes on without.
        """
        if self.log is None:
            return
        held_out, lines = {row[0]: row[2] for row in self.rows}, []
        for number in range(self.logged, step + 1):
            learned, norm = (self.learned[name].get(str(number)) for name in ("steps", "norms"))
            numbers = {"training_loss": learned, "held_out_loss": held_out.get(number), "grad_norm": norm}
            known = {name: value for name, value in numbers.items() if value is not None}
            lines.append(json.dumps({"step": number, **known}) + "\n")
        try:
            if not self.logged:
                with written_whole(self.log) as new:
                    new.write("".join(lines).encode())
            else:
                replaceable(self.log)  # whatever lies there by now
                with self.log.open("a", encoding="utf-8") as file:
                    file.write("".join(lines))
        except (OSError, ValueError) as error:
            warnings.warn(f"the log ends before step {self.logged}, and the training goes on: {error}", stacklevel=2)
            self.log = None
        self.logged = step + 1

    def _check_own(self, step: int) -> None:
        """Require that no other process wrote the checkpoint after it was read: no row would be right."""
        if step != self.step:
            raise CheckpointError(
                f"the training is at step {step} of its checkpoint, expected step {self.step}: another process trains "
                "with the same checkpoint"
            )

    def _remaining(self, step: int, spent: float) -> str:
        """Return how long the steps after this one take, and measuring the loss at the rows to come."""
        rows = math.ceil(self.steps / LOG_EVERY) - step // LOG_EVERY if step < self.steps else 0
        return duration((self.steps - step) * spent / (step - self.done) + rows * self.measuring)

    def _print_row(self, step: int, training: float, held_out: float, speed: str = "", remaining: str = "") -> None:
        self.rows.append((step, training, held_out))
        mean = "" if math.isnan(training) else f"{training:.3f}"
        self._print(f"{step:4}  {mean:>8}  {held_out:13.3f}  {speed:>8}  {remaining:>9}".rstrip())

    def _print(self, line: str) -> None:
        """Print a line now, above the progress bar where there is one."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
        self.written = time.perf_counter()


def duration(seconds: float) -> str:
    """Return a time in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
