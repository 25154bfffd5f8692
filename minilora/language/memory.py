"""The memory that training needs, computed from a model's sizes or measured, next to what the machine has.

A Llama decoder has seven matrices in each layer, and some other arrays:

    q (HD, d)   k (KD, d)   v (KD, d)   o (d, HD)   gate (m, d)   up (m, d)   down (d, m)
    two norms (d,) in each layer and one at the end; the embedding (V, d), and the head (V, d) unless it is tied;
    a bias for each matrix that has one according to the configuration

The letters are those of `LlamaConfig`: H query heads and K key-value heads, each D wide.

A step keeps these arrays until its backward has used them. Sizes are numbers per token and layer:

    x of both norms          2 d                   needed by the norms
    q, k, v, attention's y   2 HD + 2 KD           needed by attention; its T x T matrix is recomputed, never kept
    q and k before a norm    HD + KD               needed only by the norms of q and k, if there are any
    y of the first norm      d                     needed only for dW or dA of q, k or v
    y of the second norm     d                     needed only for dW or dA of gate or up
    gate, up                 2 m                   needed by the activation and the product
    their product            m                     needed only for dW or dA of down

So adapting a matrix does not avoid keeping its input, and adds r numbers. Memory is saved only at the matrices without
an adapter, since a frozen linear layer keeps nothing.

A mixture of experts replaces the last three matrices with those of all E experts, gate_up_proj (E, 2 m, d) and
down_proj (E, d, m), and sometimes a shared expert: an MLP of another width, m_s. All of these take memory, but a token
keeps only the activations of its K experts:

    y of the second norm     d                     needed by the router, the gates, and dA of gate_up: kept once
    scores                   E                     needed by the router's softmax
    gate, up                 2 m K                 as above, for each of the K experts, and 2 m_s for the shared one
    their product            m K                   needed only for dW or dA of down_proj; m_s for the shared one
    the shared expert's y    d + 1                 needed by its gate, as is the gate's own output

An expert's output need not be kept: the router's gradient is the product of this output and dy. It equals the product
of z and dz, and dz is computed anyway.

With gradient checkpointing, a step keeps each layer's input, d, and the activations of one layer at a time.

This library's layers keep more, such as attention's T x T matrix. `cache_bytes` and `step_bytes` measure this, and
`parameter_bytes` measures the arrays of a model. `StepMemory` has the total for fine-tuning, and `machine_memory`
returns the memory that is available, also inside a container.

Sources: Rajbhandari et al., "ZeRO", arXiv 1910.02054, section 3.1, for 16 bytes per weight in full fine-tuning;
Dettmers et al., "QLoRA", arXiv 2305.14314, section 3, for 4 bits and the constants of each block.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..backend import Backend
from ..checks import Array, check_choice, check_flag, check_integer, check_sizes, is_array
from ..extras import needed
from ..fast.blockwise import CPU, GPU
from ..layer import Layer, Record, arrays_of
from ..layers.rotary import frequencies
from ..training import EVALUATION_ROWS
from .config import LlamaConfig
from .llama import CheckpointedBlock

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXPERT_ARRAYS = ("experts.gate_up_proj", "experts.down_proj")
"""The arrays of a mixture's experts, for PEFT's ``target_parameters``; each expert has its own adapter."""

CONSTANTS = {16: 0.0, 8: 32 / 4096, 4: 8 / 64 + 32 / (64 * 256)}
"""Bits per weight for the constants of a block: at 8 bits one float32 per 4096 weights, at 4 bits as in QLoRA."""


LLAMA_2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, head_dim=128, rms_norm_eps=1e-5, frequencies=frequencies(128, 10000.0),
)  # fmt: skip


def training_memory(
    config: LlamaConfig, *, tokens: int, rank: int | None = None, targets: Sequence[str] = MATRICES, bits: int = 16,
    recompute: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Return the bytes that training needs, by purpose. The sum is a lower bound; libraries need more.

    Parameters
    ----------
    config : LlamaConfig
        The model's sizes.
    tokens : int
        The number of tokens in a batch: the number of sequences times their length.
    rank : int, optional
        The rank of the adapters. If None, all weights train.
    targets : sequence of str
        The adapted matrices, from `MATRICES`; for a mixture also from `EXPERT_ARRAYS`, where each expert has this rank.
        As in PEFT, ``gate_proj``, ``up_proj`` and ``down_proj`` match only shared experts and MLPs.
    bits : {16, 8, 4}
        The bits per frozen weight of the layers' matrices. The embedding, head and norms keep 16, as in QLoRA.
    recompute : bool
        Whether to use gradient checkpointing: only each layer's input is kept, and backward reruns the forward.

    Returns
    -------
    dict of str to int
        The bytes of ``weights``, ``trained`` (a float32 copy of what trains, besides the weights), ``gradients``,
        ``Adam``, ``activations`` (16 bits each) and ``logits`` (32 bits each).

    Raises
    ------
    ValueError, TypeError
        If a number is out of range, a target is unknown, or all weights would train in fewer than 16 bits.
    """
    known = MATRICES if config.mixture is None else MATRICES + EXPERT_ARRAYS
    (tokens,), recompute = check_sizes(tokens=tokens), check_flag("recompute", recompute)
    check_choice("bits", bits, CONSTANTS)  # type: ignore[arg-type]
    for target in targets:
        check_choice("targets", target, known)
    shapes, (matrices, elsewhere) = _matrices(config), count_numbers(config)
    layers, d = config.num_hidden_layers, config.hidden_size
    if rank is None:
        if bits != 16:
            raise ValueError(f"bits={bits} with rank=None: all weights train, expected bits=16")
        trained, gradient, targets = matrices + elsewhere, 2, known
    else:
        rank, gradient = check_integer("rank", rank, at_least=1), 4  # adapters train in float32
        adapted = [shape for path, shape in shapes.items() if _is_target(path, targets)]
        trained = sum(rank * math.prod(shape[:-2]) * sum(shape[-2:]) for shape in adapted)
    layer_sizes = [_layer_size(config, shapes, layer, targets, rank or 0) for layer in range(layers)]
    activations = (layers - 1) * d + max(layer_sizes) if recompute else sum(layer_sizes)
    return {
        "weights": round(matrices * (bits + CONSTANTS[bits]) / 8 + 2 * elsewhere),
        "trained": 4 * trained,
        "gradients": gradient * trained,
        "Adam": 8 * trained,
        "activations": 2 * tokens * activations,
        "logits": 4 * tokens * config.vocab_size,
    }


