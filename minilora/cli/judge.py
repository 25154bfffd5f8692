"""The commands that judge: ``minilora audit``, ``diagnose``, ``conformance``, ``vectors`` and ``golden``.

Each makes a report, which `run` prints and writes to the file of ``--json``. The exit code is 0 if all is right, 1 if
something is wrong, and 2 if nothing could be judged.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..texts import printable
from .console import add_model, check_output, discard, files, path, print_error

if TYPE_CHECKING:
    from ..report import Report

CHECKED_DTYPES = ("float64", "float32", "float16", "bfloat16")
TIMEOUT, LONGEST = 20.0, 1e9  # in seconds; the clocks of some systems overflow not far above
START_FILES = ("numpy", "class", "torch", "peft", "jax", "mlx")
"""The kinds of files that ``--start`` can write, from ``conformance/start``."""


def add(commands: Any) -> None:
    """Add the five commands to the parser."""
    add_audit(commands)
    add_diagnose(commands)
    add_conformance(commands)
    add_vectors(commands)
    add_golden(commands)


# --- an adapter -------------------------------------------------------------------------------------------------------


def add_audit(commands: Any) -> None:
    """Add ``minilora audit``."""
    parser = commands.add_parser(
        "audit",
        help="check an adapter against the model that it is for: is it sound, and is it applied?",
        description=(
            "Read an adapter tensor by tensor, and headers and pieces of the model. Report what the adapter is, how "
            "large its changes are, whether every tensor lands, and what is suspicious. Exit code 0 if it is sound, "
            "with or without notes, 1 if it is suspicious or wrong, 2 if it could not be read. With --merged, read the "
            "adapter, the base MODEL and MERGED in full, and report whether MERGED is what merging writes, or what it "
            "is instead: exit code 0 if it is right, 1 if it is wrong, 2 if that cannot be decided."
        ),
    )
    parser.add_argument(
        "adapter",
        type=path,
        metavar="ADAPTER",
        help="a PEFT or mlx-lm folder, a .gguf file, or a .safetensors file with tensor names of PEFT, MLX or kohya",
    )
    add_model(parser, "the base: a Hugging Face folder, only its weights, or a .gguf file")
    parser.add_argument(
        "--merge", action="store_true", help="also read MODEL's weights, and report what merging loses to rounding"
    )
    parser.add_argument(
        "--merged",
        type=path,
        metavar="MERGED",
        help="a merged model, in any of MODEL's formats: is it MODEL with the adapter merged into it? Needs --model",
    )
    add_report(parser, judge_audit, lambda args: files("a file that is read", args.adapter, args.model, args.merged))


def judge_audit(options: argparse.Namespace) -> Report:
    """Return the report on an adapter, and on its model or a merged model if they are given."""
    from ..audit.auditing import audit

    return audit(options.adapter, options.model, merge=options.merge, merged=options.merged, progress=True)


# --- an adapter in an engine ------------------------------------------------------------------------------------------


def add_diagnose(commands: Any) -> None:
    """Add ``minilora diagnose``."""
    parser = commands.add_parser(
        "diagnose",
        help="find out from an engine's logits what it did with your adapter",
        description=(
            "Compute the logits of a decoder with an adapter, correctly and under each known mistake, and report "
            "which of them an engine's logits match. LOGITS is a safetensors file with `prompts` (P, T) of token "
            "ids, and `logits` (P, T, V) or (P, V), or `log_probabilities` of the same shape, with their token `ids` "
            "if they cover only some tokens. Its metadata may give `computed_in`, such as bfloat16. With "
            "`base_logits`, those of the model without the adapter, a wrong base, tokenizer or temperature can be "
            "told from a wrong adapter. Exit code 0 if the logits are right, 1 if they are wrong, 2 if they cannot be "
            "judged."
        ),
    )
    parser.add_argument("logits", type=path, metavar="LOGITS", help="the engine's logits, a .safetensors file")
    add_model(parser, "the decoder: a Hugging Face folder or a .gguf file", required=True)
    parser.add_argument(
        "--adapter", type=path, metavar="ADAPTER", required=True, help="the adapter, in any format that `audit` reads"
    )
    add_report(parser, judge_diagnose, lambda args: files("a file that is read", args.model, args.adapter, args.logits))


def judge_diagnose(options: argparse.Namespace) -> Report:
    """Return the report on what an engine did with an adapter."""
    from ..conformance.golden.diagnosing import diagnose

    return diagnose(options.model, options.adapter, options.logits)


# --- a LoRA in Python -------------------------------------------------------------------------------------------------


def add_conformance(commands: Any) -> None:
    """Add ``minilora conformance``."""
    parser = commands.add_parser(
        "conformance",
        help="compare an implementation of LoRA with the formulas, and name its bugs",
        description=(
            "Compare an implementation of LoRA with the formulas, and name its bugs. This imports and runs the code in "
            "a child process, which is not a sandbox: the code can do anything that you can, so check only code that "
            "you trust. The exit code is 1 if a claim is broken, and 2 if nothing could be checked. To get started, "
            "use --start to write a file to fill in."
        ),
    )
    parser.add_argument(
        "implementation",
        nargs="?",
        metavar="MODULE[:OBJECT]",
        help="a module or a path to a .py file, or an object in it, that has forward and optionally backward",
    )
    parser.add_argument(
        "--start",
        choices=START_FILES,
        metavar="KIND",
        help=f"print a Python file that wraps your LoRA, for you to fill in: {', '.join(START_FILES)}",
    )
    parser.add_argument("-o", "--output", type=path, metavar="FILE", help="with --start, write to this new file")
    parser.add_argument(
        "--dtype", choices=CHECKED_DTYPES, help="the precision to check in (default: the implementation's)"
    )
    parser.add_argument(
        "--require", metavar="CLAIMS", help="exit with 1 unless these claims are offered, such as forward,slope,merge"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="SECONDS",
        help=f"the time limit for the import, and again for the check (default: {TIMEOUT:g})",
    )
    add_report(parser, judge_conformance, implementation_files, xfails=True)


def write_start(options: argparse.Namespace) -> None:
    """Print the file of ``--start``, or write it to ``--output``."""
    others = ("implementation", "json", "xfails", "require", "dtype")
    if given := [name for name in others if getattr(options, name) is not None]:
        raise ValueError(f"--start only creates a file and judges nothing, expected no {given[0]} with it")
    text = Path(__file__).parents[1].joinpath("conformance", "start", f"{options.start}.txt").read_text("utf-8")
    if options.output is None:
        print(text, end="")
        return
    try:
        with open(options.output, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(f"{str(options.output)!r} already exists, expected the name of a new file") from None
    name = printable(str(options.output))
    print(f"wrote {name}; fill it in, then run: minilora conformance {name}")


def implementation_files(options: argparse.Namespace) -> list[tuple[Path, str]]:
    """Return the files that MODULE[:OBJECT] may refer to."""
    from ..conformance.checking.child import sources

    return [(file, "the implementation") for file in sources(options.implementation or "")]


def judge_conformance(options: argparse.Namespace) -> Report | None:
    """Return the report on an implementation; None if ``--start`` wrote a file instead."""
    if options.start is not None:
        write_start(options)
        return None
    if options.implementation is None or options.output is not None:
        raise ValueError("expected MODULE[:OBJECT], or --start KIND with or without -o FILE")
    from ..checks import check_number
    from ..conformance.checking.child import check_in_child
    from ..report import CannotRun

    check_number("timeout", options.timeout, above=0, below=LONGEST)

    name = options.implementation
    required = _required(options.require)
    try:
        report = check_in_child(name, dtype=options.dtype, timeout=options.timeout)
    except (ValueError, OSError) as error:
        raise CannotRun(f"{name} could not be checked: {' '.join(str(error).split())}") from None
    report.require(required)
    return report


def _required(text: str | None) -> list[str]:
    """Return the claims of ``--require``, whose words may be joined by hyphens."""
    from ..conformance.problems.kinds import ALL

    claims = [claim.strip().replace("-", " ") for claim in text.split(",")] if text is not None else []
    offered = list(dict.fromkeys(claim for kind in ALL for claim in kind.claims))
    if unknown := [claim for claim in claims if claim not in offered]:
        raise ValueError(f"--require: unknown claim {unknown[0]!r}, expected {', '.join(offered)}")
    return claims


# --- a program that reads files ---------------------------------------------------------------------------------------


def add_vectors(commands: Any) -> None:
    """Add ``minilora vectors``."""
    parser = commands.add_parser(
        "vectors",
        help="write test problems with answers for a LoRA in another language, or judge its answers",
        description=(
            "Write test problems and their answers as safetensors files with a JSON index: linear layers, embeddings, "
            "convolutions, rsLoRA, DoRA with and without a detached norm, dropout, bases in NF4 or bfloat16, fused "
            "slots, experts, and ten steps of Adam, in float64, float32, float16 and bfloat16. "
            "With --compare, judge the answers that a program wrote. The exit code is 1 if a claim is broken."
        ),
    )
    add_compare(parser, "the vectors")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--starter",
        action="store_true",
        help="write only 14 small files to start with: linear layers in float64 and float32",
    )
    which.add_argument(
        "--kind", action="append", metavar="KINDS", help="write only these kinds, such as linear,rslora (default: all)"
    )
    add_report(parser, judge_vectors, compared, xfails=True)


def judge_vectors(options: argparse.Namespace) -> Report | None:
    """Write the vectors, or compare a program's answers with them."""
    from ..conformance.vectors import compare, write

    if options.compare is None:
        write_cases(options, lambda folder: write(folder, _chosen(options)))
        return None
    if options.starter or options.kind:
        raise ValueError("--starter and --kind select what is written, so they cannot be used with --compare")
    return compare(options.folder, options.compare)


