"""A door: see `minilora.language.llama`."""

from ..language.llama import Llama as Llama
