"""The list of all kinds, which are defined in `plain`, `images`, `lowprecision` and `several`.

    kind                  x               weight             lora_A            lora_B
    linear, rslora, dora  (N, in)         (out, in)          (r, in)           (out, r)
    dropout               (N, in)         (out, in)          (r, in)           (out, r)
    embedding             (N,) ids        (V, dim)           (r, V)            (dim, r)
    conv1d                (N, C, L)       (out, C, K)        (r, C, K)         (out, r, 1)
    conv2d                (N, C, H, W)    (out, C, KH, KW)   (r, C, KH, KW)    (out, r, 1, 1)
    nf4                   (N, in)         codes and scales   (r, in)           (out, r)
    mixed                 (N, in)         (out, in)          (r, in)           (out, r)
    fused                 (N, in)         (out, in)          a list with one entry for each slot of the outputs
    experts               (N, in)         (E, out, in)       (E r, in)         (out, r E)
    combine               a list of adapters, each (r, in) and (out, r), and their weights

The shapes are those of PyTorch and of PEFT.
"""

from __future__ import annotations

from .images import CONV1D_KIND, CONV2D_KIND, EMBEDDING_KIND
from .lowprecision import FOUR_BITS_KIND, MIXED_KIND
from .plain import DORA_FULL_KIND, DORA_KIND, DROPOUT_KIND, LINEAR_KIND, RSLORA_KIND
from .several import COMBINE_KIND, EXPERTS_KIND, FUSED_KIND

ALL = (
    LINEAR_KIND,
    RSLORA_KIND,
    DORA_KIND,
    EMBEDDING_KIND,
    CONV1D_KIND,
    CONV2D_KIND,
    DROPOUT_KIND,
    FOUR_BITS_KIND,
    MIXED_KIND,
    FUSED_KIND,
    EXPERTS_KIND,
    COMBINE_KIND,
    DORA_FULL_KIND,
)
KINDS = {kind.name: kind for kind in ALL}
"""The kinds by name, in report order."""
DECLARED = tuple(kind.name for kind in ALL if not kind.offered_as)
"""The kinds that an implementation can list; "dora-full" is DoRA that declares ``detached_norm = False``."""