def active_numbers(config: LlamaConfig) -> int:
    """Return the number of a decoder's parameters that one position uses: of a mixture, only its chosen experts."""
    total = sum(map(math.prod, config.shapes().values()))
    mixture = config.mixture
    if mixture is None:
        return total
    layers = sum(map(mixture.has_mixture, range(config.num_hidden_layers)))
    idle = mixture.num_experts - mixture.num_experts_per_tok
    return total - layers * idle * 3 * mixture.moe_intermediate_size * config.hidden_size


def count_numbers(config: LlamaConfig) -> tuple[int, int]:
    """Return the number of parameters in all layers' matrices, and in everything else, such as norms and routers."""
    matrices = sum(map(math.prod, _matrices(config).values()))
    return matrices, sum(map(math.prod, config.shapes().values())) - matrices


def _matrices(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all layers' matrices, by path; all experts of a mixture share an array."""
    return {path: shape for path, shape in config.shapes().items() if _is_target(path, MATRICES + EXPERT_ARRAYS)}


def _is_target(path: str, targets: Sequence[str]) -> bool:
    """Return whether an array is one of the targets, or the weight of one."""
    return any(path.endswith(f".{name}" if name in EXPERT_ARRAYS else f".{name}.weight") for name in targets)


def _layer_size(config: LlamaConfig, matrices: Iterable[str], layer: int, targets: Sequence[str], rank: int) -> int:
    """Return how many numbers one layer keeps per token, including those of its adapters."""
    d, D = config.hidden_size, config.head_dim
    attention = (2 + config.qk_norm) * D * (config.num_attention_heads + config.num_key_value_heads)
    first = d if {"q_proj", "k_proj", "v_proj"} & set(targets) else 0
    own = {path for path in matrices if path.startswith(f"model.layers.{layer}.")}
    mixture = config.mixture
    if mixture is None or not mixture.has_mixture(layer):
        second = d if {"gate_proj", "up_proj"} & set(targets) else 0
        inner, experts = _mlp_size(config.intermediate_size, "down_proj" in targets), 0
    else:
        second, experts = d, mixture.num_experts_per_tok
        inner = mixture.num_experts
        inner += experts * _mlp_size(mixture.moe_intermediate_size, "experts.down_proj" in targets)
        if mixture.shared_expert_intermediate_size is not None:
            inner += _mlp_size(mixture.shared_expert_intermediate_size, "down_proj" in targets) + d + 1
    adapted = [experts if path.endswith(EXPERT_ARRAYS) else 1 for path in own if _is_target(path, targets)]
    return 2 * d + attention + first + second + inner + rank * sum(adapted)


def _mlp_size(width: int, trains_down: bool) -> int:
    """Return how many numbers a gated MLP keeps per token: gate, up and, if down is trained, their product."""
    return 2 * width + (width if trains_down else 0)


# --- measured on a model ------------------------------------------------------------------------------------------


def parameter_bytes(model: Layer) -> int:
    """Return the bytes of a model's arrays. A tied array counts once."""
    return sum({id(array): array.nbytes for array in arrays_of(model)}.values())


def cache_bytes(cache: Record) -> int:
    """Return the bytes of the arrays in a cache. Each counts once, and the model's own arrays do not count."""
    own = {id(_owner(array)) for array in arrays_of(cache.layer)}
    sizes: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, (tuple, list)):
            for part in value:
                visit(part)
        elif is_array(value):
            array = _owner(getattr(value, "ids", value))  # one-hot rows keep only their ids
            sizes[id(array)] = array.nbytes

    visit(cache)
    return sum(size for key, size in sizes.items() if key not in own)


