"""What benchmarks.md asserts and shows; the names are the page's own."""

from pages import printed, recording, shown

# %% One layer alone

with printed("benchmarks-1"):
    import json

    import pictures
    import timing as report

    benchmark = recording("benchmark")
    rows = {row["name"]: row for row in benchmark["steps"]}
    ms = {name: row["ms"] for name, row in rows.items()}
    for line in report.machine_line(benchmark).replace("\n", "; ").split("; "):
        print(line)
    print(benchmark["laps"], "laps")


def steps(group):
    return [{**row, "name": name.split(": ", 1)[1]} for name, row in rows.items() if name.startswith(group)]


def steps_table(group):
    cells = [
        (
            row["name"],
            f"{row['ms']:.3g}",
            f"{row['low']:.3g}–{row['high']:.3g}",
            f"{row['ratio']:.2f}",
            "–" if row["memory_mb"] is None else f"{row['memory_mb']:.0f}",
        )
        for row in steps(group)
    ]
    return pictures.table([report.GROUPS[group], "ms", "middle half", "of ours", "MB"], cells)


# What the text says; not how near or far, which differs from machine to machine.
FULL, PAGE, SHORT = "full: minilora", "lora: minilora", "lora: minilora, residual form"
RESIDUAL, RESIDUAL_SHORT = "residual: minilora", "residual: minilora, residual form"
assert ms["lora: the article's module"] > ms["lora: PEFT"]
assert ms[FULL] > ms[PAGE] > ms[SHORT] > ms[RESIDUAL_SHORT]
assert ms[PAGE] > ms[RESIDUAL] > ms[RESIDUAL_SHORT] > ms["residual: floor, gathers"]
shown("benchmarks-2", steps_table("full"))

shown("benchmarks-3", steps_table("lora"))

shown("benchmarks-4", steps_table("residual"))

other = recording("benchmark-intel")
both = {
    json.dumps(run["machine"]["cpu"]): {bar["what"]: bar["ratio"] for bar in run["bars"]} for run in (benchmark, other)
}
amd, intel = both.values()
assert list(amd) == list(intel) and benchmark["task"] == other["task"]
shown(
    "benchmarks-5",
    pictures.table(
        ["ours, of", *(name.strip('"') for name in both)],
        [(what, f"{amd[what]:.2f}", f"{intel[what]:.2f}") for what in amd],
    ),
)

with printed("benchmarks-6"):
    seconds = {row["name"]: row["ms"] for row in other["steps"]}
    print(
        f"On the second, torch's fused Adam takes a full step in {seconds['full: torch, fused Adam']:.1f} ms, and minilora in {seconds['full: minilora']:.1f}: NumPy's Adam is thirteen passes over the weights, on one core."
    )

# %% A language model

