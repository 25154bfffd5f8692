"""What `benchmark.py` measured, as a table and as a picture."""

from minilora.cli.figures import BASE, INK, LORA, new_figure

OTHERS = 0.25
"""Cores that other processes may take, on average, while ratios are measured that are judged."""
GROUPS = {
    "full": "full rank: every weight trained",
    "lora": "LoRA beside its frozen base",
    "residual": "LoRA on the residual: the base run once",
}


def text(result):
    """Return the run as several lines for a terminal."""
    parts = [machine_line(result), steps_table(result["steps"])]
    parts += [f"not measured {reason}" for reason in result["left_out"]]
    if result["bars"]:
        parts.append(bars_table(result["bars"], too_busy(result["machine"])))
    if result["growth"]:
        parts.append(growth_table(result["growth"]))
    return "\n\n".join(parts)


def machine_line(result):
    """Say in one sentence what ran where."""
    task, machine = result["task"], result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    return (
        f"A training step, float32, batch {task['batch']} of {task['rows']:,} rows, {task['in']} inputs, {task['out']} "
        f"outputs, rank 1.\n{cpu_line(machine)}; {versions}; {result['date']}"
    )


def cpu_line(machine):
    """Say which processor it was, which kernel it ran, how many cores it has, and how many of them others took."""
    kernel = f", {machine['kernel']} kernel" if machine.get("kernel") else ""
    others = machine.get("others")
    return f"{machine['cpu']}{kernel}, {machine['cores']} cores" + (
        "" if others is None else f", {others:.2f} of them taken by others"
    )


def too_busy(machine):
    """Say why ratios measured there are not to be judged; "" where they are."""
    others = machine.get("others")
    if others is None or others <= OTHERS:
        return ""
    return (
        f"not judged: other processes computed on {others:.2f} cores meanwhile, and {OTHERS} is the most for a verdict"
    )


def steps_table(steps):
    """Lay out one row for each contender, ours first in its group."""
    lines = [f"{'':36}{'ms a step':>10}  {'middle half':>15}  {'of ours':>8}  {'of floor':>8}  {'memory':>8}"]
    for group, title in GROUPS.items():
        lines += ["", title]
        for row in steps:
            if row["name"].startswith(group):
                name = row["name"].split(": ", 1)[1]
                spread = f"{row['low']:.3f} - {row['high']:.3f}"
                memory = "" if row["memory_mb"] is None else f"{row['memory_mb']:.1f} MB"
                ratios = f"{row['ratio']:7.2f}x  {row['of floor']:8.2f}"
                lines.append(f"  {name:34}{row['ms']:10.3f}  {spread:>15}  {ratios}  {memory:>8}")
    return "\n".join(lines)


def bars_table(bars, busy=""):
    """Lay out what we hold ourselves to, and whether it is met; or why that is not judged."""
    lines = [f"{'ours as a fraction':82}{'measured':>9}{'at most':>9}"]
    for bar in bars:
        verdict = "" if busy or bar["ratio"] <= bar["bound"] else "  not met"
        lines.append(f"  {bar['what']:80}{bar['ratio']:9.3f}{bar['bound']:9.3f}{verdict}")
    return "\n".join([*lines, busy] if busy else lines)


def growth_table(growth):
    """Lay out our step at each size, and the exponent that fits."""
    lines = ["How our step grows, ms, and the p of the size^p that fits best"]
    for axis, found in growth.items():
        sizes = next(iter(found.values()))["sizes"]
        lines += ["", f"  {axis:20}" + "".join(f"{size:9,}" for size in sizes) + f"{'p':>8}"]
        for name, curve in found.items():
            label = GROUPS_SHORT[name.split(":")[0]]
            lines.append(f"  {label:20}" + "".join(f"{ms:9.3f}" for ms in curve["ms"]) + f"{curve['exponent']:8.2f}")
    return "\n".join(lines)


GROUPS_SHORT = {"full": "full rank", "lora": "LoRA", "residual": "LoRA, residual"}
COLOURS = {"full": BASE, "lora": LORA, "residual": "#2a9d6f"}


def plot(result):
    """Draw the steps, and the growth where it was measured."""
    growth = result["growth"] or {}
    figure = new_figure(11, 5.5 + (3 if growth else 0))
    parts = figure.subfigures(2 if growth else 1, 1, squeeze=False, height_ratios=[5.5, 3] if growth else [1])[:, 0]
    draw_steps(parts[0].subplots(), result["steps"])
    if growth:
        for axes, (axis, found) in zip(parts[1].subplots(1, len(growth), sharey=True), growth.items(), strict=True):
            draw_growth(axes, axis, found)
    return figure


def draw_steps(axes, steps):
    """Draw one bar for each contender: ours full, the peers' pale, the floors open."""
    for position, row in enumerate(steps):
        group, name = row["name"].split(": ", 1)
        colour, is_floor = COLOURS[group], "floor" in name
        axes.barh(
            position,
            row["ms"],
            color="none" if is_floor else colour,
            alpha=1 if name.startswith("minilora") or is_floor else 0.4,
            edgecolor=colour,
            xerr=[[row["ms"] - row["low"]], [row["high"] - row["ms"]]],
            ecolor=INK,
        )
        axes.text(
            row["high"] * 1.06,
            position,
            f"{row['ms']:.2f}" if row["ms"] < 10 else f"{row['ms']:.0f}",
            va="center",
            color=INK,
        )
    labels = [f"{GROUPS_SHORT[row['name'].split(':')[0]]}: {row['name'].split(': ', 1)[1]}" for row in steps]
    axes.set_yticks(range(len(steps)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xscale="log", xlabel="milliseconds a step (median, and the middle half of the laps)")


def draw_growth(axes, axis, found):
    """Draw our step against one size, both on log scales."""
    for name, curve in found.items():
        group = name.split(":")[0]
        label = f"{GROUPS_SHORT[group]}, p = {curve['exponent']:.2f}"
        axes.plot(curve["sizes"], curve["ms"], marker=".", color=COLOURS[group], label=label)
    axes.set(xscale="log", yscale="log", xlabel={"n": "rows of data"}.get(axis, axis), ylabel="ms a step")
    axes.set_xticks(curve["sizes"][::2], [f"{size:,}" for size in curve["sizes"][::2]])
    axes.minorticks_off()
    axes.label_outer()
    axes.legend(fontsize=7)
