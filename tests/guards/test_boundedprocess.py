"""A child process answers within bounds on its processor time and its memory, or is ended."""

import os
from types import SimpleNamespace

import psutil
import pytest

from minilora.guards.boundedprocess import BoundedProcess, BoundsExceeded

ANSWERS = """
import os, time
KEPT = []
def answer(question):
    if question == "loop":
        while True:
            pass
    if question == "fill":
        while True:
            KEPT.append(bytearray(1 << 24))
            time.sleep(0.002)
    if question == "compute":
        while time.process_time() < 0.05:  # several ticks of the clock by which psutil counts
            pass
    if question == "end":
        os._exit(0)
    return {"pid": os.getpid(), "question": question}
"""


@pytest.fixture
def answers(tmp_path):
    path = tmp_path / "answers.py"
    path.write_text(ANSWERS)
    return path


def test_questions_are_answered_in_a_process_that_ends(answers):
    with BoundedProcess(answers, seconds=10, memory=1 << 29) as process:
        assert (process.runs, process.used) == (False, 0.0)
        first, second = process.ask("a\u00e9\ud800"), process.ask([1, {"b": None}])
        assert (first["question"], second["question"]) == ("a\u00e9\ud800", [1, {"b": None}])
        assert first["pid"] == second["pid"] != os.getpid()
        assert psutil.Process(first["pid"]).is_running()
    assert not psutil.pid_exists(first["pid"]) or not psutil.Process(first["pid"]).is_running()
    assert not process.runs


@pytest.mark.parametrize(
    ("question", "bounds", "reason"),
    [
        ("loop", {"seconds": 0.3}, r"it computes for more than 0\.3 s"),
        ("fill", {"memory": 1 << 27}, "it fills more than 134 MB of memory"),
        ("end", {}, "it ends the process that runs it"),
    ],
)
def test_a_process_beyond_its_bounds_is_ended(answers, question, bounds, reason):
    with BoundedProcess(answers, **{"seconds": 10, "memory": 1 << 29} | bounds) as process:
        before = process.ask("a")["pid"]
        with pytest.raises(BoundsExceeded, match=f"^{reason}$"):
            process.ask(question)
        assert not process.runs
        assert not psutil.pid_exists(before)
        process.seconds = 10
        assert process.ask("b")["pid"] != before


def test_a_process_that_has_ended_gives_no_answer_and_the_next_question_begins_another(answers):
    with BoundedProcess(answers, seconds=10, memory=1 << 29) as process:
        before = process.ask("a")["pid"]
        psutil.Process(before).kill()
        with pytest.raises(BoundsExceeded, match="it ends the process that runs it"):
            process.ask("b" * (1 << 20))
        process.used = 1e9
        assert process.ask("c")["pid"] != before
        assert process.used < 1e9  # each process has a time of its own


def test_a_process_that_cannot_start_is_no_answer(tmp_path, capfd):
    (tmp_path / "answers.py").write_text("1 / 0")
    with (
        BoundedProcess(tmp_path / "answers.py", seconds=10, memory=1 << 29) as process,
        pytest.raises(BoundsExceeded, match=r"^the process that runs it does not start$"),
    ):
        process.ask("a")
    assert capfd.readouterr().err == ""


def test_more_time_may_be_added(answers):
    """What counts is the time of all questions together."""
    with BoundedProcess(answers, seconds=10, memory=1 << 29) as process:
        process.ask("compute")
        assert 0 < process.used < 10
        process.seconds = process.used + 0.2
        with pytest.raises(BoundsExceeded, match="it computes for more than"):
            process.ask("loop")


@pytest.mark.parametrize(("times", "memory", "reason"), [
    ((0.6, 0.5, 9.0, 9.0), 0, "it computes for more than 1.0 s"),  # the system's time counts too, and no child's
    ((0.0, 1.1, 0.0, 0.0), 0, "it computes for more than 1.0 s"),
    ((0.5, 0.5, 9.0, 9.0), 2_000_000, None),
    ((0.5, 0.5, 9.0, 9.0), 2_000_001, "it fills more than 2 MB of memory"),
])  # fmt: skip
def test_what_counts_is_the_processs_own_time_and_memory(answers, times, memory, reason):
    process = BoundedProcess(answers, seconds=1.0, memory=2_000_000)
    process._measured = SimpleNamespace(cpu_times=lambda: times, memory_info=lambda: SimpleNamespace(rss=memory))
    if reason is None:
        process._check_bounds()
        assert process.used == 1.0
        return
    with pytest.raises(BoundsExceeded, match=reason):
        process._check_bounds()
