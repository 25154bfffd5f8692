"""The public names of minilora.fast."""

from .accumulation import accumulate as accumulate
from .pages import keep_pages as keep_pages
from .residual import residual_form as residual_form
