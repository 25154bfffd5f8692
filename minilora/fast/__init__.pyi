"""The public names of minilora.fast."""

from .memory import keep_pages as keep_pages
from .parts import accumulate as accumulate
from .residual import residual_form as residual_form
