"""What only a GPU can show: ``pytest -m gpu``. The tests of test_devices.py and test_cupy_standin.py run there too."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from minilora import Linear, LoRA, LoRALinear, train
from minilora.cli import main

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [Linear, LoRA, LoRALinear])
def test_wide_layers_agree_with_the_cpu(gpu, kind, dtype):
    """At widths where cuBLAS takes its fast paths; with TF32 on, float32 would be off by 1e-3."""
    rng = np.random.default_rng(0)
    W, A, B = (rng.standard_normal(shape).astype(dtype) / 32 for shape in ((512, 1024), (8, 1024), (512, 8)))
    x, dy = (rng.standard_normal((256, width)).astype(dtype) for width in (1024, 512))

    def results(put):
        linear, lora = Linear(put(W)), LoRA(put(A), put(B), 8.0)
        layer = {Linear: linear, LoRA: lora, LoRALinear: LoRALinear(linear, lora)}[kind]
        y, cache = layer.forward(put(x))
        dx, grads = layer.backward(put(dy), cache)
        return {"y": y, "dx": dx, **grads}

    there, here = results(gpu.asarray), results(np.asarray)
    tolerance = {"float32": 5e-5, "float64": 1e-12}[dtype]
    for name, expected in here.items():
        error = np.abs(gpu.to_numpy(there[name]) - expected).max()
        assert error <= tolerance * max(1.0, np.abs(expected).max()), f"{name}: {error}"


def test_memory_stays_flat_over_a_hundred_steps(gpu):
    rng = np.random.default_rng(3)
    layer = LoRALinear.from_linear(Linear.init(256, 128, rng=rng, backend=gpu), rank=4, alpha=4.0, rng=rng)
    X, Y = (gpu.asarray(rng.standard_normal((1600, width)), "float32") for width in (256, 128))
    pool = gpu.xp.get_default_memory_pool()

    def fit(epochs):
        train(layer, X, Y, epochs=epochs, batch_size=64, log_every=epochs, rng=rng)
        gpu.synchronize()
        return pool.used_bytes(), pool.total_bytes()

    fit(1)
    used, held = fit(1)
    used_later, held_later = fit(4)
    assert used_later == used
    assert held_later <= held + 2**20  # the pool may cut its blocks in another way, and that is all


def test_tf32_is_off(gpu):
    """10 bits of mantissa would show: 1 + 2^-12 is 1 in TF32."""
    assert os.environ.get("CUPY_TF32", "0") == "0"
    a = gpu.asarray(np.full((256, 256), 1 + 2.0**-12, "float32"))
    identity = gpu.asarray(np.eye(256, dtype="float32"))
    assert float((a @ identity).max()) == 1 + 2.0**-12


@pytest.mark.parametrize("command", [["check"], ["article", "--epochs", "1"]])
def test_the_command_line_computes_on_the_gpu(gpu, capsys, command):
    assert main([*command, "--backend", "cupy"]) == 0
    assert gpu.device in capsys.readouterr().out


def test_a_step_never_waits_for_the_device(gpu):
    """Steps are handed over while an earlier, long piece of work keeps the device busy: the host is done first."""
    program = """
        import time
        import numpy as np
        from minilora import Adam, LoRA, get_backend
        from minilora.training import backpropagate
        gpu = get_backend("cupy")
        rng = np.random.default_rng(0)
        adapter = LoRA.init(64, 32, rank=2, alpha=2, rng=rng, backend=gpu)
        adapter.lora_B += 0.1
        X, Y = (gpu.asarray(rng.standard_normal((512, width)), "float32") for width in (64, 32))
        rows = gpu.asarray(rng.integers(0, 512, (40, 64)))
        big = gpu.asarray(rng.standard_normal((8192, 8192)), "float32")
        optimizer = Adam(adapter.trainable())
        def steps():
            for batch in rows:
                optimizer.step(backpropagate(adapter, X[batch], Y[batch]))
        steps(); big @ big; gpu.synchronize()
        done = gpu.xp.cuda.Event()
        for _ in range(20):
            big @ big
        done.record()
        steps()
        print("handed over first" if not done.done else "waited")
        gpu.synchronize()
    """
    finished = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert finished.stdout.strip() == "handed over first", finished.stdout + finished.stderr
