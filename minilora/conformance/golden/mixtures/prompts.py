"""The seed of each case's prompt, as `tests/support/find_mixture_prompts.py` finds it."""

MIXTURE_PROMPTS: dict[str, int] = {
    "experts-double": 1011,
    "experts-fused": 310,
    "experts-gate-up-alone": 495,
    "experts-square": 22,
    "experts-shared": 97,
    "experts-rslora": 1452,
    "experts-router": 36,
    "experts-lora-b-layout": 1069,
    "experts-peft-0-19-0": 26,
    "experts-old-names": 41,
    "experts-old-names-rslora": 1053,
}
