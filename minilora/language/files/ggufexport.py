"""Export of a Llama decoder's adapter as a .gguf file for llama.cpp.

llama.cpp adds (alpha / r) B A to the weight of the same name, with one alpha for the whole file and r from the factors.
If s r differs between modules, as with rsLoRA or alpha_pattern, lora_B absorbs the difference:

    B' = (s r / alpha) B        alpha = s r of the first module

For a Llama, the rows of lora_B of q_proj and k_proj are permuted like those of the weights, see
`minilora.layers.rotary`; for a Qwen2 they are not. An embedding's lora_A is transposed, since llama.cpp looks up its
rows. The format cannot represent DoRA's magnitude.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ...checks import check_path
from ...extras import needed
from ...files.adapters import check_base_weights, read_adapters
from ...files.disk import check_parent, check_replaceable, refuse_inputs, written_whole
from ...files.peft import CONFIG_NAME, WEIGHTS_NAME, AdapterFolder
from ...files.tensors import in_dtype
from ...layers.quantized import FrozenQuantizedLinear
from ...texts import FileRefused, reading, short
from ...variants.adapter import Adapter
from ...variants.dora import DoRAAdapter
from ..config import LlamaConfig
from .gguf import ARCHITECTURES, gguf_tensor
from .weights import open_llama

EXPORTED = rb"GGUF.{12}\x04\0{7}.*adapter\.lora\.alpha"
"""A pattern for the files that `export_adapter` writes: other programs write more than these four settings."""


def export_adapter(adapter: str | Path, model: str | Path, out: str | Path) -> list[str]:
    """Convert an adapter in PEFT's layout to llama.cpp's format, in float32, and return its tensors' names."""
    gguf = needed("gguf", "a .gguf file")
    adapter, model, out = check_path("adapter", adapter), check_path("model", model), check_path("out", out)
    config, read = open_llama(model)
    if config.model_type not in ARCHITECTURES:
        raise FileRefused(model, f"a {config.model_type}, whose adapters cannot be exported to llama.cpp")
    folder = AdapterFolder.open(adapter)
    folder.warn_of_base()
    adapters, shapes = read_adapters(folder), config.shapes()

    def weight(module: str) -> np.ndarray | None:
        array = read(f"{module}.weight") if f"{module}.weight" in shapes else None
        return None if isinstance(array, FrozenQuantizedLinear) else array

    check_base_weights(folder, weight)
    first = next(iter(adapters.values()))
    alpha = first.scaling * first.rank
    with reading(adapter):
        for module, one in adapters.items():
            _check_fits(module, one, shapes.get(f"{module}.weight", ()), tied=config.tie_word_embeddings)
    tensors = dict(_tensors(adapter, adapters, alpha, config))
    check_replaceable(out)
    models = [file for file in model.iterdir() if file.suffix != ".gguf"] if model.is_dir() else [model]
    refuse_inputs("out", out, [(file, "a file of the model") for file in models])
    refuse_inputs("out", out, [(adapter / file, "a file of the adapter") for file in (CONFIG_NAME, WEIGHTS_NAME)])
    check_parent("out", out)
    with written_whole(out) as file:
        writer = gguf.GGUFWriter(None, ARCHITECTURES[config.model_type])
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, array in tensors.items():
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
        writer.fout, writer.state = [file], gguf.gguf_writer.WriterState.EMPTY  # as if the package had opened the file
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # The package's own writer reports nothing if the last bytes do not fit on the disk.
        for array in tensors.values():
            writer.write_padding(file, file.tell())
            file.write(array.data)
        writer.write_padding(file, file.tell())
    return list(tensors)


def _check_fits(module: str, adapter: Adapter, shape: tuple[int, ...], *, tied: bool) -> None:
    """Require that llama.cpp's format can represent the adapter, and that it fits a layer of this shape."""
    if isinstance(adapter, DoRAAdapter):
        raise ValueError(f"{short(module)} has DoRA's magnitude, which a LoRA GGUF cannot represent")
    if tied and module in ("lm_head", "model.embed_tokens"):
        raise ValueError(
            f"{short(module)} is adapted, but the model's head shares the embedding's weight: a LoRA GGUF cannot "
            "represent a change of only one of them"
        )
    kind, expected = ("embedding", shape[::-1]) if module == "model.embed_tokens" else ("linear", shape)
    if (adapter.kind, adapter.shape) != (kind, expected):
        raise ValueError(
            f"the adapter of {short(module)} is of kind {adapter.kind} and shape {list(adapter.shape)}, expected "
            f"{kind} and {list(expected)}, like the model's"
        )


def _tensors(
    path: Path, adapters: Mapping[str, Adapter], alpha: float, config: LlamaConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the factors under llama.cpp's names, in its order."""
    for module, adapter in adapters.items():
        A, B = (np.asarray(factor, np.float64) for factor in (adapter.lora_A, adapter.lora_B))
        B = B * (adapter.scaling * adapter.rank / alpha)
        name, B = gguf_tensor(f"{module}.weight", B, config.head_dim, config.model_type)
        A = A.T if adapter.kind == "embedding" else A
        for part, factor in (("a", A), ("b", B)):
            reaches = f"the factors of {short(module)} reach"
            yield f"{name}.lora_{part}", np.ascontiguousarray(in_dtype(factor, "float32", path, reaches))
