"""Grade the exercises of a class, one module per student: print each student's points with the reasons.

    python examples/grade_class.py submissions/*.py [--points backward=5 grad_B=2 "first step=1"] [--json points.json]

A module defines functions with the names that ``python -m minilora.exercises`` lists, and answers questions in a dict
``predictions = {"first step": 0.01}``. Without ``--points`` each function is worth 1 point, and questions none.

Each module runs in a separate process, in an empty folder. Its output is not shown. An exception, ``sys.exit``, an
endless loop or a crash costs its author only the current exercise; after a loop or a crash, a new process continues
with the next one. This is not a sandbox: a module can do whatever you can do. Grade strangers' modules in a container.
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
STARTING = 120  # seconds that Python and NumPy may take to start on a busy machine


# --- in the module's process ------------------------------------------------------------------------------------------


def work(pipe, path: Path, names: list[str], folder: str) -> None:
    """Import and grade a module; send a verdict when the process has started, after the import and each exercise."""
    os.chdir(folder)
    send(pipe, True)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            with contextlib.redirect_stdout(nowhere):
                module = imported(path)
        except BaseException as error:  # including sys.exit
            return send(pipe, False, f"The module stopped with {type(error).__name__}: {error}".rstrip(": "))
        send(pipe, True)
        for name in names:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                try:
                    right = grade(module, name, nowhere)
                except BaseException as error:  # including sys.exit: graders catch only a function's Exceptions
                    right = print(f"Not yet. Your code stopped with {type(error).__name__}: {error}")
            send(pipe, bool(right), said.getvalue().strip())


def send(pipe, right: bool, says: str = "") -> None:
    """Send a verdict as JSON, because a pickle could run code in the process that reads it."""
    pipe.send_bytes(json.dumps([right, says]).encode())


def imported(path: Path):
    spec = importlib.util.spec_from_file_location("submission", path)
    module = sys.modules["submission"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def grade(module, name: str, nowhere) -> bool:
    """Pass a function, or the prediction for a question, to its grader, which prints a comment."""
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


# --- in the teacher's process -----------------------------------------------------------------------------------------


def grade_module(path: Path, points: dict[str, float], seconds: float) -> list[dict]:
    """Return the points and the grader's comment for each exercise in `points`, with Gradescope's keys."""
    marks: list[dict] = []
    while len(marks) < len(points):
        for name, right, says in graded(path.resolve(), list(points)[len(marks) :], seconds):
            score = points[name] * right
            marks.append({"name": name, "score": score, "max_score": points[name], "output": says})
    return marks


def graded(path: Path, names: list[str], seconds: float):
    """Grade exercises in one process, until one of them ends it or takes too long."""
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
    """Return the next verdict from the process: whether it is right, whether the process is alive, and the comment."""
    try:
        if not pipe.poll(seconds):
            return False, False, f"Your code took longer than {seconds:g} s."
        right, says = json.loads(pipe.recv_bytes())
        return right, True, says
    except EOFError:
        return False, False, "Your code ended the process."


def report(marks: dict[str, list[dict]]) -> str:
    """Return a line for each module, followed by the exercises that lost points."""
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
    parser.add_argument("--seconds", type=float, default=10, help="time limit for the import and each exercise (10)")
    parser.add_argument("--json", type=Path, help="file for each module's points and comments, for Gradescope")
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
