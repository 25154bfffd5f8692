"""A fine-tuning computes on as many cores as there are, each with one BLAS thread, and to the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minilora.language.finetuning import cores

from ...support.command_line import finetune

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")


ROOT = Path(__file__).parents[3]


def test_any_number_of_workers_writes_the_same_adapter(folder):
    found = set()
    for workers in ("1", "2", "5"):
        assert finetune("--workers", workers, "--batch-size", "5", "--micro-batch", "1", "--steps", "3") == 0
        found.add((folder / "a" / "adapter_model.safetensors").read_bytes())
    assert len(found) == 1


def test_a_command_has_one_blas_thread_from_its_start(folder):
    """Set before NumPy is loaded, in this process alone, whatever the environment says."""
    script = """if True:
        import os, sys
        from minilora import cli
        from minilora.cli import finetune, generate
        def tell(options):
            assert "numpy" in sys.modules
            from threadpoolctl import threadpool_info
            print(*(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"))
            return 0
        finetune.run = generate.run = tell
        cli.main(sys.argv[1:])"""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    for command, expected in (
        (["finetune", "text", "--save", "a"], "1"),
        (["generate", "the"], str(min(2, cores.core_count()))),
    ):
        done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, env=environment)
        assert set(done.stdout.split()) <= {expected}, done.stderr


def test_a_command_in_a_running_program_leaves_the_environment(folder):
    before = dict(os.environ)
    assert finetune("--steps", "1") == 0
    assert dict(os.environ) == before


def test_workers_follow_the_cores_and_the_library(monkeypatch, standin):
    for available, expected in ((1, 1), (2, 2), (64, 2)):
        monkeypatch.setattr(cores, "core_count", lambda available=available: available)
        assert cores.worker_count(None, "numpy") == expected
        assert cores.worker_count(None, standin.name) == 1
    assert cores.worker_count(5, "numpy") == 5
    with pytest.raises(ValueError, match="workers = 5 is for NumPy, expected 1 with --backend cupy"):
        cores.worker_count(5, standin.name)
