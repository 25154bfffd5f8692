"""What merging.md asserts and shows; the names are the page's own."""

from pages import picture, shown

# %% Taken out again

for once, again, hundred, thousand in drifts.values():
    assert 0.8 < again / once < 1.5
    assert 5 < hundred / once < 20
    assert 2 < thousand / hundred < 5

# %% What merging loses

picture(
    "merging-1",
    pictures.show(
        pictures.lines(
            {
                name: (shares, values, colour)
                for (name, values), colour in zip(
                    kept.items(), (pictures.BASE, pictures.THIRD, pictures.INK, pictures.LORA)
                )
            },
            points=True,
            xscale="log",
            xlabel="size of the change, |delta W| / |W|",
            ylabel="kept of it",
        ),
        "Four curves of the share of the change that merging keeps. Each falls from one to zero as the change gets smaller: "
        "NF4's first, at a tenth of the weight, then Q8_0's, bfloat16's, and float16's last.",
        "What merging keeps of a change, along the change itself. Beside it stands noise, in the table above.",
    ),
)

assert shares[3] == 0.01 and kept["bfloat16"][3] > 0.998 and kept["Q8_0"][3] > 0.97 and kept["NF4"][3] < 0.03
assert 0.14 < noise["bfloat16"][3] < 0.19 and 0.45 < noise["Q8_0"][3] < 0.6 and 0.4 < noise["NF4"][3] < 0.6
assert all(values[0] > 0.95 for values in kept.values()) and 0.8 < kept["NF4"][1] < 0.9
assert 0.85 < kept["bfloat16"][4] < 1 and 0.4 < kept["bfloat16"][5] < 0.65
merging = recorded["merging"]
for name, row in merging.items():
    assert (abs(row["merged"] - row["apart"]) < 0.002) == (name != "NF4")
assert 0.14 < merging["bfloat16"]["lost"] < 0.19 and 0.45 < merging["Q8_0"]["lost"] < 0.6
assert merging["NF4"]["apart"] < merging["NF4"]["merged"] - 0.1

shown("merging-change", f"`|change| / |weight| = {recorded['change of weight']:.3f} over all adapted layers`")
shown(
    "merging-2",
    pictures.table(
        ["weights in", "|D − ΔW| / |ΔW|", "held out: base", "this adapter beside it", "merged"],
        [
            (name, f"{row['lost']:.1%}", f"{row['before']:.3f}", f"{row['apart']:.3f}", f"{row['merged']:.3f}")
            for name, row in recorded["merging"].items()
        ],
    ),
)
