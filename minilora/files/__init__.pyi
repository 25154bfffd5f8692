"""The public names of minilora.files: a door to the language model's files, as `minilora.lazy` fetches it."""

from ..language.save import save_llama as save_llama
