"""Choosing a library, and saying why one cannot be had."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import minilora
from minilora import BackendUnavailable, article, get_backend
from minilora.backend import all_finite, backend_of, check_apart
from minilora.cli import main

from .support import cupy_standin
from .support.cupy_standin import traffic


class CUDARuntimeError(RuntimeError):
    pass


def failing(message, kind=CUDARuntimeError):
    def fail(*_, **__):
        raise kind(message)

    return fail


def broken_cupy(**changes):
    """Return a CuPy that works but for what is changed."""
    cupy = cupy_standin.make()
    vars(cupy).update(changes)
    return cupy


NO_DRIVER = "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
INSTALL = r'pip install "minilora\[cuda12\]" \(.*\), or cuda13, whichever your driver runs$'
DRIVER = (
    "check the driver with nvidia-smi, that the wheel's CUDA version fits it, and that the wheel's "
    r"\[ctk\] extra is installed$"
)
UNUSABLE = {
    "not installed": (None, r"CuPy is not installed \(.*\): " + INSTALL),
    "no driver": (broken_cupy(arange=failing(NO_DRIVER)), rf"CuPy cannot compute here \(.*{NO_DRIVER}\): {DRIVER}"),
    "no compiler": (
        broken_cupy(arange=failing("libnvrtc.so.12: cannot open", ImportError)),
        rf"CuPy cannot compute here \(ImportError: libnvrtc.so.12: cannot open\): {DRIVER}",
    ),
    "wrong numbers": (
        broken_cupy(arange=lambda *_, **__: np.ones(4)),
        r"CuPy computed 2 \+ 3 \+ 6 \+ 11 = 8: the device or its driver is broken$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", UNUSABLE)
def test_cupy_is_refused_with_the_reason_that_auto_says_once(monkeypatch, why):
    module, message = UNUSABLE[why]
    monkeypatch.setitem(sys.modules, "cupy", module)
    with pytest.raises(BackendUnavailable, match=message):
        get_backend("cupy")
    with pytest.warns(UserWarning, match=f"(?s)computing with NumPy: .*{message}") as notes:
        assert get_backend("auto") is get_backend("numpy")
    assert len(notes) == 1


@pytest.mark.parametrize("error", [ImportError("libcuda.so.1: cannot open"), OSError("no such library")])
def test_a_broken_installation_is_told_from_a_missing_one(monkeypatch, error):
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "cupy":
                raise error

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    with pytest.raises(BackendUnavailable, match=rf"not installed correctly \({error}\)"):
        get_backend("cupy")


def test_auto_takes_cupy_where_it_works(standin):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_backend("auto").name == "cupy"


@pytest.mark.parametrize("name", ["torch", "", "NumPy", None])
def test_an_unknown_backend_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"'numpy', 'cupy' or 'auto', got {name!r}"):
        get_backend(name)


def test_numpy_needs_no_copies_and_no_waiting():
    backend = get_backend("numpy")
    host = np.ones(3)
    assert backend.asarray(host) is host
    assert backend.to_numpy(host) is host
    assert backend.asarray([1, 2], "float32").dtype == np.float32
    assert backend.zeros((2, 3), "float64").shape == (2, 3)
    assert "CPU" in backend.device
    backend.synchronize()


def test_arrays_go_to_the_device_and_come_back(standin):
    host = np.arange(6.0).reshape(2, 3)
    there = standin.asarray(host, "float32")
    assert backend_of(there).name == standin.name == "cupy"
    assert there.dtype == np.float32
    np.testing.assert_array_equal(standin.to_numpy(there), host)
    assert standin.zeros((2,), "float64").dtype == np.float64


def test_synchronize_waits_and_a_device_has_a_name(standin):
    traffic.reset()
    standin.synchronize()
    assert traffic.waits == 1
    assert standin.device == "the device that is not there"


def test_a_library_without_cuda_in_cupys_place_still_computes(monkeypatch):
    cupy = cupy_standin.make(kernels=False)
    for name in ("cuda", "is_available", "shares_memory"):
        monkeypatch.setitem(cupy_standin.API, "cupy", {k: v for k, v in cupy_standin.API["cupy"].items() if k != name})
        vars(cupy).pop(name, None)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    backend = get_backend("cupy")
    assert backend.device == "GPU"
    traffic.reset()
    backend.synchronize()
    assert traffic.waits == 1, "a number fetched from the device waits for it"
    a = backend.zeros((2,), "float64")
    check_apart({"a": a, "b": a[:1]})  # which nothing tells there
    result = article.run(backend=backend, epochs=1, n=40, batch_size=8, in_features=5, out_features=4)
    assert np.isfinite(result.delta).all()


def test_a_device_whose_name_cannot_be_read_is_a_gpu(monkeypatch):
    properties = SimpleNamespace(getDevice=failing("cudaErrorUnknown"))
    monkeypatch.setitem(sys.modules, "cupy", broken_cupy(cuda=SimpleNamespace(runtime=properties)))
    assert get_backend("cupy").device == "GPU"


def test_finite_is_asked_once_for_many_arrays(standin):
    good, bad = standin.asarray(np.ones(3)), standin.asarray(np.array([[1.0, np.inf]]))
    for arrays, expected in (([good, good], True), ([good, bad, good], False), ([bad], False)):
        traffic.reset()
        assert all_finite(arrays) is expected
        assert traffic.waits == 1
    assert all_finite([]) is True
    assert all_finite([np.float64(1), np.ones(2)]) is True
    assert all_finite([np.ones(2), np.float32(np.nan)]) is False


def test_an_array_of_neither_library_has_no_backend(standin):
    with pytest.raises(TypeError, match="expected a NumPy or CuPy array, got list"):
        backend_of([1.0])


# The command line.

SMALL = ["article", "--epochs", "1"]


@pytest.mark.parametrize("command", [SMALL, ["check"]], ids=["article", "check"])
def test_a_wrong_backend_in_the_environment_is_one_clear_line(monkeypatch, capsys, small_article, small_check, command):
    monkeypatch.setenv("MINILORA_BACKEND", "cuda")
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "minilora: backend must be 'numpy', 'cupy' or 'auto', got 'cuda'\n"
    assert main([*command, "--backend", "numpy"]) == 0, "what is typed wins"


def test_the_command_line_never_falls_back_from_cupy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main([*SMALL, "--backend", "cupy"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("minilora: CuPy is not installed")
    assert err.count("\n") == 1


def test_the_command_line_says_once_that_auto_fell_back(monkeypatch, capsys, small_article):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main([*SMALL, "--backend", "auto"]) == 0
    out, err = capsys.readouterr()
    assert err.count("minilora: computing with NumPy: CuPy is not installed") == 1
    assert "CPU" in out


def test_a_numpy_machine_never_tries_to_import_cupy():
    program = """
