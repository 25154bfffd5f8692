"""What choosing.md asserts and shows; the names are the page's own."""

# %% Choosing
import json

import pictures
from pages import RECORDINGS, picture, shown
from recordings import Recordings

laboratory = Recordings(json.loads((RECORDINGS / "laboratory.json").read_text()))

# %% Which rank

rows = []
for windows, small, large in ((60, 0.000125, 0.0005), (239, 0.0005, 0.002), (956, 0.004, 0.016)):
    cells = [laboratory.losses("LoRA", rank, windows=windows) for rank in (1, 4, 16)]
    for fixed in (small, large):
        rows.append((f"{windows} windows, at {fixed:.6f}".rstrip("0") + " each", *(f"{of[fixed]:.2f}" for of in cells)))
    rows.append((f"{windows} windows, each at its own best rate", *(f"{min(of.values()):.2f}" for of in cells)))
shown("choosing-1", pictures.table(["held-out loss", "r = 1", "r = 4", "r = 16"], rows))

ranks = (1, 4, 16)
for windows in laboratory.windows:  # the faster all three train, the lower the rank that ends lowest
    cells = [laboratory.losses("LoRA", rank, windows=windows) for rank in ranks]
    common = sorted(set(cells[0]) & set(cells[1]) & set(cells[2]))
    winners = [min(ranks, key=lambda rank: cells[ranks.index(rank)][lr]) for lr in common]
    assert winners == sorted(winners, reverse=True) and winners[0] == 16 > winners[-1]
for windows in laboratory.windows:  # at its own best rate the higher rank ends lower, on every part of the text
    ends = [min(laboratory.losses("LoRA", rank, windows=windows).values()) for rank in ranks]
    assert ends == sorted(ends, reverse=True)
    rates = [laboratory.best("LoRA", rank, windows=windows) for rank in ranks]
    assert rates == sorted(rates, reverse=True)

# %% Start values for 1 to 70 billion weights

FORMULA = lambda width, power: 5e-5 * 10 * (2000 / width) ** power
recipes = {  # width, torchtune's recipe, QLoRA's
    "1B": (2048, 3e-4, None),
    "3B": (3072, 3e-4, None),
    "7B, 8B": (4096, 3e-4, 2e-4),
    "13B": (5120, None, 2e-4),
    "33B": (6656, None, 1e-4),
    "65B, 70B": (8192, 3e-4, 1e-4),
}
say = lambda lr: "–" if lr is None else f"{lr:.5f}".rstrip("0")
rows = [
    (name, f"{FORMULA(width, 0.781):.5f}", f"{FORMULA(width, 0.0775):.5f}", say(tune), say(qlora))
    for name, (width, tune, qlora) in recipes.items()
]
shown(
    "choosing-2",
    pictures.table(["weights", "formula, Llama", "formula, Qwen", "torchtune, Llama 3", "QLoRA, LLaMA"], rows),
)

for width, *theirs in recipes.values():
    rates = [*filter(None, theirs)] + [FORMULA(width, 0.781)] * (width > 2048)
    assert min(rates) >= 2e-4 / 2 and max(rates) <= 2 * 2e-4 < FORMULA(width, 0.0775) < 2.5 * 2e-4
assert 2 * 2e-4 < FORMULA(2048, 0.781) < 2.5 * 2e-4
assert 2.9 < max(recipes["65B, 70B"][1:][0:2]) / min(recipes["65B, 70B"][1:][0:2]) < 3.1

# %% How far above full fine-tuning's?

ratios = [
    laboratory.best("LoRA", rank, windows=windows) / laboratory.best("full", windows=windows)
    for windows in laboratory.windows
    for rank in (1, 4, 16)
]
assert (min(ratios), max(ratios)) == (2, 32)
falls = [
    laboratory.best("LoRA", 1, windows=windows) / laboratory.best("LoRA", 16, windows=windows)
    for windows in laboratory.windows
]
assert (min(falls), max(falls)) == (2, 8)

# %% Dropout, epochs, warm-up

assert [round(4800 / windows) for windows in laboratory.windows] == [80, 20, 5]
for way, rank in (("full", None), ("LoRA", 16)):
    short, whole = (laboratory.losses(way, rank, windows=windows) for windows in (60, 956))
    assert short[min(whole, key=whole.get)] > laboratory.before["new"] > min(short.values()) + 0.9

# %% What a 7B model takes

import drawings

picture("choosing-3", drawings.memory(LLAMA_2_7B, tokens, ways))

total = lambda **options: round(sum(training_memory(LLAMA_2_7B, tokens=tokens, **options).values()) / 1e9)
assert (total(), total(recompute=True)) == (126, 110)
assert (total(rank=16), total(rank=16, recompute=True)) == (32, 16)
part = lambda **options: training_memory(LLAMA_2_7B, tokens=tokens, rank=16, **options)["activations"]
assert 0.08 < part(recompute=True) / part() < 0.1
