"""``minilora finetune``: train an adapter of a language model on a text or on examples."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from ..language.recipe import ADAPTER, OPTION_GROUPS, Recipe, option_name
from . import console

SHARED_OPTIONS = {"model": console.add_model, "quantize": console.add_quantize, "backend": console.add_backend}
"""Options shared with other commands."""


def add(commands: Any) -> None:
    """Add the command to the parser: an option for each field of a recipe, in groups."""
    parser = commands.add_parser(
        "finetune",
        help="train an adapter of a language model on a text, or on examples",
        description=(
            "Freeze a Llama-type language model, put LoRA beside the layers that you name, and train it to predict the "
            "next token of a text, or of examples. Every tenth window of the text, or example, is held out to measure "
            'the loss. Each line of a .jsonl file is an example: {"prompt": ..., "completion": ...}, where the loss '
            'counts the completion; {"messages": [{"role": ..., "content": ...}, ...]}, written by the model\'s chat '
            'template, where it counts the assistant\'s turns; or {"text": ...}.'
        ),
        epilog="example: minilora finetune notes.txt --model smollm2 --save my-notes",
        formatter_class=console.Defaults,
    )
    by_name = {field.name: field for field in fields(Recipe)}
    for title, names in OPTION_GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            _add_option(group, by_name[name])
    parser.set_defaults(command=run, before_numpy=console.limit_blas)


def _add_option(group: Any, field: Field[Any]) -> None:
    """Add the option of a field."""
    said, required = field.metadata, field.default is MISSING
    if field.name in SHARED_OPTIONS:
        SHARED_OPTIONS[field.name](group)
    elif field.default is False:
        group.add_argument(option_name(field.name), action="store_true", help=said["help"])
    else:
        read = console.path if said["type"] is Path else said["type"]
        more = {"metavar": said["metavar"], "choices": said["choices"], "type": read, "help": said["help"]}
        if field.name == "text":
            group.add_argument("text", **more)
        else:
            default = None if required else field.default
            group.add_argument(option_name(field.name), default=default, required=required, **more)


def run(options: argparse.Namespace) -> int:
    """Train, print the losses as they are measured, and write the adapter."""
    from ..fast import keep_pages
    from ..language.finetune import finetune, inputs, written_beside

    asked = {field.name: getattr(options, field.name) for field in fields(Recipe)}
    if options.adapter is None:
        asked |= {name: usual for name, usual in ADAPTER.items() if asked[name] is None}
    recipe = Recipe(**asked)
    keep_pages()
    try:
        console.check_plot(recipe.plot, [*inputs(recipe), *written_beside(recipe)])
        table = finetune(recipe, console.chosen_backend(recipe.backend))
    except KeyboardInterrupt:
        console.say_stopped()
        say_kept_training(recipe, options.typed)
        return 130
    except OSError as error:  # for example, of a full disk
        console.say(str(error))
        say_kept_training(recipe, options.typed)
        return 2
    if recipe.plot is not None:
        from . import figures

        console.write_figure(figures.plot_learning(table.rows, table.each_step()), recipe.plot)
    return 0


def say_kept_training(recipe: Recipe, typed: list[str]) -> None:
    """Report what is kept of a training that ended early, and the command to resume it."""
    from ..language.finetune import kept_training
    from ..language.source import ModelSource

    kept = kept_training(recipe, ModelSource(recipe.model), console.chosen_backend(recipe.backend))
    if kept is None:
        console.say(f"nothing is saved in {recipe.kept_in} yet")
    else:
        steps = None if recipe.epochs else recipe.resolved(kept.notes["numbers"]).steps
        console.say_kept(f"{kept.place(steps)} is kept in {recipe.kept_in}", typed)
