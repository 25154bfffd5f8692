"""The table that fine-tuning prints: losses, speed and time left.

    step  training  held-out loss  tokens/s  time left
       0                    5.291
      20     4.548          4.131    11,903       45 s   of steps 1-20
      40     3.801                   11,911       41 s   of steps 21-40

The training loss needs no extra computation: it is the mean, over all targets of the steps in a row, of the losses that
are computed with the gradients. The held-out loss may be measured less often than a row is printed.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from tqdm import tqdm

from ..checks import Array
from ..files.checkpoint import Saved
from ..files.disk import check_replaceable, written_whole
from ..state import History, TrainingState
from .recipe import LOG_EVERY

QUIET = 60.0
"""Without a progress bar, a line reports the progress after this many seconds without output."""
LARGEST = sys.float_info.max
LOG_PATTERN = rb'\{"step": 0, "'
"""A pattern for the start of a log."""
Losses: TypeAlias = dict[str, tuple[float, int, float]]
"""Each step's summed loss, number of targets, and gradient norm before clipping, by the step's number."""


def shown_parts(parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield each part of the data, given as row indices, and show the progress as a bar or as lines."""
    rows, taken, written = sum(map(len, parts)), 0, time.perf_counter()
    with tqdm(total=rows, desc="measuring", unit="row", disable=None, leave=False) as bar:
        for part in parts:
            yield part
            taken += len(part)
            bar.update(len(part))
            if bar.disable and time.perf_counter() - written > QUIET:
                print(f"      measured {taken:,} of {rows:,}", flush=True)
                written = time.perf_counter()


