"""The public names of minilora.files."""

from ..language.files.save import save_llama as save_llama
from .adapters import load_adapter as load_adapter
from .adapters import save_adapter as save_adapter
from .merge import merge_adapter as merge_adapter
