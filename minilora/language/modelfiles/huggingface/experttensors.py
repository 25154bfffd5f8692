"""The tensors of a mixture's experts: one for each weight of each expert in most folders, and one for all in others.

    here, and in some folders              in most folders, for each expert e
    mlp.experts.gate_up_proj (E, 2 m, d)   mlp.experts.e.gate_proj.weight (m, d), and below it .up_proj.weight (m, d)
    mlp.experts.down_proj (E, d, m)        mlp.experts.e.down_proj.weight (d, m)

A Mixtral's are ``block_sparse_moe.experts.e.w1``, ``w3`` and ``w2``, in this order, and its router is
``block_sparse_moe.gate``. transformers writes a tensor each, and reads both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ....checks import FileRefused, short
from ....files.base.expertweights import MIXTRAL, MIXTRAL_MLP, PARTS
from ...llamaconfig import LlamaConfig

Pieces = list[list[str]]
"""The tensors of one array: for each expert those that lie one below the other."""


def names_of(config: LlamaConfig, layer: int) -> tuple[dict[str, Pieces], dict[str, str]]:
    """Return the tensors of a layer's arrays where each expert has its own, and the file's name of the router."""
    mlp = f"model.layers.{layer}.mlp"
    mixtral = config.model_type == "mixtral"
    inside = f"model.layers.{layer}.{MIXTRAL_MLP}" if mixtral else mlp
    count = config.mixture.num_experts if config.mixture is not None else 0
    pieces = {
        f"{mlp}.experts.{name}": [
            [f"{inside}.experts.{e}.{MIXTRAL[part] if mixtral else part}.weight" for part in parts]
            for e in range(count)
        ]
        for name, parts in PARTS.items()
    }
    return pieces, {f"{mlp}.gate.weight": f"{inside}.gate.weight"}


def stacked(
    path: Path, config: LlamaConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, Pieces], dict[str, str]]:
    """Return the shapes of a folder's arrays with each mixture's in one, what these are made of, and other names.

    Refuses a mixture of which some expert's tensor is missing or has another shape, by that tensor's name.
    """
    present, pieces_of, names = dict(shapes), dict[str, Pieces](), dict[str, str]()
    if config.mixture is None or config.num_hidden_layers > len(present):
        return present, pieces_of, names
    expected = config.mixture.shapes(config.hidden_size)
    for layer in filter(config.mixture.stands_in, range(config.num_hidden_layers)):
        start = f"model.layers.{layer}.mlp.experts."
        if all(f"{start}{name}" in present for name in PARTS) or config.mixture.num_experts > len(present):
            continue
        pieces, router = names_of(config, layer)
        for name, experts in pieces.items():
            _, rows, width = expected[name.removeprefix(f"model.layers.{layer}.mlp.")]
            shape = (rows // len(experts[0]), width)
            for piece in (piece for expert in experts for piece in expert):
                if piece not in present:
                    raise FileRefused(path, f"there is no {short(piece)}, and no {short(name)} for all experts")
                if present[piece] != shape:
                    raise FileRefused(path, f"{short(piece)} has shape {list(present[piece])}, expected {list(shape)}")
                del present[piece]
            present[name], pieces_of[name] = (len(experts), rows, width), experts
        for name, other in router.items():
            if name not in present and other in present:
                present[name], names[name] = present.pop(other), other
    return present, pieces_of, names


def taken_apart(config: LlamaConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a decoder's tensors as most folders have them: one for each weight of each expert."""
    if config.mixture is None:
        return dict(tensors)
    pieces_of, names = dict[str, Pieces](), dict[str, str]()
    for layer in filter(config.mixture.stands_in, range(config.num_hidden_layers)):
        pieces, router = names_of(config, layer)
        pieces_of, names = pieces_of | pieces, names | router
    apart: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if name not in pieces_of:
            apart[names.get(name, name)] = array
            continue
        for parts, of_expert in zip(pieces_of[name], array, strict=True):
            apart |= dict(zip(parts, np.split(of_expert, len(parts)), strict=True))
    return apart
