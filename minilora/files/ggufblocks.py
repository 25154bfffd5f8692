"""A door: see `minilora.language.modelfiles.ggufblocks`."""

from ..language.modelfiles.ggufblocks import decode as decode
