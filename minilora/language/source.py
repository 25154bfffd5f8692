"""The model's and the adapter's files of a command, each opened only once.

They are passed on as objects, so that nothing is opened, checked or decoded twice. A bad file is reported when it is
first used.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adaptation import attach
from ..backend import Backend
from ..extras import needed
from ..files.adapters import check_base_weights, kept_system_message, read_adapters
from ..files.peft import AdapterFolder, check_not_merged
from ..files.tensors import open_weights
from ..layer import walk
from ..quantization import quantize
from ..texts import printable
from ..variants.adapter import Adapter
from .files.chattemplate import ChatTemplate, load_template
from .files.tokens import Tokenizer, load_tokenizer
from .llama import Llama


@dataclass(frozen=True)
class ModelSource:
    """A model's files; the default is glassllm's English model."""

    given: Path | None

    @cached_property
    def path(self) -> Path:
        """The path of the files."""
        if self.given is not None:
            return self.given
        return Path(needed("glassllm", "running without --model").__file__).parent / "weights" / "en.npz"

    @property
    def name(self) -> str:
        """The model's name for printing."""
        return "glassllm's English model" if self.given is None else printable(str(self.given))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, read once."""
        return load_tokenizer(self.path)

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template, read once."""
        return load_template(self.path)

    def load(self, dtype: str, backend: Backend, bits: str | None = None) -> Llama:
        """Load the model; `bits` is "nf4" to quantise linear layers, or "file" to keep a .gguf file's blocks."""
        if bits == "file" and self.path.suffix != ".gguf":
            raise ValueError(
                f"--quantize file keeps the blocks of a .gguf file, but the model is {printable(str(self.path))}"
            )
        llama = Llama.load(self.path, dtype=dtype, backend=backend, keep_blocks=bits == "file")
        return quantize(llama) if bits == "nf4" else llama


@dataclass(frozen=True)
class AdapterSource:
    """An adapter's folder, with the adapters read from it by module path."""

    path: Path
    folder: AdapterFolder
    adapters: dict[str, Adapter]

    @classmethod
    def open(cls, path: Path, dtype: str, backend: Backend) -> AdapterSource:
        """Open an adapter's folder and read its factors; warn if it also contains weights of the base model."""
        folder = AdapterFolder.open(path)
        folder.warn_of_base()
        return cls(path, folder, read_adapters(folder, dtype=dtype, backend=backend))

    @property
    def system(self) -> str | None:
        """The system message that the adapter was trained with, if one was saved."""
        return kept_system_message(self.folder)

    def attached(self, model: Llama, backend: Backend, bits: str | None) -> Llama:
        """Attach the adapters to a model without them; any base weights in the folder must equal the model's."""
        if model.source is not None and model.source.is_dir():
            check_not_merged(open_weights(model.source), self.folder)
        layers = {} if bits else dict(walk(model))  # quantised weights differ from the base's

        def weight(path: str) -> Any:
            array = getattr(layers.get(path), "weight", None)
            return None if array is None else backend.to_numpy(array)

        check_base_weights(self.folder, weight)
        adapted: Llama = attach(model, self.adapters)
        return adapted
