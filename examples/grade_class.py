"""Grade a class's answers to the exercises: each student's is a module; print who has how many points, and why.

    python examples/grade_class.py submissions/*.py [--points backward=5 grad_B=2 "first step=1"] [--json points.json]

A module has functions under the names of ``python -m minilora.exercises``, and answers to questions in a dict
``predictions = {"first step": 0.01}``. Without ``--points`` each function counts 1, and no question counts.

A module runs in a process of its own, in an empty folder. What it prints is not shown. An exception, ``sys.exit``, an
endless loop or a crash costs its author the exercise at hand; after a loop or a crash a new process goes on with the
next. It is no sandbox: a module may do what you may do. Grade strangers' modules in a container.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

from minilora import exercises

GRADERS = {name.removeprefix("check_"): getattr(exercises, name) for name in exercises.__all__ if "check_" in name}
del GRADERS["prediction"]
STARTING = 120  # seconds until Python and NumPy are there, on a busy machine


# --- in the module's process ------------------------------------------------------------------------------------------


def work(pipe, path: Path, names: list[str], folder: str) -> None:
    """Import a module and grade it; send a verdict when ready, when it is imported, and of each exercise."""
    os.chdir(folder)
    send(pipe, True)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            with contextlib.redirect_stdout(nowhere):
                module = imported(path)
        except BaseException as error:  # sys.exit, too
            return send(pipe, False, f"The module stopped with {type(error).__name__}: {error}".rstrip(": "))
        send(pipe, True)
        for name in names:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                try:
                    right = grade(module, name, nowhere)
                except BaseException as error:  # sys.exit, too: a grader catches what else a function raises
                    right = print(f"Not yet. Your code stopped with {type(error).__name__}: {error}")
            send(pipe, bool(right), said.getvalue().strip())


def send(pipe, right: bool, says: str = "") -> None:
    """Send a verdict as JSON: a pickle would run in the process that reads it."""
    pipe.send_bytes(json.dumps([right, says]).encode())


def imported(path: Path):
    spec = importlib.util.spec_from_file_location("submission", path)
    module = sys.modules["submission"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def grade(module, name: str, nowhere) -> bool:
    """Hand a function, or the prediction of a question, to its grader, which prints its words."""
    if name in exercises.QUESTIONS:
        if name not in getattr(module, "predictions", {}):
            return bool(print(f"Not yet. There is no {name!r} in the dict predictions."))
        return exercises.check_prediction(name, module.predictions[name])
    if not hasattr(module, name):
        return bool(print(f"Not yet. There is no function {name}."))

    def answer(*arguments):
        with contextlib.redirect_stdout(nowhere):
            return getattr(module, name)(*arguments)

    return GRADERS[name](answer)


# --- in the teacher's -------------------------------------------------------------------------------------------------


def grade_module(path: Path, points: dict[str, float], seconds: float) -> list[dict]:
    """Return for each exercise that counts its points and what was said, under the keys that Gradescope reads."""
    marks: list[dict] = []
    while len(marks) < len(points):
        for name, right, says in graded(path.resolve(), list(points)[len(marks) :], seconds):
            score = points[name] * right
            marks.append({"name": name, "score": score, "max_score": points[name], "output": says})
    return marks


def graded(path: Path, names: list[str], seconds: float):
    """Grade exercises in one process, up to the first that ends it, or that takes too long."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = context.Process(target=work, args=(theirs, path, names, folder), daemon=True)
        process.start()
        theirs.close()
        try:
            received(ours, STARTING)
            imports, _, why = received(ours, seconds)
            for name in names:
                right, lives, says = received(ours, seconds) if imports else (False, True, why)
                yield name, right, says
                if not lives:
                    return
        finally:
            process.kill()
            process.join()


def received(pipe, seconds: float) -> tuple[bool, bool, str]:
    """Return what the process sends next: is it right, does the process go on, and what is said."""
    try:
        if not pipe.poll(seconds):
            return False, False, f"It took longer than {seconds:g} s."
        right, says = json.loads(pipe.recv_bytes())
        return right, True, says
    except EOFError:
        return False, False, "It ended the process."


def report(marks: dict[str, list[dict]]) -> str:
    """Return a line for each module, and below it what its author lost."""
    width, lines = max(map(len, marks)), []
    for path, own in marks.items():
        got, all_of_them = (sum(mark[key] for mark in own) for key in ("score", "max_score"))
        lines.append(f"{path:{width}}  {got:g} of {all_of_them:g}")
        lost = (mark for mark in own if mark["score"] < mark["max_score"])
        lines += [f"    {mark['name']}: {' '.join(mark['output'].split())}" for mark in lost]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", type=Path)
    parser.add_argument("--points", nargs="+", metavar="NAME=POINTS", default=[f"{name}=1" for name in GRADERS])
    parser.add_argument("--seconds", type=float, default=10, help="for the import, and for each exercise (10)")
    parser.add_argument("--json", type=Path, help="a file for points and words, by module, as Gradescope reads them")
    options = parser.parse_args(arguments)
    try:
        points = {name: float(count) for name, _, count in (text.rpartition("=") for text in options.points)}
    except ValueError as error:
        parser.error(f"--points: {error}")
    if unknown := points.keys() - {*GRADERS, *exercises.QUESTIONS}:
        parser.error(f"--points: there is no exercise {min(unknown)!r}")
    if missing := [path for path in options.modules if not path.is_file()]:
        parser.error(f"there is no file {missing[0]}")
    marks = {str(path): grade_module(path, points, options.seconds) for path in options.modules}
    print(report(marks))
    if options.json:
        by_module = {path: {"tests": own} for path, own in marks.items()}
        options.json.write_text(json.dumps(by_module, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
