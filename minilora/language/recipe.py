"""The options of ``minilora finetune``, each defined once with its default and its help.

The command's parser is built from these fields (`minilora.cli.finetune`), and `minilora.language.finetune` carries them
out. Nothing here imports NumPy, so the help appears without delay.
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
"""The number of parameters up to which a model counts as small."""
SKIP_BAD_HELP = "skip unusable lines of a .jsonl file, and write them to this file, each with the reason"
"""The help of ``--skip-bad``, which evaluate has, too."""
SIZE_DEFAULTS: dict[str, tuple[Any, Any]] = {"steps": (300, 80), "batch_size": (16, 4), "lr": (3e-3, 1e-3)}
"""Defaults for a small and a larger model, tested on glassllm's 0.85 million parameters and on SmolLM2-135M."""
EVAL_EVERY, EVAL_SHARE = 20, 0.2
"""The held-out loss is measured every `EVAL_EVERY` steps, or less often to take at most this share of the time."""
LOG_EVERY = 20
"""The number of steps between two rows of the table."""
FORWARD_SHARE = 0.4
"""The forward pass's share of the time of a step."""
ADAPTER_DEFAULTS: dict[str, Any] = {"target_modules": "all-linear", "rank": 8, "alpha": 16.0}
"""The defaults of a new adapter; a continued adapter keeps its own values."""


def defaults_for(parameters: int) -> dict[str, Any]:
    """Return the default settings for a model with this number of parameters."""
    return {name: larger if parameters > SMALL_MODEL else small for name, (small, larger) in SIZE_DEFAULTS.items()}


def names(text: str) -> list[str]:
    """Parse the value of ``--target-parameters``."""
    return [name.strip() for name in text.split(",")]


def names_or_expression(text: str) -> list[str] | str:
    """Parse the value of ``--target-modules``: names (possibly none), one regular expression, or all-linear."""
    if not text:
        return []
    are_names = text != "all-linear" and all(re.fullmatch(r"[\w.]+", name) for name in names(text))
    return names(text) if are_names else text


def share_or_path(text: str) -> float | Path:
    """Parse the value of ``--valid``."""
    if not text:  # as from an unset shell variable
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        return float(text)
    except ValueError:
        return Path(text)


