"""Checks and computed contents of spread.md; its parts see the page's own names."""

# %% Where the directions come from

import numpy as np
import pictures
import words
from laboratory import COSINE, LEADING, model_and_tokenizer
from laboratory import matrices as weights
from pages import recording, says, shown

found = recording("laboratory")["directions"]
adam, descent = found["Adam"], found["momentum"]
moments = list(adam["steps"])
last = moments[-1]
matrices = 7 * words.GLASSLLM.num_hidden_layers


def counts(of, what, kind, moments=moments):
    """Return the number of directions that hold 90 % of the square."""
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
    assert 1.9 * gradients[0] < step < 0.85 * noise  # Adam spreads it, but not as far as noise
    assert gradients == sorted(gradients) and gradients[-1] < change  # later gradients agree less
    assert gradients[0] < plain < change < noise  # and gradient descent ends nearly as spread out
shown("spread-1", pictures.table(["", "gradient", "step", "change", "descent"], rows))
first = adam["steps"]["1"]["gradient"]["v_proj"]
narrow, wide = sorted({found["powers"][len(of["share"]) - 1] for of in found["random"].values()})
few, *_, most = sorted({round(of["90 %"]) for of in found["random"].values()})
between = min(of["90 %"] for of in found["random"].values() if len(of["share"]) == len(found["powers"]))
steps, later = counts(adam, "step", "v_proj"), counts(adam, "gradient", "v_proj")[1:]
says("How many directions hold 90 % of the square")  # the recording's "90 %"
says(f"full training of all {matrices} matrices, at its first, its 101st and its last step")
says(f"A random matrix needs {few} of {narrow} directions, and {between:.0f} to {most} of {wide}.")
says(
    f"the first gradient of `v_proj` has {100 * first['share'][0]:.0f} % of its square in one direction, "
    f"and needs six of {narrow} for 90 %; Adam's first step needs {steps[0]:.0f}.",
    f"**And {moments[-1]} batches\nspread the sum:**",
    f"those of `v_proj` need {later[0]:.0f} and {later[1]:.0f}.",
)
assert round(first["90 %"]) == 6
assert {found["powers"][len(of["share"]) - 1] for of in found["random"].values() if of["90 %"] < 50} == {narrow}
assert moments == ["1", "101", "300"] and len(found["momentum's rates"]) == 4
assert (
    0.85 < np.mean([counts(descent, "change", k)[-1] / counts(adam, "change", k)[-1] for k in found["random"]]) < 0.95
)
says(f"the loss ends at {descent['new']:.3f}, compared with Adam's {adam['new']:.3f}.")

# %% New directions

says(f"no cosine above {COSINE} with any")
assert LEADING == 10
says(f"Of the ten leading vectors of each of the {matrices} matrices, {LEADING * matrices} in all,")
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
    f"full fine-tuning has {full[min(full)]}, and LoRA {min(of[min(of)] for of in lora)} to {max(of[min(of)] for of in lora)},"
)
of_four, of_one = (max(of.values()) / matrices for of in ended[2:])
assert round(of_four) == 4 and round(of_one) == 1
says("Ranks 1 and 4 level off near one\nand four per matrix.")
runs = words.earlier().trainings("full", lr=words.earlier().best("full", among=(0,)), seed=0)
[changed] = (result["change"] for _, result in runs)
length = np.linalg.norm(np.concatenate([W.ravel() for W in weights(model_and_tokenizer()[0]).values()]))
assert 0.6 < changed / length < 0.7
says("changes them by two thirds of their length")
