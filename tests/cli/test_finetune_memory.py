"""What a fine-tuning needs of the machine: memory that is said and kept to, parts of a batch, one BLAS thread."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minilora import Llama
from minilora.language.finetune import cut_to_fit, what_fits
from minilora.language.llama import CheckpointedBlock
from minilora.language.memory import Memory, StepMemory

from ..support.command_line import FINETUNE, QUICK, rows, weights
from ..support.language import tiny_llama, write_folder
from ..support.sample import one_in

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")
pytestmark = pytest.mark.usefixtures("folder")

ROOT = Path(__file__).parents[2]


RECOMPUTED = (
    *("--micro-batch 30 --workers 3", "", "--dropout 0.3 --target-modules q_proj,down_proj"),
    "--use-dora --quantize nf4",
)


@pytest.mark.parametrize("more", one_in(4, RECOMPUTED, RECOMPUTED))
def test_recomputing_writes_the_same_adapter_with_less_memory(shell, monkeypatch, more):
    Path("e.jsonl").write_text('{"prompt": "the cat ", "completion": "sat"}\n{"text": "on the mat"}\n' * 60)
    write_folder(Path("deep"), tiny_llama(blocks=6))
    few = f"finetune e.jsonl --model deep --steps 2 --batch-size 100 --rank 2 {more}"
    again, right = [], CheckpointedBlock.backward
    monkeypatch.setattr(CheckpointedBlock, "backward", lambda *a, **k: again.append(a) or right(*a, **k))
    found, needed = [], []
    for name, lean in {"a": [], "b": ["--recompute"]}.items():
        before = len(again)
        out = shell(few, "--save", name, "--log", f"{name}.jsonl", *lean)
        needed.append(float(re.search(r"memory +([\d.]+) MB of activations", out)[1]))
        found.append((weights(name), Path(f"{name}.jsonl").read_text()))
    assert found[0] == found[1]
    assert 0 < needed[1] < 0.8 * needed[0]
    assert before == 0 < len(again)


def test_a_batch_beyond_the_machine_is_refused_with_what_fits(shell, machine):
    machine(2_400_000, 2_300_000)
    large = FINETUNE + "--batch-size 200 --checkpoint c"
    said = shell.refused(large)
    assert re.search(r"the training needs [\d.]+ MB and the machine has 2.4 MB: --micro-batch \d+ fits", said)
    assert rows(shell.out) == []
    assert sorted(os.listdir()) == ["model", "text"]
    (fitting,) = re.findall(r"--micro-batch \d+", said)
    shell(f"{large} {fitting} --steps 2")
    assert shell.err == ""


@pytest.mark.parametrize(
    ("whole", "hint"), [(5_000_000, r"--micro-batch \d+ or --recompute"), (400_000, "--recompute --micro-batch 1")]
)
def test_what_recomputing_saves_is_said_where_memory_is_short(shell, machine, whole, hint):
    machine(whole, whole)
    write_folder(Path("deep"), tiny_llama(blocks=8))
    large = QUICK + "--model deep --batch-size 30 --length 40 --steps 1 --eval-rows 1 "
    (said,) = re.findall(r": ([^:]*) fits, and takes the same steps", shell.refused(large))
    assert re.fullmatch(hint, said)
    shell(large + said[said.index("--recompute") :])
    assert shell.err == ""


def test_what_a_busy_machine_cannot_hold_is_refused_unless_anyway(shell, machine):
    machine(10**12, 1000)
    fits = "MB that are free: not even {}--micro-batch 1 fits"
    said = shell.refused(QUICK, "--steps", "1")
    assert re.search(f"{fits.format('--recompute ')}; .* needs less; --anyway starts regardless", said)
    assert rows(shell.out) == []
    assert sorted(os.listdir()) == ["model", "text"]
    shell(QUICK, "--steps", "1", "--anyway")
    assert fits.format("--recompute ") in shell.err
    assert fits.format("") in shell.refused(QUICK, "--steps", "1", "--recompute")


def test_what_fits_is_told_to_the_row(monkeypatch):
    """Of rows of 100 bytes, or of 50 where they are computed again; a tenth of what is free stays free."""
    monkeypatch.setattr("minilora.language.finetune.megabytes", lambda count: f"{count:,.0f}")
    plain, lean, as_large = (StepMemory(0, 0, size, size, 0, 0) for size in (100, 50, 100))
    for free, parts, each, again, fits in (
        (1000, 2, 8, None, "--micro-batch 4 fits, and takes the same steps"),
        (1000, 2, 8, as_large, "--micro-batch 4 fits, and takes the same steps"),
        (1000, 2, 8, lean, "--micro-batch 4 or --recompute fits, and takes the same steps"),
        (800, 2, 8, lean, "--micro-batch 3 or --recompute --micro-batch 7 fits, and takes the same steps"),
        (1700, 1, 16, None, "--micro-batch 15 fits, and takes the same steps"),
        (3000, 1, 16, None, "--micro-batch 15 fits, and takes the same steps"),  # fewer than there are now
        (200, 2, 8, lean, "--recompute --micro-batch 1 fits, and takes the same steps"),
        (100, 2, 8, lean, "not even --recompute --micro-batch 1 fits; --workers 1 needs less"),
        (100, 1, 16, None, "not even --micro-batch 1 fits; a smaller --length needs less"),
    ):
        said = f"the training needs 1,600 MB of the {free:,} MB that are free: {fits}"
        assert what_fits(plain, again, parts, each, Memory(1600, free)) == said
        with pytest.raises(ValueError, match=f"needs 1,600 MB and the machine has 1,599 MB: {fits}$"):
            what_fits(plain, again, parts, each, Memory(1599, free))


@pytest.mark.parametrize(("batch", "part", "workers", "at_once"), [(5, 4, 2, 2), (4, 4, 2, 1), (9, 2, 3, 3)])
def test_as_many_parts_are_computed_at_once_as_there_are(shell, batch, part, workers, at_once):
    """A shorter last one is a part too, and there are no more than workers."""
    out = shell(f"{QUICK} --steps 1 --batch-size {batch} --micro-batch {part} --workers {workers}")
    assert f"MB of activations for the backward of {at_once} x {part} windows at a time\n" in out


@pytest.mark.parametrize(("free", "length"), [(0, 9), (199, 9), (200, 2), (299, 2), (500, 5), (899, 8), (900, 9)])
def test_examples_are_cut_to_the_longest_row_that_fits(free, length):
    """Of 100 bytes for each token; where only one token fits they stay whole, and the training is refused later."""
    of_length = lambda n: SimpleNamespace(length=n)  # noqa: E731
    data = SimpleNamespace(X_held=[0, 0], length=9, of_length=of_length)
    needs = lambda n, parts, held: StepMemory(0, 0, 100 * n // parts, 100 * n // parts, 0, 0)  # noqa: E731
    assert cut_to_fit(data, needs, 2, free).length == length


def test_what_is_free_is_read_before_the_process_takes_any(shell, monkeypatch):
    order, load, forward = [], Llama.load, Llama.forward
    memory = Memory(10**10, 10**10)
    monkeypatch.setattr("minilora.language.finetune.machine_memory", lambda backend: order.append("memory") or memory)
    monkeypatch.setattr(Llama, "load", lambda *a, **k: order.append("load") or load(*a, **k))
    monkeypatch.setattr(Llama, "forward", lambda self, *a: order.append("forward") or forward(self, *a))
    shell(QUICK, "--steps", "1")
    assert order[:3] == ["memory", "load", "forward"]
    assert order.count("memory") == 1


def test_the_longest_example_is_cut_to_what_memory_allows(shell, machine):
    """Only where no length is named; the line says what is lost, and the length that keeps it."""
    long = json.dumps({"prompt": "the ", "completion": "log" * 400})
    Path("e.jsonl").write_text('{"prompt": "the ", "completion": "cat"}\n' * 8 + long)
    machine(10**10, 5_000_000)
    few = "finetune e.jsonl --model model --steps 1 --batch-size 2"
    out = shell(few, "--save", "a")
    found = re.search(r"1 truncated to (\d+) tokens, losing (\d+) .*--length 1204 keeps all", out)
    length, lost = map(int, found.groups())
    assert 100 < length == 1204 - lost
    assert shell.err == ""
    assert "MB that are free" in shell.refused(few, "--save", "b", "--length", "1204")


RSS = """
import re, sys
from pathlib import Path
from minilora.cli import main
def peak():  # of this process alone: what getrusage says begins with its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
from minilora.language import finetune as pipeline
from minilora.cli import finetune
import minilora.files.adapters, minilora.language.data, tokenizers
from minilora import Llama
before = peak()
assert main(sys.argv[1:]) == 0
print("grown", peak() - before)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells a process's peak")
@pytest.mark.parametrize("more", [[], ["--micro-batch", "20"], ["--recompute"]])
def test_the_process_grows_by_the_memory_that_is_said(more):
    pytest.importorskip("glassllm")
    Path("text").write_text("The cat sat on the mat. " * 6000)
    sizes = ["--steps", "2", "--batch-size", "100", "--length", "128", *more]
    command = [sys.executable, "-c", RSS, "finetune", "text", "--save", "a", *sizes]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    said = float(re.search(r"([\d,.]+) MB together", done.stdout)[1].replace(",", "")) * 1e6
    grown = int(re.search(r"grown (\d+)", done.stdout)[1])
    assert 0.75 * said < grown < 1.35 * said + 60e6  # the tokenizer and libraries besides