with printed("benchmarks-7"):
    measured = recording("benchmark-model")
    where = measured["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    print(f"{where['cpu']}, cores: {where['cores']}; {versions}; {measured['when']}; {measured['laps']} laps")

OURS, PEER, FLOOR = "minilora", "torch + PEFT", "the products alone"
rows = []
for step in measured["steps"]:
    ms, mb = step["ms"], step["memory_mb"]
    times = [f"{ms[side]:,.4g}" for side in (OURS, PEER, FLOOR)]
    ratios = [f"{step['of peer']:.2f}", f"{step['of floor']:.2f}"]
    rows.append((step["what"], *times, *ratios, *(f"{mb[side]:.0f}" for side in (OURS, PEER))))
head = ["batch x length, LoRA on", "ms", "torch + PEFT", "floor", "of PEFT", "of the floor", "MB added", "by PEFT"]
shown("benchmarks-8", pictures.table(head, rows))

with printed("benchmarks-9"):
    text = measured["text"]
    seconds = {side: text["ms"][side] / 1000 for side in (OURS, PEER)}
    print(f"{text['what']}: {seconds[OURS]:.2f} s, transformers {seconds[PEER]:.2f} s, the same tokens")
    busy = measured["busy"]
    slower = busy["ms"][OURS] / next(
        step["ms"][OURS] for step in measured["steps"] if busy["what"].startswith(step["what"])
    )
    print(f"{busy['what']}, one process that computes on each core:")
    print(
        f"{slower:.1f} times the time above, and {busy['of one thread']:.2f} of torch + PEFT with one thread beside the same"
    )

# What the text says; not how near or far, which differs from machine to machine.
assert all(step["of floor"] > 1 for step in measured["steps"])
assert all(step["memory_mb"][OURS] < step["memory_mb"][PEER] for step in measured["steps"])
halves = [step for step in measured["steps"] if " 1 x " not in step["what"]]
assert len(halves) == 2 and all(step["of peer"] < 1 for step in measured["steps"])
assert busy["of one thread"] < 1
larger = [step["of floor"] for step in measured["steps"] if step["what"].startswith("SmolLM2")]
assert max(larger) < min(step["of floor"] for step in measured["steps"] if "glassllm" in step["what"])

second = recording("benchmark-model-intel")
assert [step["what"] for step in second["steps"]] == [step["what"] for step in measured["steps"]]
assert all(step["of peer"] > 1 for step in second["steps"] if "all seven" in step["what"])
shown(
    "benchmarks-10",
    pictures.table(
        ["batch x length, LoRA on", "ms", "of PEFT", "of the frozen products", "MB added", "by PEFT"],
        [
            (
                step["what"],
                f"{step['ms'][OURS]:,.4g}",
                f"{step['of peer']:.2f}",
                f"{step['of frozen']:.2f}",
                *(f"{step['memory_mb'][side]:.0f}" for side in (OURS, PEER)),
            )
            for step in second["steps"]
        ],
    ),
)

# %% In bfloat16

with printed("benchmarks-11"):
    dtypes = recording("benchmark-dtypes")
    where = dtypes["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    print(
        f"{where['cpu']}, which has {' and '.join(where['units']) or 'no units for bfloat16'}; {versions}; {dtypes['when']}"
    )
    loads, laps = ([step[key] for step in dtypes["steps"]] for key in ("others", "laps"))
    print(
        f"medians of {min(laps)} to {max(laps)} laps; other processes took {min(loads):.1f} to {max(loads):.1f} of its {where['cores']} cores meanwhile"
    )

DEFAULT, ALL_HALF = "torch + PEFT, bfloat16", "torch + PEFT, all in bfloat16"
SIDES = OURS, PEER, DEFAULT, ALL_HALF


def dtype_table(held):
    rows = []
    for step in dtypes["steps"]:
        if step["held to AVX2"] is held:
            times = [f"{step['ms'][side]:,.4g}" for side in SIDES]
            rows.append((step["what"], *times, *(f"{step['of float32'][side]:.2f}" for side in SIDES if side != PEER)))
    head = ["batch x length, LoRA on", "minilora, ms", "PEFT, float32", "PEFT, bfloat16", "all in bfloat16"]
    return pictures.table([*head, "minilora, of float32", "PEFT, bfloat16", "all in bfloat16"], rows)


shown("benchmarks-12", dtype_table(held=False))

shown("benchmarks-13", dtype_table(held=True))

with printed("benchmarks-14"):

    def between(values):
        return f"{min(values):.2f} to {max(values):.2f}"

    def of_float32(held, side=DEFAULT, model=""):
        return [
            step["of float32"][side]
            for step in dtypes["steps"]
            if step["held to AVX2"] is held and model in step["what"]
        ]

    def of_products(held):
        return [of["torch, bfloat16"] / of["torch"] for of in dtypes["products"] if of["held to AVX2"] is held]

    print(
        f"Of torch's products alone, {dtypes['rows']} rows by SmolLM2's weights, bfloat16 takes {between(of_products(False))} of float32's time with the units, and {between(of_products(True))} times as long held to AVX2."
    )

# What the text and README say.
assert where["units"] and max(of_float32(False, model="SmolLM2")) < 0.8 and max(of_products(False)) < 0.6
assert all(
    step["ms"][DEFAULT] < step["ms"][OURS] < step["ms"][PEER]
    for step in dtypes["steps"]
    if "SmolLM2" in step["what"] and not step["held to AVX2"]
)
assert min(of_float32(False, model="glassllm")) > 0.95
assert min(of_float32(True)) > 2 and max(of_float32(True)) > 10 and min(of_products(True)) > 1
assert all(step["of float32"][OURS] < 1 for step in dtypes["steps"])

losses = recording("benchmark-losses")
runs = {}
for run in losses["trainings"]:
    runs.setdefault((run["what"], run["lr"], run["seed"]), {})[run["side"]] = run["losses"]
rows = [
    (what, f"{lr:g}", f"{of[OURS][0]:.3f}", *(f"{of[side][1]:.4f}" for side in SIDES))
    for (what, lr, seed), of in runs.items()
]
shown(
    "benchmarks-15",
    pictures.table(
        [
            "batch x length, LoRA on",
            "rate",
            "before",
            f"minilora, {losses['steps']} steps",
            "PEFT, float32",
            "PEFT, bfloat16",
            "all in bfloat16",
        ],
        rows,
    ),
)

ends = {(what, lr): {side: of[side][1] for side in SIDES} for (what, lr, seed), of in runs.items()}
for end in ends.values():
    assert abs(end[PEER] - end[OURS]) < 0.001 and abs(end[DEFAULT] - end[OURS]) < 0.002
assert 1e-4 < 2**-5 * 2**-7 / 2 and abs(2**-12 - 0.00024) < 5e-6 and 1 / 32 < 576**-0.5 < 1 / 16
small = ends["SmolLM2 1 x 64, all seven linears", 1e-4]
assert small[ALL_HALF] - small[OURS] > 0.01
assert all(abs(ends[run][ALL_HALF] - ends[run][OURS]) < 0.005 for run in ends if run[1] > 5e-4)

# %% How a step grows

with printed("benchmarks-16"):
    grown = recording("benchmark-growth")
    print(
        f"A small decoder with LoRA on all linears, {', '.join(f'{name} {size}' for name, size in grown['usual'].items())}, of which one grows at a time."
    )
    print("p is the exponent of size^p that fits best.", report.cpu_line(grown["machine"]) + ".")


def ends(values, digits):
    return f"{values[0]:,.{digits}f} to {values[-1]:,.{digits}f}"


shown(
    "benchmarks-17",
    pictures.table(
        ["what grows", "sizes", "ms a step", "p", "of the frozen products", "MB kept", "p"],
        [
            (
                axis,
                ends(curve["sizes"], 0),
                ends(curve["ms"], 1),
                f"{curve['exponents']['ms']:.2f}",
                ends(curve["of floor"], 2),
                ends(curve["mb"], 1),
                f"{curve['exponents']['mb']:.2f}",
            )
            for axis, curve in grown["growth"].items()
        ],
    ),
)
