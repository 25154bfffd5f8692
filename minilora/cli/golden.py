"""``minilora golden``: adapters with right answers, for programs that read files."""

from __future__ import annotations

import argparse
from typing import Any

from .console import check_output, compared, files, path, printable


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "golden",
        help="write adapters with right answers, or judge a program's answers",
        description=(
            "Write random decoders of half a megabyte, some with a mixture of experts, adapters for them as PEFT "
            "writes them, the right answers (logits and merged weights), and the logits of known bugs. With "
            "--compare, judge a program's answers. Exit code 1 if a case is wrong or missing."
        ),
    )
    parser.add_argument(
        "folder",
        type=path,
        metavar="DIR",
        help="a new folder for the adapters; with --compare, the folder that has them",
    )
    parser.add_argument("--compare", type=path, metavar="RESULTS", help="a folder with a program's answers")
    parser.add_argument(
        "--xfails",
        type=path,
        metavar="FILE",
        help="with --compare, a file of cases that are known to fail, a line each: the case's id and a reason. Exit "
        "code 0 where these fail and no other",
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="with --compare, write the verdicts to a file too")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Write the golden adapters, or print a verdict for each case. Returns 1 where one is wrong or missing."""
    if options.compare is None:
        if options.json is not None:
            raise ValueError("--json needs --compare: it has the verdicts")
        if options.xfails is not None:
            raise ValueError("--xfails needs --compare: it is about the verdicts")
        from ..conformance.golden.folder import write

        count = write(options.folder)
        print(f"{count} cases written to {printable(str(options.folder))}; index.json says what is in them")
        return 0
    from ..conformance.checking import xfails
    from ..conformance.checking.report import save_json
    from ..conformance.golden.judging import compare

    check_output(options.json, [*compared(options), *files("the list of known failures", options.xfails)])
    known = {} if options.xfails is None else xfails.read(options.xfails)
    verdict = compare(options.folder, options.compare, known)
    if options.json is not None:
        save_json(options.json, **verdict.json())
    print(verdict)
    if verdict.status and xfails.on_github():
        first = (
            str(verdict).splitlines()[0]
            if verdict.unexpected
            else f"stale in {options.xfails}: {', '.join(verdict.stale)}"
        )
        print(xfails.github_error(first, "minilora golden"))
    return verdict.status
