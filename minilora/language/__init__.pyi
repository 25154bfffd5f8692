"""The public names of minilora.language."""

from .llama import Llama as Llama
from .nexttoken import next_token_loss as next_token_loss
from .save import save_llama as save_llama
from .text import windows as windows
from .tokens import load_tokenizer as load_tokenizer
