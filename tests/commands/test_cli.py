import io
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from minilora import Linear, LoRA, TrainingDiverged, __version__, article, cli, save_adapter
from minilora.language.llamainstance import ALL_INSTANCES
from minilora.verify import selfcheck

ROOT = Path(__file__).parents[2]

PARSERS = cli._parser()._subparsers._group_actions[0].choices


def run(*arguments: str) -> int:
    """Run the command line; argparse leaves by SystemExit, whose code is the process's too."""
    try:
        return cli.main(list(arguments))
    except SystemExit as leave:
        return int(leave.code or 0)


def test_help_teaches(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    for said in ("y = x W^T", "delta = (alpha / rank) B A", "minilora article", "minilora check", "minilora/lora.py"):
        assert said in text


@pytest.mark.parametrize(("command", "parser"), PARSERS.items())
def test_every_option_has_help(command, parser):
    assert all(action.help for action in parser._actions)


def test_help_names_the_defaults_that_exist(capsys):
    assert run("article", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "passes over the data, for the base and for the adapter (default: 100)" in text
    assert "None" not in text
    assert run("generate", "--help") == 0
    text = capsys.readouterr().out
    assert "(default: 0)" in text
    assert "False" not in text


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"minilora {__version__}\n"


def test_article_prints_the_report(small_article, capsys):
    assert run("article", "--epochs", "3", "--rank", "2", "--alpha", "4", "--lr", "0.02", "--seed", "5") == 0
    out, err = capsys.readouterr()
    assert "(rank 2, alpha 4, 3 epochs, batches of 128, lr 0.02, seed 5, float32, CPU" in out
    assert "7. Merged into one layer" in out
    assert err == ""  # no progress bar where there is no terminal


def test_options_reach_the_run(monkeypatch):
    seen = {}
    monkeypatch.setattr(article, "run", lambda **k: seen.update(k))
    monkeypatch.setattr(article, "report", lambda result: "")
    assert run("article") == 0
    backend = seen.pop("backend")
    assert backend.name == "numpy"
    assert seen == {
        "rank": 1, "alpha": 1.0, "epochs": 100, "batch_size": 128, "lr": 0.001, "seed": 0, "dtype": "float32",
        "progress": True, "checkpoint": None,
    }  # fmt: skip
    run("article", "--rank", "3", "--batch-size", "64", "--dtype", "float64")
    assert (seen["rank"], seen["batch_size"], seen["dtype"]) == (3, 64, "float64")


def test_plot_writes_a_figure(small_article, tmp_path, capsys):
    file = tmp_path / "figure.PNG"  # the letters' case is the user's
    assert run("article", "--epochs", "2", "--plot", str(file)) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert f"figure written to {file}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["article", "--rank", "0"], "rank must be at least 1, got 0"),
        (["article", "--rank", "1.5"], "argument --rank: invalid int value: '1.5'"),
        (["article", "--alpha", "nan"], "alpha must be above 0 and finite, got nan"),
        (["article", "--epochs", "-3"], "epochs must be at least 1, got -3"),
        (["article", "--batch-size", "10001"], "batch_size must be at most the 10000 rows of the data, got 10001"),
        (["article", "--lr", "0"], "lr must be above 0 and finite, got 0.0"),
        (["article", "--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["article", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["article", "--plot", "no/such/folder/x.png"], "there is no folder 'no/such/folder'"),
        (["article", "--plot", "figure.xyz"], "ends in 'xyz', expected one of"),
        (["article", "--backend", "torch"], "argument --backend: invalid choice: 'torch'"),
        (["check", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["artcle"], "argument COMMAND: invalid choice: 'artcle'"),
        ([], "the following arguments are required: COMMAND"),
        (["article", "--rank", str(10**23)], "rank 100000000000000000000000 is too large"),
        (["article", "--alpha", "1e300"], "alpha must be between 1e-30 and 1e+30, got 1e+300"),
        (["article", "--alpha", "1e-40"], "alpha must be between 1e-30 and 1e+30, got 1e-40"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(article, "train", lambda *a, **k: pytest.fail("training began"))
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("minilora: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert message in err


def test_what_cannot_be_done_in_the_end_claims_no_checkpoint(tmp_path, capsys):
    for options in (["--rank", str(10**23)], ["--alpha", "1e300"], ["--plot", str(tmp_path)]):
        assert run("article", "--checkpoint", str(tmp_path / "c"), *options) == 2
        assert not (tmp_path / "c").exists()


def test_a_training_that_diverges_is_one_line(small_article, capsys):
    assert run("article", "--lr", "1e38", "--epochs", "5") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "epoch 1" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "error", [ValueError("why"), TypeError("why"), TrainingDiverged("why"), MemoryError(), OSError()]
)
def test_what_a_command_cannot_do_is_one_line(monkeypatch, capsys, error):
    def fails(**k):
        raise error

    monkeypatch.setattr(article, "run", fails)
    assert run("article") == 2
    assert capsys.readouterr() == ("", f"minilora: {str(error) or type(error).__name__}\n")


class Full(io.StringIO):
    """A stream that takes nothing, as one to a full disk."""

    def write(self, text):
        raise OSError(28, "No space left on device")

    def flush(self):
        self.write("")


def test_an_error_that_cannot_be_written_is_an_error_still(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Full())
    assert run("article", "--rank", "0") == run("artcle") == 2


def test_what_a_full_disk_did_not_take_is_let_go(adapter, monkeypatch, capsys):
    """Otherwise Python would try again when it ends, and fail with a traceback."""
    monkeypatch.setattr(sys, "stdout", full := Full())
    discarded = []
    monkeypatch.setattr(cli.streams, "discard", discarded.append)
    assert run("inspect", adapter) == 2
    assert capsys.readouterr().err == "minilora: [Errno 28] No space left on device\n"
    assert discarded == [full]


def test_a_command_runs_in_a_thread_too(capsys):
    """There Python refuses to set what Ctrl-C does."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run("check", "--seed", "-1")))
    thread.start()
    thread.join()
    assert codes == [2]
    assert capsys.readouterr().err == "minilora: seed must be at least 0, got -1\n"


def test_ctrl_c_ends_cleanly(monkeypatch, capsys):
    def interrupted(**k):
        raise KeyboardInterrupt

    monkeypatch.setattr(article, "run", interrupted)
    assert run("article") == 130
    assert capsys.readouterr().err == "\nminilora: interrupted\n"


def in_shell(command, **options):
    """Run a command line in a shell, ``minilora`` standing for this one; return its exit code, stdout and stderr."""
    text = f'minilora() {{ {shlex.quote(sys.executable)} -m minilora "$@"; }}; {command}'
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, cwd=ROOT, **options)
    return done.returncode, done.stdout, done.stderr


posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such shell, nor SIGPIPE's exit code")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A saved adapter, for a command that computes and prints in no time: ``minilora inspect``."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(folder, {"fc": LoRA.init(3, 2, rank=1, alpha=1, rng=np.random.default_rng(0))})
    return str(folder)


@posix
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [["inspect"], ["--help"]])
def test_a_reader_that_has_seen_enough_ends_it_quietly(command, unbuffered, adapter):
    """As in ``minilora inspect | head``: no traceback, no message, and the exit code that shells give to SIGPIPE."""
    pipe, env = subprocess.PIPE, {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "minilora", *command, *[adapter] * (command == ["inspect"])]
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, env=env)
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 141


@posix
@pytest.mark.long
@pytest.mark.parametrize(
    ("command", "code", "err", "unbuffered"),
    [
        ("minilora inspect ADAPTER >&-", 0, "", ""),
        ("minilora inspect ADAPTER >&- 2>&- <&-", 0, "", "1"),
        ("minilora check --seed -1 2>&-", 2, "", ""),
        ("minilora --help >&-", 0, "", ""),
        ("minilora artcle 2>&-", 2, "", "1"),
        ("minilora check --seed -1 2>/dev/full", 2, "", ""),
        ("minilora artcle 2>/dev/full", 2, "", ""),
        ("minilora --help >/dev/full", 2, "minilora: [Errno 28] No space left on device\n", ""),
        ("minilora --help >/dev/full", 2, "minilora: [Errno 28] No space left on device\n", "1"),
        ("minilora inspect ADAPTER >/dev/full", 2, "minilora: [Errno 28] No space left on device\n", ""),
    ],
)
def test_closed_and_full_streams_end_in_no_traceback(command, code, err, unbuffered, adapter):
    command = command.replace("ADAPTER", shlex.quote(adapter))
    assert in_shell(command, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}) == (code, "", err)


@posix
def test_a_file_never_takes_the_place_of_a_closed_stream(tmp_path):
    """The first file that is opened gets the lowest number: it must not be the one that is printed to."""
    script = "import os, sys, minilora.commands.streams as s; s.open_streams(); print('printed')"
    script += (
        "; print(os.open('f', os.O_CREAT) > 2); print(sys.stdout.name if sys.stdout else None, file=open('out', 'w'))"
    )
    code, out, err = in_shell(f"cd {tmp_path}; {sys.executable} -c {shlex.quote(script)} >&- 2>&- <&-")
    assert (code, out, err) == (0, "", "")
    assert (tmp_path / "f").read_bytes() == b""


def test_ctrl_c_during_the_imports_ends_cleanly():
    """The signal arrives while NumPy is imported, where its own code turns it into an ImportError."""
    script = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with the signal ignored
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt as error:
                raise ImportError("a bad install") from error
sys.meta_path.insert(0, Interrupting())
from minilora.cli import main
sys.exit(main(["check"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nminilora: interrupted\n")


def test_the_command_line_imports_numpy_when_it_runs():
    script = "import sys, minilora.cli; print(*{'numpy', 'tqdm', 'safetensors'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "\n"


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_ctrl_c_is_as_before_after_the_command(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        assert run("check", "--seed", "-1") == 2
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_streams_that_work_stay(capsys):
    before = sys.stdin, sys.stdout, sys.stderr
    cli.streams.open_streams()
    assert (sys.stdin, sys.stdout, sys.stderr) == before


def test_more_memory_than_there_is_is_one_line(small_article, capsys, monkeypatch):
    monkeypatch.setattr(article, "train", lambda *a, **k: pytest.fail("training began"))
    assert run("article", "--epochs", "1", "--rank", str(10**14)) == 2
    err = capsys.readouterr().err
    assert err.startswith("minilora: Unable to allocate")
    assert err.count("\n") == 1


def test_a_missing_matplotlib_is_named_before_the_work(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(article, "run", lambda **k: pytest.fail("the work began"))
    assert run("article", "--plot", "x.png") == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "minilora", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"minilora {__version__}\n")


# --- minilora check -----------------------------------------------------------------------------


def test_check_proves_every_gradient_of_this_installation(small_check, capsys):
    assert run("check") == 0
    out = capsys.readouterr().out
    for name in (
        "Linear x",
        "LoRA lora_A",
        "LoRALinear lora_B",
        "MLP fc1.weight",
        "mse",
        "cross_entropy",
        "residual_form of LoRA",
        "residual_form of LoRALinear",
    ):
        assert name in out
    rows = [line for line in out.splitlines() if line.endswith("ok")]
    assert f"{len(rows)} of {len(rows)} gradients agree" in out
    assert "WRONG" not in out


@pytest.mark.parametrize("cls", [Linear, LoRA])
def test_check_fails_on_a_gradient_off_by_a_billionth(monkeypatch, capsys, small_check, cls):
    right = cls.backward

    def wrong(self, *a, **k):
        dx, grads = right(self, *a, **k)
        for grad in grads.values():
            grad[..., 0] += 1e-9
        return dx, grads

    monkeypatch.setattr(cls, "backward", wrong)
    assert run("check") == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_failing_check_ends_with_what_is_wrong(monkeypatch, capsys, small_check):
    right = LoRA.backward

    def unscaled(self, *a, **k):
        dx, grads = right(self, *a, **k)
        return dx, grads | {"lora_B": grads["lora_B"] * 0.75}

    monkeypatch.setattr(LoRA, "backward", unscaled)
    assert run("check") == 1
    table, end = capsys.readouterr().out.split("\nThe wrong ones again:\n")
    wrong = [line for line in table.splitlines() if line.endswith("WRONG")]
    head, *repeated, _, summary = end.splitlines()
    assert head == table.splitlines()[0]
    assert [line for line in repeated if line.endswith("WRONG")] == wrong
    assert len(wrong) > 5
    assert all("lora_B" in line for line in wrong)
    plain = [i for i, line in enumerate(repeated) if line.startswith(("LoRA lora_B", "LoRALinear lora_B"))]
    assert len(plain) >= 2
    for slopes, factor in (repeated[i + 1 : i + 3] for i in plain):
        analytic, numeric = (float(number) for number in re.findall(r" is ([^,]+)", slopes))
        assert analytic == pytest.approx(0.75 * numeric, rel=1e-6)
        assert factor == "    every slope is off by the same factor, 0.75"
    rows = table.splitlines()[1:]
    assert summary.startswith(f"{len(rows) - len(wrong)} of {len(rows)} gradients agree")


def test_the_columns_of_check_do_not_touch(small_check, capsys):
    assert run("check") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith("ok")]
    names = [
        f"{title.split('  ')[0]} {block.name}"
        for title, found in selfcheck.prove(instances=ALL_INSTANCES)
        for block in found.blocks
    ]
    ends = {len(row) for row in rows}
    assert len(ends) == 1
    for row, name in zip(rows, names, strict=True):
        assert row.startswith(f"{name}  ")
        assert row[max(map(len, names)) + 2 :].startswith("N=")


def test_check_prints_what_it_measured(small_check, capsys):
    assert run("check") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith("ok")]
    blocks = [block for _, report in selfcheck.prove(instances=ALL_INSTANCES) for block in report.blocks]
    assert len({block.allowed for block in blocks}) > 1
    for row, block in zip(rows, blocks, strict=True):
        assert row.endswith(f"{block.checked}{block.error:10.1e}{block.allowed:10.1e}  ok")


@pytest.mark.long
def test_check_says_where_it_computed(small_check, standin, capsys):
    assert run("check", "--backend", "cupy") == 0
    assert capsys.readouterr().out.endswith(f"(complex step, float64, {standin.device})\n")
    assert standin.device != "CPU"


def test_check_takes_a_seed(small_check, capsys):
    outputs = []
    for seed in ("0", "1"):
        assert run("check", "--seed", seed) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] != outputs[1]
