"""The public names of minilora.language."""

from .llama import Llama as Llama
from .save import found_by_weight as found_by_weight
from .save import save_llama as save_llama
from .text import next_token_loss as next_token_loss
from .text import windows as windows
from .tokens import load_tokenizer as load_tokenizer
