"""A door: see `minilora.language.modelfiles.gguf.ggufblocks`."""

from ..language.modelfiles.gguf.ggufblocks import decode as decode
