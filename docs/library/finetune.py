"""What finetune.md asserts and shows; the names are the page's own."""

import pictures
from pages import recording, says, shown

from minilora.language import losstable, resume
from minilora.language.data import LONGEST_ROW
from minilora.language.recipe import ADAPTER_DEFAULTS, EVAL_EVERY, EVAL_SHARE, FORWARD_SHARE, SIZE_DEFAULTS, SMALL_MODEL
from minilora.losses import IGNORE_INDEX

recorded = recording("language-model")

# %% While it trains

assert (EVAL_SHARE, FORWARD_SHARE, resume.CHECKPOINT_SHARE, losstable.QUIET) == (1 / 5, 2 / 5, 1 / 50, 60)
says(
    f"that is every {EVAL_EVERY} steps, or the multiple of {EVAL_EVERY} at which measuring takes no more than a\nfifth of",
    "a forward pass takes two fifths of the time of a step",
    "is written as often as takes a fiftieth of the time",
    "elsewhere a line does, at most once a minute",
)
# Facts from elsewhere: measured beside the sum, and in no recording.
says("another 0.1 to 0.3 GB")

# %% What fits which model

head = ["model", *("--" + name.replace("_", "-") for name in SIZE_DEFAULTS)]
sizes = (f"up to {SMALL_MODEL // 10**6} million parameters, tried on glassllm's", "larger, tried on SmolLM2-135M")
shown(
    "finetune-1",
    pictures.table(head, [(size, *(f"{of[i]:g}" for of in SIZE_DEFAULTS.values())) for i, size in enumerate(sizes)]),
)
says(f"The held-out loss goes from {recorded['smollm2']['before']:.3f} to")
# Facts from elsewhere: measured once, and in no recording.
seconds = 400
assert 3 < seconds / 2 / 60 < 4
says(f"takes {seconds} s of one core, so between three and four minutes on two", "to 2.585", "on the same 32 windows,")

# %% Prompts and chats

says(
    f"beyond {LONGEST_ROW:,} tokens",
    f"has the target {IGNORE_INDEX}, including",
)

assert [text[a:b] for a, b in turns] == ["Lima.<|im_end|>\n", "Santiago.<|im_end|>\n"]

assert Y.tolist() == [[-100, -100, 5, 2], [5, 2, -100, -100]] and X.tolist() == [[7, 8, 9, 5], [9, 5, 0, 0]]

# %% On two cores, and on many machines

glass, rank = recorded["glassllm"], ADAPTER_DEFAULTS["rank"]
numbers = rank * glass["runs"]["LoRA, r = 1"]["parameters"]
says(
    f"added up, {numbers:,} numbers in",
    f"{4 * numbers / 1e3:.0f} kB at rank\n{rank}, where those of every weight would be {4 * glass['parameters'] / 1e6:.1f} MB",
)
