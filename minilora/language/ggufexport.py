"""An adapter of a Llama decoder as a .gguf file, for llama.cpp.

llama.cpp adds (alpha / r) B A to the weight of a name, with one alpha for the whole file and r from the factors. So
where s r is not the same for all modules, as with rsLoRA or alpha_pattern, lora_B takes the difference:

    B' = (s r / alpha) B        alpha = s r of the first module

Rows of a Llama's lora_B of q_proj and k_proj are reordered as those of the weights are, see `minilora.layers.rotary`;
those of a Qwen2 are not. An embedding's lora_A is transposed: llama.cpp takes rows of it. There is no place for DoRA's
magnitude in such a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ..checks import FileRefused, check_path, needed, short
from ..files.adapters import check_base_weights, load_adapter
from ..files.atomic import refuse_inputs, replaceable, written_whole
from ..files.peft.adapterconfig import CONFIG_NAME
from ..files.peft.adapterfolder import WEIGHTS_NAME
from ..files.tensors import in_dtype
from ..variants.adapter import Adapter
from ..variants.variant import LORA, variant_of
from .config import LlamaConfig
from .gguf import ARCHITECTURES, gguf_tensor, to_gguf
from .weights import open_llama


def export_adapter(adapter: str | Path, model: str | Path, out: str | Path) -> list[str]:
    """Write an adapter in PEFT's layout as a LoRA of llama.cpp's, in float32.

    Parameters
    ----------
    adapter : path
        A folder in PEFT's layout.
    model : path
        The Llama decoder that it belongs to, as `minilora.Llama.load` takes it. Of its weights
        those are read that the adapter brings with it, to compare them.
    out : path
        The .gguf file to write. It appears when it is whole.

    Returns
    -------
    list of str
        The names of the tensors that were written.

    Raises
    ------
    FileRefused
        If a file is damaged, the adapter does not fit the model, or has what such a file cannot hold: the message names
        it. Nothing has been written then.
    ValueError
        If `out` cannot be written without destroying something, or the package `gguf` is missing.
    """
    gguf = needed("gguf", "a .gguf file")
    adapter, out = check_path("adapter", adapter), check_path("out", out)
    config, read = open_llama(model)
    if config.model_type not in ARCHITECTURES:
        raise FileRefused(Path(model), f"a {config.model_type}, whose adapters are not written for llama.cpp")
    adapters = load_adapter(adapter)

    def weight(module: str) -> np.ndarray | None:
        array = read(f"{module}.weight") if f"{module}.weight" in config.shapes() else None
        return None if callable(array) else array  # one that stays quantised

    check_base_weights(adapter, weight)
    for module, factors in adapters.items():
        _check_held(adapter, module, factors, config)
    first = next(iter(adapters.values()))
    alpha = first.scaling * first.rank
    tensors = dict(_tensors(adapter, adapters, alpha, config))
    replaceable(out)
    base = check_path("model", model)
    models = [file for file in base.iterdir() if file.suffix != ".gguf"] if base.is_dir() else [base]
    refuse_inputs("out", out, [(file, "a file of the model") for file in models])
    refuse_inputs("out", out, [(adapter / file, "a file of the adapter") for file in (CONFIG_NAME, WEIGHTS_NAME)])
    if not os.path.isdir(out.absolute().parent):
        raise ValueError(f"out {str(out)!r}: there is no folder {str(out.parent)!r}")
    with written_whole(out) as file:
        writer = gguf.GGUFWriter(None, ARCHITECTURES[config.model_type])
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, array in tensors.items():
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
        writer.fout, writer.state = [file], gguf.gguf_writer.WriterState.EMPTY  # as if it had opened the file
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # The package's own way to write tensors says nothing where the last bytes find no place on the disk.
        for array in tensors.values():
            writer.write_padding(file, file.tell())
            file.write(array.data)
        writer.write_padding(file, file.tell())
    return list(tensors)


def _check_held(path: Path, module: str, adapter: Adapter, config: LlamaConfig) -> None:
    """Refuse what llama.cpp's file has no place for, and what does not fit the model."""
    variant, shape = variant_of(adapter), config.shapes().get(f"{module}.weight")
    if variant is not LORA:
        raise FileRefused(path, f"{short(module)} has {variant.name}'s {variant.array}, which a LoRA GGUF cannot hold")
    if config.tie_word_embeddings and module in ("lm_head", "model.embed_tokens"):
        raise FileRefused(
            path,
            f"{short(module)} is adapted, and the model's head is its embedding: a LoRA GGUF cannot hold a change of "
            "one of the two",
        )
    if shape is None or len(shape) != 2 or to_gguf(module) is None:
        raise FileRefused(path, f"{short(module)} is no layer of the model that llama.cpp adapts")
    kind = "embedding" if module == "model.embed_tokens" else "linear"
    expected = shape[::-1] if kind == "embedding" else shape
    if adapter.kind != kind or adapter.shape != expected:
        raise FileRefused(
            path,
            f"the adapter of {short(module)} is of kind {adapter.kind} and shape {list(adapter.shape)}, expected "
            f"{kind} and {list(expected)}, as the model's",
        )


def _tensors(
    path: Path, adapters: Mapping[str, Adapter], alpha: float, config: LlamaConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the factors, by llama.cpp's names and in its order."""
    for module, adapter in adapters.items():
        A, B = (np.asarray(factor, np.float64) for factor in (adapter.lora_A, adapter.lora_B))
        B = B * (adapter.scaling * adapter.rank / alpha)
        name, B = gguf_tensor(f"{module}.weight", B, config.head_dim, config.model_type)
        A = A.T if adapter.kind == "embedding" else A
        for part, factor in (("a", A), ("b", B)):
            reaches = f"the factors of {short(module)} reach"
            yield f"{name}.lora_{part}", np.ascontiguousarray(in_dtype(factor, "float32", path, reaches))
