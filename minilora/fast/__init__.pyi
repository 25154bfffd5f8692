"""The public names of minilora.fast, as `minilora.lazy` fetches them."""

from .accumulation import accumulate as accumulate
from .memory import keep_pages as keep_pages
from .residual import residual_form as residual_form