import sys
class Trap:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("cupy", "cupyx", "torch"):
            raise AssertionError(f"somebody imports {name}")
sys.meta_path.insert(0, Trap)
import numpy as np
import minilora
from minilora.cli import main
from minilora.verify import instances
instances.INSTANCE_SIZES = instances.INSTANCE_SIZES[:1]
rng = np.random.default_rng(0)
layer = minilora.LoRALinear.from_linear(minilora.Linear.init(4, 3, rng=rng), rank=2, alpha=1, rng=rng)
X, Y = rng.standard_normal((2, 9, 4)).astype("float32")[0], rng.standard_normal((9, 3)).astype("float32")
minilora.train(layer, X, Y, epochs=2, batch_size=3, rng=rng)
try:
    layer(rng)
except TypeError:
    pass
minilora.best_adapter(X, Y, rank=1)
assert main(["check"]) == 0
assert "cupy" not in sys.modules
print("done")
"""
    environment = {k: v for k, v in os.environ.items() if k != "MINILORA_BACKEND"}
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert finished.stdout.endswith("done\n"), finished.stderr


def test_an_array_of_an_unknown_library_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    with pytest.raises(TypeError, match="expected a NumPy or CuPy array, got ndarray"):
        backend_of(cupy_standin.ndarray(np.ones(2)))


def test_reading_the_mathematics_one_cannot_tell_that_gpus_exist():
    package = Path(minilora.__file__).parent
    for name in ("lora.py", "linear.py"):
        assert not re.search(r"gpu|cuda|cupy|device", (package / name).read_text(), re.IGNORECASE)
    for name in ("lora.py", "linear.py", "losses.py"):
        used = set(re.findall(r"\bnp\.([\w.]+)", (package / name).read_text()))
        assert used <= {"random.Generator", "dtype"}, "NumPy is there for annotations, and touches no array"