def step_bytes(cache: Record) -> int:
    """Return the peak bytes of a model's cache during backward, including one block's if it is checkpointed."""
    again = (record.layer.block_cache(*record.kept) for record in _checkpointed(cache))
    return max((cache_bytes(cache._replace(kept=(cache.kept, whole))) for whole in again), default=cache_bytes(cache))


def _checkpointed(cache: Any) -> Iterator[Any]:
    """Yield the caches of the checkpointed blocks in a cache."""
    if isinstance(cache, (tuple, list)):
        if isinstance(cache, Record) and isinstance(cache.layer, CheckpointedBlock):
            yield cache
        else:
            for part in cache:
                yield from _checkpointed(part)


def _owner(array: Array) -> Array:
    """Return the array that owns a view's memory."""
    return array if getattr(array, "base", None) is None or not is_array(array.base) else _owner(array.base)


def megabytes(count: int) -> str:
    """Format a number of bytes as megabytes, without the unit."""
    return f"{count / 1e6:,.1f}"


@dataclass(frozen=True)
class StepMemory:
    """The memory that fine-tuning needs with rows of one length, in bytes."""

    weights: int  # the model's arrays
    state: int  # the gradients and Adam's two moments
    first: int  # the cache of one row
    further: int  # the cache of each further row
    logits: int  # the logits of one row
    measured: float  # the rows per evaluation, in units of rows of this length

    def activations(self, rows: int) -> int:
        """Return the bytes of the caches that the backward of `rows` rows needs."""
        return self.first + (rows - 1) * self.further

    def all_logits(self, rows: int) -> int:
        """Return the bytes of the largest logits if a step has `rows` rows at a time; evaluation may have more."""
        return math.ceil(max(rows, self.measured) * self.logits)

    def together(self, rows: int) -> int:
        """Return the total bytes if a step has `rows` rows at a time."""
        return self.weights + self.state + self.activations(rows) + self.all_logits(rows)

    def rows_that_fit(self, free: float, most: int, parts: int) -> int:
        """Return how many rows, at most `most`, each of `parts` parallel parts may have; 0 if not even one fits."""
        return bisect_right(range(1, most + 1), free, key=lambda rows: self.together(rows * parts))


