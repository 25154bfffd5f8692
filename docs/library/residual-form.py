"""What residual-form.md asserts and shows; the names are the page's own."""

# %% What a step costs then
import costs
import pictures
from pages import shown

rows, work = [], {}
for name, way in costs.ways(128, 1001, 1000, 1).items():
    work[name] = way.multiply_adds
    assert way.bytes_moved >= way.least_bytes
    cells = [work[name] / 1e6, way.least_bytes / 1e6, way.bytes_moved / 1e6, way.optimizer_bytes / 1e6]
    rows.append([name, *(f"{cell:,.3g}" if cell < 1000 else f"{cell:,.0f}" for cell in cells)])
assert round(work["LoRA, the article's module"] / work["full training"], 1) == 1.5
assert round(work["LoRA beside its base"] / work["full training"], 1) == 0.5
assert work["full training"] / work["LoRA on the residual"] > 300
shown(
    "residual-form-1",
    pictures.table(["1,000 × 1,001, r = 1", "multiply-adds, millions", "MB at least", "MB as run", "MB of Adam"], rows),
)
