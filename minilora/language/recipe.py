"""What a fine-tuning is to be: each option of ``minilora finetune`` once, with its default and its help.

The command's parser is made of these fields (`minilora.cli.finetune`), and `minilora.language.finetune` does what they
say. Nothing here needs NumPy, so that help comes at once.
"""

# ruff: noqa: RUF009  `option` returns a field

from __future__ import annotations

import argparse
import math
import os
import re
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from typing import Any

SMALL_MODEL = 10_000_000
"""Parameters up to which a model is a small one."""
FITTING: dict[str, tuple[Any, Any]] = {"steps": (300, 80), "batch_size": (16, 4), "lr": (3e-3, 1e-3)}
"""What fits a small model, tried on glassllm's 0.85 million parameters, and a larger one, on SmolLM2's 135 million."""
EVAL_EVERY, EVAL_SHARE = 20, 0.2
"""The held-out loss is measured each so many steps, or a multiple of them: it takes at most this share of the time."""
LOG_EVERY = 20
"""Steps from one row to the next."""
FORWARD = 0.4
"""The share of a forward in the time of a step."""
ADAPTER: dict[str, Any] = {"target_modules": "all-linear", "rank": 8, "alpha": 16.0}
"""The defaults of a new adapter; one that goes on has its own."""


def fitting(numbers: int) -> dict[str, Any]:
    """Return the settings that fit a model of so many parameters."""
    return {name: larger if numbers > SMALL_MODEL else small for name, (small, larger) in FITTING.items()}


def names(text: str) -> list[str]:
    """Read what ``--target-parameters`` takes."""
    return [name.strip() for name in text.split(",")]


def names_or_expression(text: str) -> list[str] | str:
    """Read what ``--target-modules`` takes: names, maybe none, or one regular expression, or all-linear."""
    if not text:
        return []
    are_names = text != "all-linear" and all(re.fullmatch(r"[\w.]+", name) for name in names(text))
    return names(text) if are_names else text


def share_or_path(text: str) -> float | Path:
    """Read what ``--valid`` takes."""
    if not text:  # of a variable that is not set
        raise argparse.ArgumentTypeError("the name is empty")
    try:
        return float(text)
    except ValueError:
        return Path(text)


