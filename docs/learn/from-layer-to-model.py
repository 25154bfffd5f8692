"""What from-layer-to-model.md asserts and shows; the names are the page's own."""

# %% The names, with two layers
import rungs
from pages import shown

shown("from-layer-to-model-1", rungs.table("two layers"))
