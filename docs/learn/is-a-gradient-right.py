"""What is-a-gradient-right.md asserts and shows; the names are the page's own."""

# %% How a slope is measured
import pictures
from pages import picture, shown

floor = 1e-17
picture(
    "is-a-gradient-right-1",
    pictures.show(
        pictures.lines(
            {
                "tanh layer, central": (steps, np.maximum(bent, floor), pictures.BASE),
                "LoRA's loss in A, central": (steps, np.maximum(quadratic, floor), pictures.LORA),
                "complex step, h = 1e-20": (steps, np.full(len(steps), max(bent_complex, floor)), pictures.THIRD),
            },
            xscale="log",
            yscale="log",
            xlabel="step h",
            ylabel="relative error",
            ylim=(1e-17, 10),
        ),
        "The error of a slope against the step, both logarithmic. For the tanh layer it is a V with its lowest point near a step of "
        "1e-5. For LoRA's loss in A there is only the left arm: the error falls all the way to step 1. The complex step is a level line at the bottom.",
        "Central differences: a V for the tanh layer, and only its left arm for LoRA's loss in A.",
    ),
)

# %% How fast the remainder vanishes

picture(
    "is-a-gradient-right-2",
    pictures.show(
        pictures.lines(
            {
                "no gradient": (right.steps, right.zeroth, pictures.INK),
                "gradient off by 1 %": (off.steps, off.first, pictures.BASE),
                "right gradient": (right.steps, right.first, pictures.LORA),
            },
            points=True,
            xscale="log",
            yscale="log",
            xlabel="step h",
            ylabel="what remains",
        ),
        "What remains of the loss's change against the step, both logarithmic. Without a gradient: a line of slope 1. With the right gradient: a "
        "line of slope 2. With a gradient off by one percent the line begins with slope 2 and bends into slope 1 for small steps.",
        "Slope 2 is right. A small mistake shows when the steps are small.",
    ),
)

# %% What each check misses

rows = [(bug, *("✓" if hit else "–" for hit in row.values())) for bug, row in caught.items()]
sums = [sum(row[name] for row in caught.values()) for name in CHECKS]
rows.append((f"caught of {len(BUGS)}", *sums))
assert sums[2] == 3 and len(BUGS) == 10
shown("is-a-gradient-right-3", pictures.table(["planted bug", *CHECKS], rows))
