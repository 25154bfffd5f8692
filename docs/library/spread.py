"""What spread.md asserts and shows; the names are the page's own."""

# %% Where the directions come from

import numpy as np
import pictures
import words
from pages import recording, says, shown

found = recording("laboratory")["directions"]
adam, descent = found["Adam"], found["momentum"]
moments = list(adam["steps"])
last = moments[-1]


def counts(of, what, kind, moments=moments):
    """Return how many directions hold 90 % of the square."""
    return [of["steps"][moment][what][kind]["90 %"] for moment in moments]


rows = []
for kind in found["random"]:
    cells = (", ".join(f"{count:.0f}" for count in counts(adam, what, kind)) for what in ("gradient", "step", "change"))
    rows.append((kind, *cells, f"{counts(descent, 'change', kind)[-1]:.0f}"))
    gradients, (step, *_) = counts(adam, "gradient", kind), counts(adam, "step", kind)
    change, plain, noise = (
        counts(adam, "change", kind)[-1],
        counts(descent, "change", kind)[-1],
        found["random"][kind]["90 %"],
    )
    assert 1.9 * gradients[0] < step < 0.85 * noise  # Adam spreads it, and not to noise
    assert gradients == sorted(gradients) and gradients[-1] < change  # later gradients agree less
    assert gradients[0] < plain < change < noise  # and gradient descent ends nearly as spread
shown("spread-1", pictures.table(["", "gradient", "step", "change", "descent"], rows))
first = adam["steps"]["1"]["gradient"]["v_proj"]
says(
    f"the first gradient of `v_proj` has {100 * first['share'][0]:.0f} % of its square in one direction, and needs six of 64 for 90 %;"
)
assert round(first["90 %"]) == 6 and {round(of["90 %"]) for of in found["random"].values()} == {43, 66, 91, 92}
assert moments == ["1", "101", "300"] and len(found["momentum's rates"]) == 4
assert (
    0.85 < np.mean([counts(descent, "change", k)[-1] / counts(adam, "change", k)[-1] for k in found["random"]]) < 0.95
)
says(f"the loss ends at {descent['new']:.3f} in place of Adam's {adam['new']:.3f}.")

# %% New directions

ways = [("full", None), ("LoRA", 16), ("LoRA", 4), ("LoRA", 1)]
ended = [words.earlier().seeds(*way, what="intruders", among=(0,)) for way in ways]
ended = [
    {lr: intruders for lr, (intruders,) in of.items() if lr in words.earlier().losses(*way, among=(0,))}
    for way, of in zip(ways, ended)
]
rates = sorted({lr for of in ended for lr in of})
shown(
    "spread-3",
    pictures.table(
        ["rate", "full", "r = 16", "r = 4", "r = 1"], [(f"{lr:g}", *(of.get(lr, "–") for of in ended)) for lr in rates]
    ),
)
best = [of[words.earlier().best(*way, among=(0,))] for way, of in zip(ways, ended)]
says(f"full fine-tuning has {best[0]}, and LoRA of rank 1, 4 and 16 has {best[3]}, {best[2]} and {best[1]}.")
full, *lora = ended
says(
    f"full fine-tuning has {full[min(full)]}, and LoRA {min(of[min(of)] for of in lora)} to {max(of[min(of)] for of in lora)}"
)
assert [max(of.values()) for of in ended[2:]] == [111, 28]
