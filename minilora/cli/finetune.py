"""``minilora finetune``: train an adapter of a language model on a text or on examples."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from ..language.recipe import ADAPTER_DEFAULTS, OPTION_GROUPS, Recipe, option_name
from . import console

SHARED_OPTIONS = {"model": console.add_model, "quantize": console.add_quantize, "backend": console.add_backend}
"""Options shared with other commands."""


def add(commands: Any) -> None:
    """Add the command to the parser: an option for each field of a recipe, in groups."""
    parser = commands.add_parser(
        "finetune",
        help="train an adapter of a language model on a text, or on examples",
        description=(
            "Freeze a Llama-type language model, add LoRA to the layers that you name, and train it to predict the "
            "next token of a text, or of examples. Every tenth window of the text, or example, is held out to measure "
            'the loss. Each line of a .jsonl file is an example: {"prompt": ..., "completion": ...}, with the loss on '
            'the completion; {"messages": [{"role": ..., "content": ...}, ...]}, formatted by the model\'s chat '
            'template, with the loss on the assistant\'s turns; or {"text": ...}.'
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
    """Add the command-line option of a recipe's field."""
    settings, required = field.metadata, field.default is MISSING
    if field.name in SHARED_OPTIONS:
        SHARED_OPTIONS[field.name](group)
    elif field.default is False:
        group.add_argument(option_name(field.name), action="store_true", help=settings["help"])
    else:
        read = console.path if settings["type"] is Path else settings["type"]
        more = {**{name: settings[name] for name in ("metavar", "choices", "help")}, "type": read}
        if field.name == "text":
            group.add_argument("text", **more)
        else:
            default = None if required else field.default
            group.add_argument(option_name(field.name), default=default, required=required, **more)


def run(options: argparse.Namespace) -> int:
    """Train, print the losses as they are measured, and save the adapter."""
    from ..fast import keep_pages
    from ..language.finetune import finetune, further_outputs, inputs

    asked = {field.name: getattr(options, field.name) for field in fields(Recipe)}
    if options.adapter is None:
        asked |= {name: default for name, default in ADAPTER_DEFAULTS.items() if asked[name] is None}
    recipe = Recipe(**asked)
    keep_pages()
    try:
        console.check_plot(recipe.plot, [*inputs(recipe), *further_outputs(recipe)])
        table = finetune(recipe, console.chosen_backend(recipe.backend))
    except KeyboardInterrupt:
        console.say_interrupted()
        say_what_is_saved(recipe, options.typed)
        return 130
    except OSError as error:  # such as a full disk
        console.say(str(error))
        say_what_is_saved(recipe, options.typed)
        return 2
    if recipe.plot is not None:
        from . import figures

        console.write_figure(figures.plot_learning(table.rows, table.each_step()), recipe.plot)
    return 0


def say_what_is_saved(recipe: Recipe, typed: list[str]) -> None:
    """Report what is saved of a run that ended early, and how to resume it."""
    from ..language.finetune import run_to_resume
    from ..language.source import ModelSource

    stopped = run_to_resume(recipe, ModelSource(recipe.model), console.chosen_backend(recipe.backend))
    if stopped is None:
        console.say(f"nothing is saved in {recipe.checkpoint_path} yet")
    else:
        steps = None if recipe.epochs else recipe.resolved(stopped.notes["numbers"]).steps
        console.say_how_to_resume(f"{stopped.place(steps)} is saved in {recipe.checkpoint_path}", typed)
