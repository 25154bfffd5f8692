"""The public names of minilora.fast."""

from .parts import accumulate as accumulate
from .parts import keep_pages as keep_pages
from .residual import residual_form as residual_form