class LossTable:
    """The loss table, printed row by row, and the log file."""

    def __init__(
        self, steps: int, done: int, tokens: float, losses: Losses | None = None, log: Path | None = None, *,
        log_every: int = LOG_EVERY, eval_every: int = LOG_EVERY,
    ) -> None:  # fmt: skip
        self.steps, self.done = steps, done  # in all, and before this run if it was resumed
        self.tokens = tokens  # the mean number of tokens in a row of the data
        self.log_every, self.eval_every = log_every, eval_every
        self.losses: Losses = {} if losses is None else losses  # including those from a checkpoint
        self.step = done  # the last step whose losses are recorded
        self.rows: list[tuple[int, float, float]] = []  # step, training loss, held-out loss; NaN if missing
        self.row_step, self.row_time = done, 0.0  # the step and time of the last row
        self.row_tokens = 0.0  # the number of tokens since that row
        self.step_time = 0.0  # when the last step's gradients were computed
        self.spent = 0.0  # the seconds that all steps up to the last row took, without evaluation
        self.eval_time = 0.0  # the seconds that the last evaluation took
        self.written = 0.0  # when the last line was printed
        self.log, self.logged = log, 0  # the number of steps in the log
        self.best_step: int | None = None  # the step whose parameters are saved, unless it is the last

    def note(self, began: float, losses: Sequence[tuple[Array, Array]], norm: Array, rows: int = 1) -> None:
        """Record a step: when it began, each part's loss and number of targets, the gradient norm, and its rows."""
        if self.step == self.done:
            self.row_time = began
        counted = [(float(value), int(targets)) for value, targets in losses]
        self.step += 1
        # Several threads add the parts in any order. `math.fsum` is exact, so the mean is bit-identical.
        total, number = math.fsum(value * targets for value, targets in counted), sum(n for _, n in counted)
        # Checkpoints are JSON, which has no infinity; the norm of float32 gradients overflows from 1e20 on.
        self.losses[str(self.step)] = (min(total, LARGEST), number, min(float(norm), LARGEST))
        self.row_tokens += rows * self.tokens
        self.step_time = time.perf_counter()

    def each_step(self) -> list[tuple[int, float]]:
        """Return each step's number and its mean loss over all targets."""
        return [(int(step), total / number) for step, (total, number, _) in self.losses.items() if number]

    def training_loss(self, step: int) -> float:
        """Return the mean loss over all targets since the last row before a step; NaN if there are none."""
        known = [self.losses[str(s)] for s in range(self._row_before(step) + 1, step + 1) if str(s) in self.losses]
        targets = sum(number for _, number, _ in known)
        return math.fsum(total for total, _, _ in known) / targets if targets else math.nan

    def _row_before(self, step: int) -> int:
        """Return the step of the last row before a step."""
        return max((row[0] for row in self.rows if row[0] < step), default=0)

    def print_head(self) -> None:
        """Print the names of the columns."""
        self.show("step  training  held-out loss  tokens/s  time left   (losses in nats a token)")

    def print_known_rows(self, before: float, seconds: float, saved: Saved | None) -> None:
        """Print the rows that are known before training starts: the initial loss, and the rows in a checkpoint."""
        self.eval_time = seconds
        self._print_row(0, math.nan, before)
        held_out = dict(zip(saved.epochs, saved.losses, strict=True)) if saved else {}
        for step in range(1, self.done + 1):
            if step in held_out or (step % self.log_every == 0 and step < self.steps):
                self._print_row(step, self.training_loss(step), held_out.get(step, math.nan))

    def on_step(self, state: TrainingState) -> None:
        """Print a row or the time left, if one is due. `train` calls this after each step, as its `report`."""
        step, now = state.epoch, time.perf_counter()
        if state.history.epochs[-1:] == [step]:
            self.print_row(step, state.history.losses[-1])
        elif step < self.steps:  # the last row waits for its held-out loss
            remaining = self._remaining(step, self.spent + now - self.row_time)
            if step % self.log_every == 0:
                self.print_row(step)
            elif step == self.done + 1:
                self.show(f"      judging by step {step}, about {remaining} for the remaining {self.steps - step}")
            elif now - self.written > QUIET and not (sys.stderr.isatty() and sys.stdout.isatty()):
                loss = self.training_loss(step)
                self.show(f"      after step {step}, the training loss is {loss:.3f}, with about {remaining} left")
            self.write_log(step)

    def print_last_row(self, history: History) -> None:
        """Print the row of the last step, unless it is there already."""
        if history.epochs and history.epochs[-1] > self.rows[-1][0]:
            self.print_row(history.epochs[-1], history.losses[-1])
        self.write_log(self.steps)  # even if no step was left to run

    def print_row(self, step: int, held_out: float = math.nan) -> None:
        """Print the row of a step of this run, with its speed and the time left."""
        now, speed, remaining = time.perf_counter(), "", ""
        if step > self.row_step:
            took = self.step_time - self.row_time
            self.spent += took
            if held_out == held_out:
                self.eval_time = now - self.step_time
            speed = f"{self.row_tokens / took:,.0f}"
            self.row_step, self.row_time, self.row_tokens = step, now, 0.0
            remaining = self._remaining(step, self.spent)
        self._print_row(step, self.training_loss(step), held_out, speed, remaining)
        self.write_log(step)

    def write_log(self, step: int) -> None:
        """Append the steps up to this one to the log; the first call of a run rewrites the log from the start."""
        if self.log is None:
            return
        held_out, lines = {row[0]: row[2] for row in self.rows}, []
        for number in range(self.logged, step + 1):
            total, targets, norm = self.losses.get(str(number), (0.0, 0, math.nan))
            numbers = {
                "training_loss": total / targets if targets else math.nan,
                "held_out_loss": held_out.get(number, math.nan),
                "grad_norm": norm,
            }
            known = {name: value for name, value in numbers.items() if value == value}
            lines.append(json.dumps({"step": number, **known}) + "\n")
        try:
            if not self.logged:
                with written_whole(self.log) as new:
                    new.write("".join(lines).encode())
            else:
                check_replaceable(self.log)  # it may have been replaced meanwhile
                with self.log.open("a", encoding="utf-8") as file:
                    file.write("".join(lines))
        except (OSError, ValueError) as error:
            warnings.warn(f"the log ends before step {self.logged}, but training continues: {error}", stacklevel=2)
            self.log = None
        self.logged = step + 1

    def _remaining(self, step: int, spent: float) -> str:
        """Return an estimate of the time for the remaining steps and evaluations, in words."""
        measured = math.ceil(self.steps / self.eval_every) - step // self.eval_every if step < self.steps else 0
        return duration((self.steps - step) * spent / (step - self.done) + measured * self.eval_time)

    def _print_row(self, step: int, training: float, held_out: float, speed: str = "", remaining: str = "") -> None:
        """Add a row and print it."""
        first = self._row_before(step) + 1
        self.rows.append((step, training, held_out))
        mean, loss = ("" if math.isnan(number) else f"{number:.3f}" for number in (training, held_out))
        steps = f"   of steps {first}-{step}" if first < step else f"   of step {step}"
        row = f"{step:4}  {mean:>8}  {loss:>13}  {speed:>8}  {remaining:>9}"
        self.show(row.rstrip() if math.isnan(training) else row + steps)

    def show(self, line: str) -> None:
        """Print a line and flush it, above the progress bar if there is one."""
        tqdm.write(line)
        sys.stdout.flush()
        self.written = time.perf_counter()


def duration(seconds: float) -> str:
    """Return a duration in words, such as "45 s" or "1 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
