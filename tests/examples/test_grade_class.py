"""A class is graded module by module: whatever a module does affects only its own points."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minilora import exercises

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import grade_class  # noqa: E402

POINTS = {"loss_gradient": 1.0, "grad_B": 2.0, "grad_h": 0.5, "first step": 3.0}
ALL = sum(POINTS.values())
RIGHT = """
import numpy as np
from pathlib import Path

print("graded: 1000 points")
Path("left.txt").write_text("in an empty folder")

def loss_gradient(prediction, target):
    print('[true, "right"]')
    return 2 * (prediction - target) / prediction.size

def grad_B(dy, h, s):
    return s * dy.T @ h

def grad_h(dy, B, s):
    return s * dy @ B

predictions = {"first step": 0.01}

if __name__ == "__main__":
    raise RuntimeError("a graded module is imported")
"""
BREAKS = "from multiprocessing import connection\nconnection.Connection.send_bytes = lambda *_: 1 / 0\n"
LOSS = "def loss_gradient(prediction, target):\n    return 2 * (prediction - target) / prediction.size\n"


def inside(line):
    """Return the right module with a line at the start of grad_B."""
    return RIGHT.replace("def grad_B(dy, h, s):\n", f"def grad_B(dy, h, s):\n    {line}\n")


CLASS = {
    "right": (RIGHT, {}),
    "sign": (RIGHT.replace("s * dy.T", "-s * dy.T"), {"grad_B": "Not yet. dB: the sign is wrong"}),
    "guess": (RIGHT.replace("0.01", "1"), {"first step": "Not yet. This is the step in units of lr."}),
    "word": (RIGHT.replace("0.01", "'one'"), {"first step": "Not yet. Your code stopped with TypeError: guess must"}),
    "list": (
        RIGHT.replace("= {", "= 3 # {"),
        {"first step": "Not yet. Your code stopped with"},
    ),
    "loop": (inside("while True: pass"), {"grad_B": "Your code took longer than 4 s."}),
    "prints": (inside("while True: print('x' * 99)"), {"grad_B": "Your code took longer than 4 s."}),
    "exits": (inside("raise SystemExit(0)"), {"grad_B": "Not yet. Your code stopped with SystemExit: 0"}),
    "interrupts": (inside("raise KeyboardInterrupt"), {"grad_B": "Not yet. Your code stopped with Keyboard"}),
    "leaves": (inside("import os; os._exit(0)"), {"grad_B": "Your code ended the process."}),
    "crashes": (inside("import ctypes; ctypes.string_at(0)"), {"grad_B": "Your code ended the process."}),
    "asks": (inside("input()"), {"grad_B": "Not yet. your code stopped with EOFError"}),
    "half": (LOSS, dict.fromkeys(("grad_B", "grad_h", "first step"), "Not yet. There is no ")),
    "number": (RIGHT + "grad_h = 5\n", {"grad_h": "Not yet. your code stopped with TypeError: 'int' object is not c"}),
    "empty": ("", dict.fromkeys(POINTS, "Not yet. There is no ")),
    "syntax": ("def (", dict.fromkeys(POINTS, "The module stopped with SyntaxError: ")),
    "ends": (RIGHT + "raise SystemExit", dict.fromkeys(POINTS, "The module stopped with SystemExit")),
    "endless": (RIGHT + "while True: pass", dict.fromkeys(POINTS, "Your code took longer than 4 s.")),
    "breaks": (RIGHT + BREAKS, dict.fromkeys(POINTS, "Your code ended the process.")),
}
"""Each module, with the exercises that lose points and the start of their comments; all others are right."""


@pytest.mark.long
@pytest.mark.parametrize("name", CLASS)
def test_what_a_module_does_costs_only_its_author(name, tmp_path):
    text, lost = CLASS[name]
    module = tmp_path / f"{name}.py"
    module.write_text(text)
    marks = grade_class.grade_module(module, POINTS, seconds=4 if "4 s" in str(lost) else 100)
    assert [(mark["name"], mark["max_score"]) for mark in marks] == [*POINTS.items()]
    assert {mark["name"] for mark in marks if mark["score"] != mark["max_score"]} == {*lost}
    for mark in marks:
        if mark["name"] in lost:
            assert mark["score"] == 0
            assert mark["output"].startswith(lost[mark["name"]])
        else:
            assert "right" in mark["output"].lower()
    assert {path.name for path in tmp_path.iterdir()} <= {module.name, "__pycache__"}  # it ran elsewhere


@pytest.mark.long
def test_a_class_is_reported_with_its_points_and_as_json(tmp_path):
    names = [f"{name}.py" for name in ("right", "sign", "syntax")]
    for name in names:
        (tmp_path / name).write_text(CLASS[name[:-3]][0])
    points = [f"{name}={count:g}" for name, count in POINTS.items()]
    command = [sys.executable, str(EXAMPLES / "grade_class.py"), *names, "--points", *points, "--json", "points.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, "")
    right, sign, hint, syntax, *_ = done.stdout.splitlines()
    assert (right, sign) == (f"right.py   {ALL:g} of {ALL:g}", f"sign.py    {ALL - 2:g} of {ALL:g}")
    assert hint.startswith("    grad_B: Not yet. dB: the sign")
    assert syntax == f"syntax.py  0 of {ALL:g}"
    kept = json.loads((tmp_path / "points.json").read_text())
    found = {name: sum(test["score"] for test in own["tests"]) for name, own in kept.items()}
    assert found == dict(zip(names, (ALL, ALL - 2, 0), strict=True))
    assert {key for own in kept.values() for test in own["tests"] for key in test} == {
        *("name", "score", "max_score", "output")
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nobody.py"], "there is no file nobody.py"),
        ([__file__, "--points", "grad_C=1"], "there is no exercise 'grad_C'"),
        ([__file__, "--points", "grad_B=many"], "could not convert string to float: 'many'"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_runs(arguments, says, capsys, monkeypatch):
    monkeypatch.setattr(grade_class, "grade_module", None)
    with pytest.raises(SystemExit) as stopped:
        grade_class.main(arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_every_grader_of_a_function_counts():
    graders = {name for name in vars(exercises) if name.startswith("check_")} - {"check_prediction"}
    assert {f"check_{name}" for name in grade_class.GRADERS} == graders
