"""Cases of files as they are found: in half precision, with keys that are missing, under another program's names."""

from __future__ import annotations

from .bases import SQUARE, TIED
from .cases import DOWN, PLAIN, UP, Adapter, Case, O, Q, V, block, one

TRAINED = tuple(range(2, 128, 3))
"""The tokens whose rows were trained, every third."""

STORED = (
    *(
        Case(
            f"file-in-{name}",
            f"The factors are in {name}, and their numbers are exact there.",
            one(*block(0, Q, V, DOWN), r=4, lora_alpha=10),
            TIED,
            stored=stored,
        )
        for name, stored in (("bfloat16", "BF16"), ("float16", "F16"))
    ),
    Case(
        "dora-square",
        "use_dora over a square weight: its shape does not show which axis the magnitude is along.",
        one(*block(0, O), r=4, lora_alpha=1, use_dora=True),
        SQUARE,
    ),
    Case("alpha-float", "lora_alpha is no whole number.", one(*block(0, Q, V, UP, DOWN), r=3, lora_alpha=1.9), TIED),
    Case(
        "alpha-missing",
        "lora_alpha is not there: PEFT takes its default, 8. To be refused, or answered so.",
        one(*block(0, V, DOWN), r=3, lora_alpha=8),
        TIED,
        refused="lora_alpha is missing",
        damage="no alpha",
        either=True,
    ),
    Case(
        "b-zero",
        "Each lora_B is zero, as before the first step: the answer is the base's.",
        ((Adapter(block(0, V, DOWN), {"r": 4, "lora_alpha": 10}, zero=True), 1.0),),
        TIED,
    ),
    Case(
        "trained-tokens",
        "trainable_token_indices: some rows of embed_tokens were trained, and the file has them beside factors.",
        ((Adapter(block(0, V), {"r": 4, "lora_alpha": 10}, tokens=TRAINED), 1.0),),
    ),
    Case(
        "language-model-prefix",
        "Each name has language_model. before the path, as an adapter of a model with pictures has. To be refused, or "
        "answered without it; never to be passed over.",
        PLAIN,
        TIED,
        refused="the base has no module language_model",
        damage="language model",
        either=True,
    ),
    Case(
        "refused-empty",
        "The file has no tensors.",
        PLAIN,
        TIED,
        refused="The file has no tensors.",
        damage="no tensors",
    ),
)