def _chosen(options: argparse.Namespace) -> Any:
    """Return the vectors that ``--starter`` or ``--kind`` selects."""
    from ..conformance.vectors import STARTER, VECTORS

    if options.starter:
        return STARTER
    there = list(dict.fromkeys(vector.kind for vector in VECTORS))
    kinds = ",".join(options.kind or there).split(",")
    if unknown := [kind for kind in kinds if kind not in there]:
        raise ValueError(f"--kind: unknown kind {unknown[0]!r}, expected {', '.join(there)}")
    return [vector for vector in VECTORS if vector.kind in kinds]


def add_golden(commands: Any) -> None:
    """Add ``minilora golden``."""
    parser = commands.add_parser(
        "golden",
        help="write adapters with the right answers, or judge a program's answers",
        description=(
            "Write random decoders of half a megabyte, some with a mixture of experts, and adapters for them in PEFT's "
            "format, with the right answers (logits and merged weights) and the logits of known bugs. With --compare, "
            "judge a program's answers. The exit code is 1 if a case is wrong or missing."
        ),
    )
    add_compare(parser, "the adapters")
    add_report(parser, judge_golden, compared, xfails=True)


def judge_golden(options: argparse.Namespace) -> Report | None:
    """Write the golden adapters, or compare a program's answers with them."""
    from ..conformance.golden import folder, judging

    if options.compare is None:
        write_cases(options, folder.write_golden)
        return None
    return judging.compare_golden(options.folder, options.compare)


