"""``minilora check``: compare every hand-written gradient of this installation with measured slopes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .console import Defaults, add_backend, chosen_backend

if TYPE_CHECKING:
    from ..checks import Array
    from ..layer import Layer
    from ..verify.instances import Drawing, Row


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "check",
        help="check every hand-written gradient of this installation against measured slopes",
        description=(
            "Measure the slope of every forward pass by complex step, at several sizes, and compare it with the "
            "hand-written backward. Exit code 1 if any gradient is wrong."
        ),
        formatter_class=Defaults,
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the values")
    add_backend(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print a line for each gradient, and repeat the wrong ones at the end. Return 1 if one is wrong."""
    from ..verify.instances import prove

    backend = chosen_backend(options.backend)
    proof = list(prove(backend, options.seed, all_instances()))  # a bad seed is reported before the table's head
    blocks = [(title.split("  "), block) for title, report in proof for block in report.blocks]
    names = [f"{name} {block.name}" for (name, _), block in blocks]
    width, places = max(map(len, names)), max(len(at) for (_, at), _ in blocks)
    head = f"{'gradient of':{width}}  {'at':{places}}{'checked':>14}{'error':>10}{'allowed':>10}"
    print(head)
    wrong = []
    for name, ((_, at), block) in zip(names, blocks, strict=True):
        numbers = f"{block.checked:>14}{block.error:10.1e}{block.allowed:10.1e}"
        row = f"{name:{width}}  {at:{places}}{numbers}  {'ok' if block.passed else 'WRONG'}"
        print(row)
        if not block.passed:
            slopes = f"{block.analytic:.9g}, and the measured slope is {block.numeric:.9g}"
            at_worst = "along one direction" if block.worst is None else f"at {block.worst}"
            wrong += [row, f"    {at_worst} it is {slopes}", *(f"    {sentence}" for sentence in block.diagnosis)]
    if wrong:
        print("\nWrong gradients:", head, *wrong, sep="\n")
    count, failed = len(blocks), sum(not block.passed for _, block in blocks)
    how = f"complex step, float64, {backend.device}"
    print(f"\n{count - failed} of {count} gradients agree with the measured slope ({how})")
    return 1 if failed else 0


def all_instances() -> dict[str, Row]:
    """Return an instance of each layer, and of a decoder."""
    from ..verify.instances import INSTANCES

    return INSTANCES | {"Llama, LoRA": _llama}


def _llama(d: Drawing) -> tuple[Layer, Array]:
    """Return a decoder with adapters in its first and last blocks."""
    import numpy as np

    from ..adaptation import adapt
    from ..backend import backend_or_numpy
    from ..language.config import LlamaConfig
    from ..language.llama import Llama
    from ..layers.rotary import frequencies
    from ..verify.instances import EPS, HIDDEN, ROTARY_BASE, moved

    K, g, D = d.integer(1, 2), d.integer(1, 3), 2 * d.integer(1, 2)
    config = LlamaConfig(
        vocab_size=max(min(d.out_features, 7), 3), hidden_size=min(d.in_features, 7), intermediate_size=HIDDEN,
        num_hidden_layers=2, num_attention_heads=K * g, num_key_value_heads=K, head_dim=D, rms_norm_eps=EPS,
        frequencies=frequencies(D, ROTARY_BASE), tie_word_embeddings=True,
    )  # fmt: skip
    llama = Llama.build(config, {name: d.randn(*shape) / shape[-1] ** 0.5 for name, shape in config.shapes().items()})
    targets = ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]
    adapted = adapt(llama, targets, rank=min(d.rank, 2), alpha=d.rank, rng=d.rng)
    text = backend_or_numpy(d.backend).asarray(np.arange(3)[None])  # distinct: equal values would hide the queries
    return moved(d, adapted), text
