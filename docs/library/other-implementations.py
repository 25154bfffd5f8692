"""Checks and computed contents of other-implementations.md; its parts see the page's own names."""

# %% Other implementations

import re

import pictures
from pages import recording, says, shown

FOUND = recording("other-implementations")["implementations"]
assert len(FOUND) == 9
assert all("forward" in one["kinds"]["linear"]["offers"] for one in FOUND)


def listed(kinds):
    """Return the differences, each with the layers in which it occurs."""
    found = {}
    for kind, row in kinds.items():
        for text in row["deviations"]:
            said = re.sub(r"raises (.*)", r"raises `\1`", text)  # its (3) is not an equation
            found.setdefault(said, []).append(kind)
    return "; ".join(f"{', '.join(where)}: {text}" for text, where in found.items()) or "–"


rows = []
for one in FOUND:
    kinds = one["kinds"]
    own = [row for kind, row in kinds.items() if kind not in ("mixed", "combine")]
    digits = [row["digits"] for row in own if row["digits"] and not row["deviations"]]
    precision = sorted({row["dtype"] for row in own})
    rows.append(
        (
            f"{one['implementation']} {one['version']}",
            f"{min(digits):.0f} in {', '.join(precision)}" if digits else "–",
            ", ".join(kinds),
            listed(kinds),
        )
    )
shown("differences", pictures.table(["", "digits", "layers", "what differs from the formulas"], rows))

says(f"Measured on {' and '.join(sorted({one['date'] for one in FOUND}))}")

WORDS = {
    ("orientation", "in, out"): "A is (in, r), B is (r, out)",
    ("scaling", "1"): "there is no alpha: the update is added as it is",
    ("detached_norm", False): "the gradient passes through DoRA's norm",
    ("slots", 3): "there are three slots: q, k and v",
    ("one_rank", True): "all slots have one rank and one alpha",
    ("one_width", True): "all slots are of one width",
}
rows = []
for one in FOUND:
    said = {
        f"{WORDS[item]} ({kind})": None
        for kind, row in one["kinds"].items()
        for item in row["declared"].items()
        if item in WORDS
    }
    if said:
        rows.append((f"{one['implementation']} {one['version']}", "; ".join(said)))
shown("conventions", pictures.table(["", "its convention"], rows))

lacking = {
    claim: [one["implementation"] for one in FOUND if claim not in one["kinds"]["linear"]["offers"]]
    for claim in ("forward", "slope", "merge", "start")
}
*others, last = lacking.pop("merge")
assert not any(lacking.values())
says(f"{', '.join(others)} and {last} offer no `merge`:")