def measured_memory(model: Any, X: Array, backend: Backend) -> Callable[[int, int, tuple[int, int]], StepMemory]:
    """Return a function from row length, workers and the shape of the held-out rows to the memory of fine-tuning."""
    # This runs the forward of one row of X, then of two, shortened if they are long: otherwise it would need the memory
    # that it predicts. All rows need equally many bytes. Up to the length `page`, attention keeps its T x T matrix;
    # beyond, the bytes are a + b T (`minilora.fast.blockwise`).
    page = (CPU if backend.name == "numpy" else GPU).plain_up_to
    low, high = page + 1, page + page // 2  # two points on that line

    @cache
    def kept(rows: int, length: int) -> int:
        cache = model.forward(X[:rows, :length])[1]
        # A block's backward needs temporary arrays of about the size of the block's cache. They are small compared
        # with the caches of all blocks, but not with their inputs, so a checkpointed block counts twice.
        return 2 * step_bytes(cache) - cache_bytes(cache)

    def activations(rows: int, length: int) -> int:
        if length <= high:
            return kept(rows, length)
        slope = kept(rows, high) - kept(rows, low)
        return kept(rows, high) - slope * (high - length) // (high - low)  # rounded up

    weights, trained = parameter_bytes(model), model.trainable().values()
    state, itemsize = 3 * sum(array.nbytes for array in trained), max(array.dtype.itemsize for array in trained)

    def of_step(length: int, workers: int, held_out: tuple[int, int]) -> StepMemory:
        held, width = held_out
        first = activations(1, length)
        return StepMemory(
            weights=weights,
            state=state,
            first=first,
            further=activations(2, length) - first if len(X) > 1 else first,
            logits=length * model.lm_head.out_features * itemsize,
            measured=min(held, workers * max(1, EVALUATION_ROWS // width)) * width / length,
        )

    return of_step


# --- the memory of the machine ----------------------------------------------------------------------------------------

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Linux's folder with the limits of containers and batch jobs, which psutil ignores; the groups of this process."""
CGROUP_FILES = {  # cgroup version 2, then 1: the files with the limit, the usage and its reclaimable part
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


class Memory(NamedTuple):
    """The memory of the machine, in bytes."""

    whole: int  # the limit for all processes
    free: int  # what this process can still allocate


def machine_memory(backend: Backend) -> Memory | None:
    """Return the memory where a backend's arrays are; None if the device does not report it."""
    if backend.name != "numpy":
        try:
            free, whole = backend.xp.cuda.runtime.memGetInfo()
            free += backend.xp.get_default_memory_pool().free_bytes()  # which the device reports as used
        except Exception:  # optional: a stand-in for CuPy may not support it
            return None
        return Memory(int(whole), int(free))
    system = needed("psutil", "the machine's free memory").virtual_memory()  # few commands need it
    limits = [Memory(system.total, system.available), *_group_limits()]
    return Memory(min(limit.whole for limit in limits), min(limit.free for limit in limits))


def _group_limits() -> Iterator[Memory]:
    """Yield the limits of this process's control groups and their parents."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        for controller in CGROUP_FILES.keys() & set(controllers.split(",")):
            root = CGROUPS / controller
            # In a container the path may be the host's, although the group itself is mounted at the root.
            folder = root / place.lstrip("/")
            for group in {folder, *folder.parents, root} - set(root.parents):
                yield from _limit(group, *CGROUP_FILES[controller])


def _limit(group: Path, limit: str, use: str, reclaimable: str) -> Iterator[Memory]:
    """Yield the limit of a control group, if it has one."""
    try:
        whole, used = int((group / limit).read_text()), int((group / use).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max"
        return
    yield Memory(whole, max(0, whole - used + int(stat.get(reclaimable, 0))))
