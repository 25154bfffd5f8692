"""The seeds of each case's prompts, as `tests/support/find_mixture_prompts.py` finds them."""

MIXTURE_PROMPTS: dict[str, tuple[int, int]] = {
    "experts-double": (6, 90),
    "experts-fused": (8, 604),
    "experts-gate-up-alone": (22, 31),
    "experts-square": (19, 174),
    "experts-shared": (4, 785),
    "experts-rslora": (5, 91),
    "experts-router": (0, 389),
    "experts-lora-b-layout": (14, 432),
    "experts-peft-0-19-0": (0, 67),
    "experts-old-names": (4, 65),
    "experts-old-names-rslora": (7, 453),
}
