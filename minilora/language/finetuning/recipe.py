"""What a fine-tuning is to be: the text, the model, the adapter, the steps, and where the result goes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from ...checks import check_integer, check_number
from ...files.adapters import check_adapter_target
from ...files.atomic import refuse_inputs, replaceable
from ...files.checkpoint import check_place
from ...files.peft.adapterconfig import CONFIG_NAME, MAX_ALPHA, MIN_ALPHA
from ...files.peft.adapterfolder import WEIGHTS_NAME
from ...schedule import Schedule
from .defaults import fitting


@dataclass(frozen=True)
class Recipe:
    """A fine-tuning as it was asked for, by the names of the options of ``minilora finetune``."""

    text: Path  # a text, or a .jsonl file of examples
    save: Path  # where the adapter goes
    model: Path | None  # glassllm's where there is none
    target_modules: str | list[str] | None  # this and the next three are None where the adapter goes on from another
    target_parameters: list[str] | None
    rank: int | None
    alpha: float | None
    steps: int | None  # this and two more are those that fit the model, where they are not given: see `settled`
    batch_size: int | None
    micro_batch: int | None  # half of the batch where it is not given
    length: int | None  # that of the longest example, or of a window, where it is not given
    lr: float | None
    seed: int
    dtype: str
    quantize: str | None
    checkpoint: Path | None
    overwrite: bool = False  # an adapter that lies where this one goes
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "lora"
    epochs: float | None = None  # in the place of steps
    log: Path | None = None
    valid: float | Path | None = None  # the share that is held out, or a file to measure the loss on
    schedule: str = "constant"  # how the rate falls
    warmup: int | float = 0  # steps, or below 1 a share of them, in which the rate grows
    dropout: float = 0.0
    keep_best: bool = False  # whether the step of the least held-out loss is saved, and not the last
    adapter: Path | None = None  # one to go on from

    def check(self) -> None:
        """Refuse numbers out of range and places that cannot be written, before anything is read."""
        for name in ("rank", "steps", "batch_size", "micro_batch", "length"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), at_least=1)
        if self.epochs is not None:
            check_number("epochs", self.epochs, above=0)
            if self.steps is not None:
                raise ValueError("--steps and --epochs both say how long to train, expected one of them")
        if isinstance(self.valid, float) and not 0 < self.valid <= 0.5:
            raise ValueError(f"valid must be a share above 0 and at most 0.5, or a file, got {self.valid}")
        check_integer("seed", self.seed, at_least=0)
        if self.alpha is not None:
            check_number("alpha", self.alpha, above=MIN_ALPHA, below=MAX_ALPHA)
        if self.lr is not None:
            check_number("lr", self.lr, above=0)
        if self.steps is not None:
            rates(self.schedule, self.steps, self.warmup)
        check_number("dropout", self.dropout, above=0, below=1, or_equal=True)
        self._check_adapter()
        check_adapter_target(self.save)
        self._check_free()
        save = _target(self.save)
        if self.model is not None and save == _target(self.model):
            raise ValueError(f"save {str(self.save)!r} is the model's folder, expected one of the adapter's own")
        if self.checkpoint is not None:
            file = _target(self.checkpoint)
            if file in (save, *save.parents, save / WEIGHTS_NAME, save / CONFIG_NAME):
                raise ValueError(f"the checkpoint {str(file)!r} would lie where the adapter goes: name another file")
            check_place(self.checkpoint)
        if self.log is not None:
            self._check_log(save)

    def _check_adapter(self) -> None:
        """Refuse what no adapter can be: options that exclude each other, or those of one that goes on."""
        if self.adapter is not None:
            options = ("rank", "alpha", "target_modules", "target_parameters", "use_rslora", "use_dora")
            names = [f"--{name.replace('_', '-')}" for name in options if getattr(self, name) not in (None, False)]
            names += ["--init"] if self.init != "lora" else []
            if names:
                raise ValueError(f"--adapter brings what it is with it, so leave {' and '.join(names)} out")
        pairs = (
            ("--target-parameters", self.target_parameters, "--use-dora", self.use_dora, ", as in PEFT"),
            ("--target-parameters", self.target_parameters, "--init pissa", self.init != "lora", ", as in PEFT"),
            ("--dropout", self.dropout, "--use-dora", self.use_dora, ": there is none before such an adapter here"),
            ("--dropout", self.dropout, "--target-parameters", self.target_parameters, ", as in PEFT"),
        )
        for name, value, other, other_value, why in pairs:
            if value and other_value:
                raise ValueError(f"{name} takes no {other}{why}")

    def _check_log(self, save: Path) -> None:
        """Refuse a log that could not be written, or would replace what is read or saved."""
        log = Path(str(self.log))
        file = _target(log)
        inputs: dict[str, object] = {"the text": self.text, "the text to measure the loss on": self.valid}
        inputs |= {"the checkpoint": self.checkpoint, "the model": self.model}
        files = [(path, what) for what, path in inputs.items() if isinstance(path, Path)]
        for folder, what in ((self.model, "a file of the model"), (self.adapter, "a file of the adapter")):
            files += [(path, what) for path in folder.rglob("*")] if folder is not None else []
        refuse_inputs("the log", log, files)
        if file in {save, *save.parents, save / WEIGHTS_NAME, save / CONFIG_NAME}:
            raise ValueError(f"the log {str(self.log)!r} would lie where the adapter goes: name another file")
        replaceable(log)
        if not os.access(file.parent, os.W_OK):
            raise ValueError(f"the log {str(self.log)!r} cannot be written there")

    def _check_free(self) -> None:
        """Refuse a folder that holds an adapter, unless it may be replaced or the training goes on."""
        goes_on = self.checkpoint is not None and self.checkpoint.exists()
        names = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if os.path.lexists(self.save / name)]
        if names and not self.overwrite and not goes_on:
            raise ValueError(f"save {str(self.save)!r} holds an adapter: name another folder, or say --overwrite")

    def settled(self, numbers: int) -> Settled:
        """Return the recipe with what fits a model of so many parameters in the place of what was not given."""
        usual = {name: value for name, value in fitting(numbers).items() if getattr(self, name) is None}
        return Settled(**vars(replace(self, **usual)))


@dataclass(frozen=True)
class Settled(Recipe):
    """A recipe in which nothing is open, but for the steps that epochs of data not read yet take."""

    steps: int
    batch_size: int
    lr: float

    def of(self, rows: int, length: int) -> Settled:
        """Return it for so many rows of data, of a length: an epoch has as many steps as there are batches in them."""
        steps = self.steps if self.epochs is None else math.ceil(self.epochs * rows / self.batch_size)
        return replace(self, steps=steps, length=length)

    def rates(self) -> Schedule | None:
        """Return how the rate changes from step to step; None where it does not."""
        return rates(self.schedule, self.steps, self.warmup)


def rates(decay: str, steps: int, warmup: int | float) -> Schedule | None:
    """Return a schedule of so many steps, of which some or a share are the warmup; None where the rate stays."""
    if decay == "constant" and not warmup:
        return None
    schedule = Schedule(decay, steps, math.ceil(warmup * steps) if warmup < 1 else int(warmup))
    # Behind the warmup of a constant rate no step is the last: such a training may go on to more of them.
    return replace(schedule, steps=schedule.warmup + 1) if decay == "constant" else schedule


def _target(path: Path) -> Path:
    """Return where a path leads. `Path.resolve` says the same, and fails on a circle of links before Python 3.13."""
    return Path(os.path.realpath(path))
