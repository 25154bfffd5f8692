"""The public names of minilora.language."""

from .files.save import found_by_weight as found_by_weight
from .files.save import save_llama as save_llama
from .files.tokens import load_tokenizer as load_tokenizer
from .llama import Llama as Llama
from .text import next_token_loss as next_token_loss
from .text import windows as windows