def steps_or_share(text: str) -> int | float:
    """Read what ``--warmup`` takes."""
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        value = -1
    if not 0 <= value < (1 if "." in text else math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of steps nor a share below 1, such as 0.1")
    return value


def option(
    help: str = "", metavar: str | None = None, *, default: Any = None, type: Any = None,
    choices: list[str] | None = None, same: bool = False, **span: Any,
) -> Any:  # fmt: skip
    """Return a field with what the parser needs, and with the span of its numbers, as `minilora.checks` has it.

    A training that goes on must have its value where it says `same`.
    """
    said = {"help": help, "metavar": metavar, "type": type, "choices": choices, "same": same, "span": span}
    return field(default=default, metadata=said)


OPTION_GROUPS = {
    "data": ("text", "valid", "eval_rows", "system", "skip_bad", "length"),
    "model and adapter": (
        *("model", "adapter", "target_modules", "target_parameters", "rank", "alpha", "use_rslora", "use_dora", "init"),
    ),
    "training": (
        *("steps", "epochs", "batch_size", "lr", "schedule", "warmup", "max_grad_norm", "weight_decay", "dropout"),
        *("eval_every", "log_every", "keep_best", "seed"),
    ),
    "memory and speed": ("micro_batch", "recompute", "workers", "dtype", "quantize", "backend", "anyway"),
    "files": ("save", "overwrite", "checkpoint", "log", "plot"),
}
"""The fields of a recipe, as the help groups them."""


def _by_size(name: str) -> str:
    small, larger = FITTING[name]
    return f"default: {small}; {larger} for a model of more than {SMALL_MODEL // 1_000_000} million parameters"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A fine-tuning as it was asked for."""

    text: Path = option("a text file in UTF-8, or a .jsonl file of examples", "TEXT", default=MISSING, type=Path)
    save: Path = option("write the adapter there, in PEFT's layout", "DIR", default=MISSING, type=Path)
    overwrite: bool = option(
        "replace an adapter that the folder of --save holds, a stopped training of other options, and the files of "
        "--log and --plot",
        default=False,
    )
    model: Path | None = option()  # glassllm's where there is none
    target_modules: str | list[str] | None = option(
        "what to adapt: names such as q_proj,v_proj, one regular expression for whole paths, or all-linear "
        f"(default: {ADAPTER['target_modules']})",
        "NAMES", type=names_or_expression,
    )  # fmt: skip
    target_parameters: list[str] | None = option(
        "of a mixture of experts, besides: arrays such as mlp.experts.gate_up_proj,mlp.experts.down_proj, whose "
        'experts get an adapter each, or mlp.gate.weight, the router; with --target-modules "" they alone are adapted',
        "NAMES", type=names,
    )  # fmt: skip
    rank: int | None = option(
        f"rank of each adapter (default: {ADAPTER['rank']})", "R", type=int, same=True, at_least=1
    )
    alpha: float | None = option(
        f"strength of the update, which is scaled by alpha / rank (default: {ADAPTER['alpha']})", type=float, same=True
    )
    use_rslora: bool = option("scale the update by alpha / sqrt(rank) (rank-stabilised LoRA)", default=False, same=True)
    use_dora: bool = option("train the length of each row of a weight apart (DoRA)", default=False, same=True)
    init: str = option(
        "start at zero, or from the leading singular vectors of the weights (PiSSA), which writes twice the rank",
        default="lora", choices=["lora", "pissa"], same=True,
    )  # fmt: skip
    adapter: Path | None = option(
        "go on from an adapter of this model, in the place of a new one: its rank, alpha and layers are that adapter's",
        "DIR", type=Path,
    )  # fmt: skip
    dropout: float = option(
        "in a step, drop each entry of an adapter's input with the probability P",
        "P", default=0.0, type=float, same=True, above=0, below=1, or_equal=True,
    )  # fmt: skip
    epochs: float | None = option(
        "pass through all windows or examples E times, in place of --steps: each time in a new order, every one once; "
        "where the batch size does not divide their number, the last batch of a pass is smaller",
        "E", type=float, above=0, below=1e9,
    )  # fmt: skip
    valid: float | Path | None = option(
        "measure the loss on another file, or hold out another share than a tenth, such as 0.2",
        "FILE|SHARE", type=share_or_path,
    )  # fmt: skip
    skip_bad: Path | None = option(
        "go on without the lines of a .jsonl file that cannot be used, and write them there", "FILE", type=Path
    )
    eval_rows: int | None = option(
        "measure the loss on N of the windows or examples that are held out, evenly spread (default: on all)",
        "N", type=int, same=True, at_least=1,
    )  # fmt: skip
    system: str | None = option(
        "put this system message before each chat that has none. It is kept with the adapter, for generate and "
        "evaluate; so is one with which all chats begin",
        "TEXT", same=True,
    )  # fmt: skip
    steps: int | None = option(
        f"steps of Adam, through the same passes as those of --epochs ({_by_size('steps')})", "N", type=int, at_least=1
    )
    batch_size: int | None = option(
        f"windows of the text, or examples, of each step ({_by_size('batch_size')})",
        "N", type=int, same=True, at_least=1,
    )  # fmt: skip
    micro_batch: int | None = option(
        "windows, or examples as long as the longest, computed at a time; their gradients add up to the batch's: the "
        "same step with less memory (default: half of the batch)",
        "N", type=int, at_least=1,
    )  # fmt: skip
    recompute: bool = option(
        "keep only the input of each of the model's layers, and compute the layer once more when its gradients are due "
        "(gradient checkpointing): the same step with less memory and a further forward",
        default=False,
    )
    workers: int | None = option(
        "parts of a batch (see --micro-batch) that are computed at once, each on a core: 2 by default where there are "
        "two cores, 1 on a GPU. The result is the same to the last bit",
        "N", type=int, at_least=1,
    )  # fmt: skip
    length: int | None = option(
        "tokens in a window (default: 128); longer examples are cut (default: the longest, as far as memory has room)",
        "N", type=int, same=True, at_least=1,
    )  # fmt: skip
    lr: float | None = option(f"Adam's step length ({_by_size('lr')})", type=float, same=True, above=0)
    schedule: str = option(
        "how the step length falls to the end of the training: not, along a line, or along a half cosine",
        default="constant", choices=["constant", "linear", "cosine"], same=True,
    )  # fmt: skip
    warmup: int | float = option(
        "steps at the start in which the step length grows, or a share of all steps, such as 0.1",
        "N|SHARE", default=0, type=steps_or_share, same=True,
    )  # fmt: skip
    max_grad_norm: float | None = option(
        "shorten a step's gradient to the length C, over all adapters together, where it is longer (default: do not)",
        "C", type=float, same=True, above=0,
    )  # fmt: skip
    weight_decay: float = option(
        "in each step, make each number of the adapters smaller by the share LR times W of it, as AdamW does",
        "W", default=0.0, type=float, same=True, above=0, or_equal=True,
    )  # fmt: skip
    seed: int = option("seed of the adapters' start and the batches", "N", default=0, type=int, same=True, at_least=0)
    dtype: str = option("type of all arrays", default="float32", choices=["float32", "float64"], same=True)
    quantize: str | None = option(same=True)
    backend: str | None = option()
    checkpoint: Path | None = option(
        "save the training's state there after every step; the same command goes on from it, also to more --steps "
        "(default: DIR.checkpoint beside the folder of --save, now and then, and removed at the end)",
        "FILE", type=Path,
    )  # fmt: skip
    eval_every: int | None = option(
        f"measure the held-out loss each N steps, besides before the first and after the last (default: {EVAL_EVERY}, "
        "or so many times that as measuring takes no more than about a fifth of the time of the steps)",
        "N", type=int, same=True, at_least=1,
    )  # fmt: skip
    log_every: int = option(
        "print a row each N steps, also where the held-out loss is not measured",
        "N", default=LOG_EVERY, type=int, at_least=1,
    )  # fmt: skip
    keep_best: bool = option(
        "save the adapter of the step with the least held-out loss of those measured, in the place of the last step's",
        default=False, same=True,
    )  # fmt: skip
    anyway: bool = option("train even if that needs more memory than is free", default=False)
    log: Path | None = option(
        "write a line of JSON there for each step: the loss of its own batch, the length of its gradient, and the "
        "held-out loss if it is measured",
        "FILE", type=Path,
    )  # fmt: skip
    plot: Path | None = option(
        "draw the training loss, each mean over its steps, and the held-out loss (.png, .svg, .pdf)", "FILE", type=Path
    )

    @property
    def kept_in(self) -> Path:
        """The file that keeps the training: that of --checkpoint, or one beside the adapter while it is not done."""
        save = self.save if self.save.name not in ("", "..") else os.path.abspath(self.save)
        return self.checkpoint or Path(f"{save}.checkpoint")

    def resolved(self, numbers: int) -> ResolvedRecipe:
        """Return the recipe with what fits a model of so many parameters in the place of what was not given."""
        usual = {name: value for name, value in fitting(numbers).items() if getattr(self, name) is None}
        return ResolvedRecipe(**vars(replace(self, **usual)))


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe(Recipe):
    """A recipe in which nothing is open, but for the steps that epochs of data not read yet take."""

    steps: int
    batch_size: int
    lr: float
    workers: int

    def for_rows(self, rows: int) -> ResolvedRecipe:
        """Return it for so many rows of data: an epoch has as many steps as there are batches in them."""
        steps = self.steps if self.epochs is None else math.ceil(self.epochs * math.ceil(rows / self.batch_size) - 1e-9)
        return replace(self, steps=steps)

    def measured_each(self, rows: int) -> int:
        """Return the number of steps between two measurements of the held-out loss, of so many rows."""
        usual = EVAL_EVERY * math.ceil(self.steps_of_measuring(rows) / EVAL_SHARE / EVAL_EVERY)
        return self.eval_every or usual

    def steps_of_measuring(self, rows: int) -> float:
        """Return how many steps take as long as measuring so many rows, which takes a forward of each."""
        return rows * FORWARD / self.batch_size

    @property
    def part_rows(self) -> int:
        """How many rows of the full width a part of a batch may have."""
        return min(self.micro_batch or math.ceil(self.batch_size / 2), self.batch_size)


def option_name(name: str) -> str:
    """Return a field's name as one types it."""
    return f"--{name.replace('_', '-')}"
