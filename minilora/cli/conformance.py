"""``minilora conformance``: hold an implementation of LoRA against the formulas, in a process of its own."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

from .console import check_output, discard, files, path, print_error, printable

DESCRIPTION = """\
Compare an implementation of LoRA with the formulas, and name what is wrong with it. It runs in a process of its own.
Exit code 1 if a claim is broken, and 2 if nothing could be checked.
"""
DTYPES = ("float64", "float32", "float16", "bfloat16")
TIMEOUT = 20.0


def add(commands: Any) -> None:
    """Add the command to the parser."""
    help = "compare an implementation of LoRA with the formulas, and name what is wrong with it"
    add_arguments(commands.add_parser("conformance", help=help, description=DESCRIPTION))


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m minilora.conformance``. Returns 0, 1 for a broken claim, 2 for no check."""
    parser = argparse.ArgumentParser("python -m minilora.conformance", description=DESCRIPTION)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes; ``python -m minilora.conformance`` takes the same."""
    parser.add_argument(
        "implementation",
        metavar="MODULE[:OBJECT]",
        help="a module, a path to a .py file, or an object in it, with forward and perhaps backward",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="the precision to check in (default: the implementation's)")
    parser.add_argument(
        "--xfails", type=path, metavar="FILE", help="known failures, one a line: an id and a reason; strict both ways"
    )
    parser.add_argument(
        "--require", metavar="CLAIMS", help="claims that must be offered, such as forward,slope,merge: else exit code 1"
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=TIMEOUT,
        metavar="SECONDS",
        help=f"limit for its import, and then for the check (default: {TIMEOUT:g})",
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="write the report there, with all ids and versions")
    parser.set_defaults(command=run)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return seconds


def run(options: argparse.Namespace) -> int:
    """Check an implementation, and print the report. Returns 1 where a claim is broken, 2 where nothing was checked."""
    from ..conformance.checking import xfails
    from ..conformance.checking.report import save_json
    from ..conformance.running.child_process import check_apart
    from ..conformance.running.target import sources

    name = options.implementation
    try:
        if options.json:
            inputs = [(file, "the implementation") for file in sources(name)]
            check_output(options.json, [*inputs, *files("the known failures", options.xfails)])
        known = xfails.read(options.xfails) if options.xfails else {}
        required = _required(options.require)
        report = check_apart(name, dtype=options.dtype, timeout=options.timeout)
        judged = xfails.Judged(report, known, required)
        if options.json:
            save_json(options.json, **report.as_dict(), **judged.as_dict())
    except (ValueError, OSError) as error:
        return _cannot(name, "could not be checked", str(error))
    lines = [str(judged), *(xfails.github_error(text) for text in judged.annotations() if xfails.on_github())]
    try:
        if sys.stdout is None:  # as after >&- in a shell
            raise OSError("there is no standard output")
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # a reader that has seen enough, as head has
        discard(sys.stdout)
    except (OSError, ValueError) as error:  # a full disk, or letters that it has no bytes for
        discard(sys.stdout)
        return _cannot(name, "was checked, and the report could not be written", str(error))
    return judged.status


def _required(text: str | None) -> list[str]:
    """Return the claims that ``--require`` names, with spaces or hyphens."""
    from ..conformance.checking.contract import CONTRACT, FURTHER

    claims = [claim.strip().replace("-", " ") for claim in text.split(",")] if text is not None else []
    offered = [*CONTRACT, *(claim for more in FURTHER.values() for claim in more)]
    if unknown := [claim for claim in claims if claim not in offered]:
        raise ValueError(f"--require: there is no claim {unknown[0]!r}; there are {', '.join(offered)}")
    return claims


def _cannot(name: str, what: str, why: str) -> int:
    """Say in one line what could not be done, and return the exit code."""
    from ..conformance.checking.xfails import github_error, on_github

    text = printable(f"{name} {what}: {' '.join(why.split())}")
    print_error(text)
    if on_github():
        print_error(github_error(text))
    return 2