# --- what they share --------------------------------------------------------------------------------------------------


def add_report(
    parser: argparse.ArgumentParser,
    judge: Callable[[argparse.Namespace], Report | None],
    reads: Callable[[argparse.Namespace], list[tuple[Path, str]]],
    *,
    xfails: bool = False,
) -> None:
    """Add the options for the report that `judge` makes; it must not overwrite the files that `reads` returns."""
    parser.add_argument("--all", action="store_true", help="also list everything that is right, one line each")
    parser.add_argument("--json", type=path, metavar="FILE", help="also write the report to FILE, for other programs")
    if xfails:
        parser.add_argument(
            "--xfails",
            type=path,
            metavar="FILE",
            help="known failures, one per line: a case's id and a reason. The exit code is 0 if exactly these fail",
        )
    parser.set_defaults(command=run, judge=judge, reads=reads, xfails=None, prog=parser.prog)


def run(options: argparse.Namespace) -> int:
    """Print a command's report, write it to the file of ``--json``, and return its exit code."""
    from ..report import check_replaced, github_error, on_github, read_known, save_json

    try:
        for name in ("json", "xfails"):
            if getattr(options, "compare", "") is None and getattr(options, name) is not None:
                raise ValueError(f"--{name} needs --compare: without it there are no verdicts")
        if options.json is not None:
            check_output(options.json, [*options.reads(options), *files("the known failures", options.xfails)])
            check_replaced(options.json)
        known = {} if options.xfails is None else read_known(options.xfails)
        report: Report | None = options.judge(options)
    except (ValueError, OSError) as error:
        if on_github():
            print_error(github_error(str(error), options.prog))
        raise
    if report is None:  # the command wrote files and judged nothing
        return 0
    report.known = known
    save_json(options.json, report)
    try:
        print(report.shown(all=options.all), *(report.annotations() if on_github() else ()), sep="\n", flush=True)
    except BrokenPipeError:  # a reader such as head may close the pipe early; the verdict stands
        discard(sys.stdout)
    return report.status


def add_compare(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the folder argument and ``--compare``."""
    parser.add_argument(
        "folder", type=path, metavar="DIR", help=f"a new folder for {what}; with --compare, an existing one"
    )
    parser.add_argument("--compare", type=path, metavar="RESULTS", help="judge a program's answers in this folder")


def write_cases(options: argparse.Namespace, write: Callable[[Path], int]) -> None:
    """Write a folder of cases with the right answers."""
    count = write(options.folder)
    print(f"wrote {count} cases to {printable(str(options.folder))}; index.json describes them")


def compared(options: argparse.Namespace) -> list[tuple[Path, str]]:
    """Return the files that ``--compare`` reads: all files of the folder, and the tensors of the results."""
    what = "an input of the comparison"
    return [*files(what, options.folder, pattern="**/*"), *files(what, options.compare, pattern="*.safetensors")]
