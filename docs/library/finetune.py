"""What finetune.md asserts and shows; the names are the page's own."""

# %% What fits which model
import pictures
from pages import shown

from minilora.language.recipe import FITTING, SMALL

head = ["model", *("--" + name.replace("_", "-") for name in FITTING)]
sizes = (f"up to {SMALL // 10**6} million parameters, tried on glassllm's", "larger, tried on SmolLM2-135M")
shown(
    "finetune-1",
    pictures.table(head, [(size, *(f"{of[i]:g}" for of in FITTING.values())) for i, size in enumerate(sizes)]),
)

# %% Prompts and chats

assert [text[a:b] for a, b in turns] == ["Lima.<|im_end|>\n", "Santiago.<|im_end|>\n"]

assert Y.tolist() == [[-100, -100, 5, 2], [5, 2, -100, -100]] and X.tolist() == [[7, 8, 9, 5], [9, 5, 0, 0]]
