"""What is being done is said while it takes long. No test waits for a time: each waits for what is said."""

import re
import threading

import pytest

from minilora import Llama
from minilora.language.finetuning import heartbeat, session
from minilora.language.finetuning.heartbeat import Heartbeat

from ...support.command_line import finetune, rows

LONG = 60  # seconds after which a test has failed


def test_what_takes_long_is_named_and_named_again(monkeypatch):
    monkeypatch.setattr(heartbeat, "FIRST", 0.01)
    monkeypatch.setattr(heartbeat, "FURTHER", 0.01)
    lines, second, third = [], threading.Event(), threading.Event()

    def write(line):
        lines.append(line)
        (third if "weights" in line else second).set() if len(lines) > 1 else None

    with Heartbeat(write, "reading the text") as beat:
        assert second.wait(LONG)
        beat.now("reading the weights")
        assert third.wait(LONG)
    assert re.fullmatch(r"reading the text, for \d+ s now", lines[0])
    assert re.fullmatch(r"reading the weights, for 0 s now", lines[-1])
    count = len(lines)
    assert not beat.thread.is_alive()
    assert len(lines) == count


def test_what_is_short_is_not_named():
    lines = []
    with Heartbeat(lines.append, "reading") as beat:
        for _ in range(100):
            beat.now("reading more")
    assert lines == []


def test_the_thread_ends_where_what_it_tells_of_fails():
    with pytest.raises(KeyboardInterrupt), Heartbeat(print, "reading") as beat:
        raise KeyboardInterrupt
    assert not beat.thread.is_alive()


def slow(function, seen):
    """Return a function that waits until something has been said of it."""

    def waiting(*args, **more):
        said.clear()
        assert said.wait(LONG), function
        return function(*args, **more)

    said = threading.Event()
    seen.append(said)
    return waiting


def test_no_part_of_a_finetuning_is_silent(folder, capsys, monkeypatch):
    pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")
    monkeypatch.setattr(heartbeat, "FIRST", 0.01)
    monkeypatch.setattr(heartbeat, "FURTHER", 0.01)
    seen, right = [], Heartbeat._run
    for owner, name in ((session, "load_data"), (Llama, "load")):
        monkeypatch.setattr(owner, name, slow(getattr(owner, name), seen))
    monkeypatch.setattr("minilora.language.finetuning.costs.cache_bytes", slow(len, seen))
    for name in ("evaluate", "__call__"):
        monkeypatch.setattr(session.TrainingLoss, name, slow(getattr(session.TrainingLoss, name), seen))

    def running(self):
        write = self.write
        self.write = lambda line: write(line) or ([said.set() for said in seen] and None)
        right(self)

    monkeypatch.setattr(Heartbeat, "_run", running)
    assert finetune("--steps", "2", "--workers", "1") == 0
    out = capsys.readouterr().out
    words = [
        "reading the tokenizer and the text",
        "reading the weights",
        "measuring what a step takes",
        "measuring the held-out loss before the first step, very roughly",
        "computing step 1",
        "computing step 2",
        "measuring the held-out loss",
    ]
    places = [out.find(word) for word in words]
    assert -1 not in places
    assert places[:4] == sorted(places[:4])
    assert [step for step, *_ in rows(out)] == [0, 2]
