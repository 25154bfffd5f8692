"""Names of the fifth edition that a user's script may have: they are kept for this edition."""

from importlib import import_module
from operator import attrgetter

import pytest

OLD = (
    ("losses", "IGNORE_INDEX", "IGNORE_INDEX"),
    ("layer", "parts", "members"),
    ("layers.quantized", "FrozenQuantizedLinear", "FrozenQuantizedLinear"),
    ("layers.convolution", "Convolution.rewrite", "Convolution.to_rows"),
    ("layers.embedding", "Embedding.rewrite", "Embedding.to_rows"),
    ("variants.adapter", "AdaptedRows", "AdaptedRows"),
    ("language.data", "filled", "pad"),
    ("language.llama", "recomputed", "checkpointed"),
)


@pytest.mark.parametrize(("module", "old", "new"), OLD)
def test_an_old_name_is_the_new_ones_object(module, old, new):
    home = import_module(f"minilora.{module}")
    assert attrgetter(old)(home) is attrgetter(new)(home)