def steps_or_share(text: str) -> int | float:
    """Parse the value of ``--warmup``."""
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        value = -1
    if not 0 <= value < (1 if "." in text else math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of steps nor a share below 1, such as 0.1")
    return value


def option(
    help: str = "", metavar: str | None = None, *, default: Any = None, type: Any = None,
    choices: list[str] | None = None, same: bool = False, **bounds: Any,
) -> Any:  # fmt: skip
    """Return a dataclass field that carries its parser settings, and its bounds as keywords of `minilora.checks`.

    With `same`, a resumed run must have the same value.
    """
    settings = {"help": help, "metavar": metavar, "type": type, "choices": choices, "same": same, "bounds": bounds}
    return field(default=default, metadata=settings)


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
"""The fields of a recipe, grouped as in the help."""


def _by_size(name: str) -> str:
    small, larger = SIZE_DEFAULTS[name]
    return f"default: {small}; {larger} for a model of more than {SMALL_MODEL // 1_000_000} million parameters"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The options of a fine-tuning run, as the user gave them."""

    text: Path = option("a text file in UTF-8, or a .jsonl file of examples", "TEXT", default=MISSING, type=Path)
    save: Path = option("write the adapter to this folder, in PEFT's layout", "DIR", default=MISSING, type=Path)
    overwrite: bool = option(
        "replace an adapter in the folder of --save, an unfinished run with other options, and the files of --log, "
        "--plot and --skip-bad, but only what minilora wrote",
        default=False,
    )
    model: Path | None = option()  # None is glassllm's model
    target_modules: str | list[str] | None = option(
        "modules to adapt: names such as q_proj,v_proj, a regular expression that matches whole paths, or all-linear "
        f"(default: {ADAPTER_DEFAULTS['target_modules']})",
        "NAMES", type=names_or_expression,
    )  # fmt: skip
    target_parameters: list[str] | None = option(
        "weights of a mixture of experts to adapt as well, such as mlp.experts.gate_up_proj,mlp.experts.down_proj, "
        'with one adapter per expert, or mlp.gate.weight, the router; with --target-modules "" nothing else is adapted',
        "NAMES", type=names,
    )  # fmt: skip
    rank: int | None = option(
        f"rank of each adapter (default: {ADAPTER_DEFAULTS['rank']})", "R", type=int, same=True, at_least=1
    )
    alpha: float | None = option(
        f"strength of the update, which is scaled by alpha / rank (default: {ADAPTER_DEFAULTS['alpha']})",
        type=float, same=True,
    )  # fmt: skip
    use_rslora: bool = option("scale the update by alpha / sqrt(rank) (rank-stabilised LoRA)", default=False, same=True)
    use_dora: bool = option("train the norm of each row of a weight separately (DoRA)", default=False, same=True)
    init: str = option(
        "start with an update of zero, or from the leading singular vectors of the weights (PiSSA), which saves an "
        "adapter of twice the rank",
        default="lora", choices=["lora", "pissa"], same=True,
    )  # fmt: skip
    adapter: Path | None = option(
        "continue training this adapter instead of a new one; it determines rank, alpha and layers",
        "DIR", type=Path,
    )  # fmt: skip
    dropout: float = option(
        "in each step, drop each entry of an adapter's input with probability P",
        "P", default=0.0, type=float, same=True, above=0, below=1, or_equal=True,
    )  # fmt: skip
    epochs: float | None = option(
        "instead of --steps, make E passes over all windows or examples, each in a new order; the last batch of a pass "
        "is smaller if the batch size does not divide their number",
        "E", type=float, above=0, below=1e9,
    )  # fmt: skip
    valid: float | Path | None = option(
        "a file to measure the loss on, or the share of the data to hold out, such as 0.2 (default: a tenth)",
        "FILE|SHARE", type=share_or_path,
    )  # fmt: skip
    skip_bad: Path | None = option(SKIP_BAD_HELP, "FILE", type=Path)
    eval_rows: int | None = option(
        "measure the loss on N of the held-out windows or examples, evenly spaced (default: all)",
        "N", type=int, same=True, at_least=1,
    )  # fmt: skip
    system: str | None = option(
        "the system message of each chat that has none. It is saved with the adapter for generate and evaluate, as is "
        "a system message that all chats share",
        "TEXT", same=True,
    )  # fmt: skip
    steps: int | None = option(
        f"number of Adam steps, in the data order of --epochs ({_by_size('steps')})", "N", type=int, at_least=1
    )
    batch_size: int | None = option(
        f"windows of the text, or examples, per step ({_by_size('batch_size')})",
        "N", type=int, same=True, at_least=1,
    )  # fmt: skip
    micro_batch: int | None = option(
        "windows, or examples of full length, to process at a time; their gradients are summed, for the same step with "
        "less memory (default: half the batch)",
        "N", type=int, at_least=1,
    )  # fmt: skip
    recompute: bool = option(
        "gradient checkpointing: keep only each layer's input, and recompute the layer in the backward pass, for the "
        "same step with less memory and one more forward pass",
        default=False,
    )
    workers: int | None = option(
        "parts of a batch (see --micro-batch) to process in parallel, each on one core (default: 2, or 1 on a GPU or a "
        "single core); the result is bit-identical",
        "N", type=int, at_least=1,
    )  # fmt: skip
    length: int | None = option(
        "tokens in a window (default: 128); longer examples are truncated to it (default: the most that memory allows)",
        "N", type=int, same=True, at_least=1,
    )  # fmt: skip
    lr: float | None = option(f"Adam's learning rate ({_by_size('lr')})", type=float, same=True, above=0)
    schedule: str = option(
        "how the learning rate decays during training: not at all, linearly, or along a half cosine",
        default="constant", choices=["constant", "linear", "cosine"], same=True,
    )  # fmt: skip
    warmup: int | float = option(
        "steps of linear warmup, or a share of all steps, such as 0.1",
        "N|SHARE", default=0, type=steps_or_share, same=True,
    )  # fmt: skip
    max_grad_norm: float | None = option(
        "clip the gradient norm, over all adapters together, to C (default: no clipping)",
        "C", type=float, same=True, above=0,
    )  # fmt: skip
    weight_decay: float = option(
        "decoupled weight decay: each step shrinks the adapters' entries by the factor 1 - LR W, as in AdamW",
        "W", default=0.0, type=float, same=True, above=0, or_equal=True,
    )  # fmt: skip
    seed: int = option("seed of the adapters and the batches", "N", default=0, type=int, same=True, at_least=0)
    dtype: str = option("dtype of all arrays", default="float32", choices=["float32", "float64"], same=True)
    quantize: str | None = option(same=True)
    backend: str | None = option()
    checkpoint: Path | None = option(
        "save the training state to this file after every step; rerun the command, also with more --steps, to resume "
        "(default: DIR.checkpoint next to the folder of --save, written occasionally and removed at the end)",
        "FILE", type=Path,
    )  # fmt: skip
    eval_every: int | None = option(
        f"measure the held-out loss every N steps, before the first and after the last (default: {EVAL_EVERY}, or a "
        "multiple of it if that would take more than about a fifth of the time of the steps)",
        "N", type=int, at_least=1,
    )  # fmt: skip
    log_every: int = option(
        "print a row every N steps, even where the held-out loss is not measured",
        "N", default=LOG_EVERY, type=int, at_least=1,
    )  # fmt: skip
    keep_best: bool = option(
        "save the adapter of the step with the lowest held-out loss instead of the last step's", default=False
    )
    anyway: bool = option("train even if this needs more memory than is free", default=False)
    log: Path | None = option(
        "write one line of JSON per step to this file: the loss of its batch, its gradient norm, and the held-out loss "
        "if it is measured",
        "FILE", type=Path,
    )  # fmt: skip
    plot: Path | None = option(
        "plot the training loss, averaged between rows, and the held-out loss (.png, .svg, .pdf)", "FILE", type=Path
    )

    @property
    def checkpoint_path(self) -> Path:
        """The path of the checkpoint: --checkpoint, or a file next to the adapter, removed at the end of the run."""
        save = self.save if self.save.name not in ("", "..") else os.path.abspath(self.save)
        return self.checkpoint or Path(f"{save}.checkpoint")

    def resolved(self, parameters: int) -> ResolvedRecipe:
        """Return the recipe with the defaults for a model with this number of parameters filled in."""
        missing = {name: value for name, value in defaults_for(parameters).items() if getattr(self, name) is None}
        return ResolvedRecipe(**vars(replace(self, **missing)))


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe(Recipe):
    """A recipe with its defaults filled in; with --epochs, `for_rows` also sets the number of steps."""

    steps: int
    batch_size: int
    lr: float
    workers: int

    def for_rows(self, rows: int) -> ResolvedRecipe:
        """Return the recipe for this number of training rows; an epoch has one step per batch."""
        steps = self.steps if self.epochs is None else math.ceil(self.epochs * math.ceil(rows / self.batch_size) - 1e-9)
        return replace(self, steps=steps)

    def eval_interval(self, rows: int) -> int:
        """Return the number of steps between two measurements of the held-out loss on `rows` rows."""
        default = EVAL_EVERY * math.ceil(self.eval_cost(rows) / EVAL_SHARE / EVAL_EVERY)
        return self.eval_every or default

    def eval_cost(self, rows: int) -> float:
        """Return the time of a measurement on `rows` rows in units of a step's: it needs only the forward pass."""
        return rows * FORWARD_SHARE / self.batch_size

    @property
    def part_rows(self) -> int:
        """The largest number of full-width rows in a part of a batch."""
        return min(self.micro_batch or math.ceil(self.batch_size / 2), self.batch_size)


def option_name(name: str) -> str:
    """Return a field's name as typed on the command line."""
    return f"--{name.replace('_', '-')}"
