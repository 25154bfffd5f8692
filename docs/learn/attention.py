"""What attention.md asserts and shows; the names are the page's own."""

# %% What is new?
import drawings
import numpy as np
from pages import picture, shown

from minilora import adapt

head, _ = drawings.small_head()
everywhere = adapt(head, "all-linear", rank=1, alpha=1, rng=np.random.default_rng(0))
picture("attention-1", drawings.attention(everywhere))

# %% A small example

picture("attention-2", drawings.by_hand(2, *(rows.reshape(3, 2) for rows in (q, k, v, do))))

# %% Where does LoRA go?

picture("attention-3", drawings.shares())

# %% The names, with attention

import rungs

shown("attention-4", rungs.table("attention"))
