"""What alpha.md asserts and shows; the names are the page's own."""

import pictures
import words
from pages import picture, says

# %% Where s enters

assert np.isclose(moved(8, False) / moved(4, False), 4) and np.isclose(moved(8, True) / moved(4, True), 2, rtol=1e-3)

# %% Three rules

assert np.isclose(Adapter(np.ones((16, 6)), np.ones((4, 16)), 4, use_rslora=True).scaling, 1)
assert [LoRA(np.ones((r, 99)), np.ones((99, r)), 2 * r).scaling for r in (4, 16, 64)] == [2, 2, 2]
assert round(1 / np.sqrt(2), 2) == 0.71

# %% Why divide at all?

assert [[float(s(r)) for r in (4, 16, 64)] for s in RULES.values()] == [[2, 0.5, 0.125], [2, 2, 2], [2, 1, 0.5]]
last = {case: own[-1] for case, own in moves.items()}
assert 0.7 < last[1, "alpha fixed"] < 1.4 and 0.7 < last[512, "over the root"] < 1.4  # what keeps its size
assert 3.5 < last[1, "over the root"] < 5.6 and 0.2 < last[512, "alpha fixed"] < 0.33
assert last[1, "alpha = 2r"] > 12 and 3 < last[512, "alpha = 2r"] < 5
start = LoRA.init(4096, 4, rank=64, alpha=1, rng=np.random.default_rng(0), dtype="float64")
rows = np.random.default_rng(1).standard_normal((200, 4096))
assert abs((rows @ start.lora_A.T).var() - 1 / 3) < 0.01

# %% What each rule does to the best rate

NAMES = {"alpha/r": "alpha fixed", "alpha = 2r": "alpha = 2r", "alpha/sqrt(r)": "over the root"}  # of recordings, here
whole = max(words.WINDOWS)
best = {}
for (windows, rule), of in words.scaled().items():
    assert all(np.isclose(one.scaling, RULES[NAMES[rule]](one.rank)) for one in of)
    best.setdefault(windows, {})[NAMES[rule]] = of
ranks = [of.rank for of in best[whole]["alpha fixed"]]
drawn = [x for of in best[whole].values() for one in of for x in (one.rate, one.moves)]
assert min(drawn) >= 0.004 and max(drawn) <= 0.064  # the charts end there

figure = pictures.new_figure(5.6, 3.1)
left, right = figure.subplots(1, 2)
looks = dict(zip(RULES, ((pictures.LORA, "o-"), (pictures.BASE, "s--"), (pictures.THIRD, "^:")), strict=True))
for name, (colour, style) in looks.items():
    left.plot(ranks, [of.rate for of in best[whole][name]], style, color=colour, label=name, markersize=6)
    right.plot(ranks, [of.moves for of in best[whole][name]], style, color=colour, markersize=6)
for axes, title in ((left, "best rate"), (right, "s times the best rate")):
    axes.set(xscale="log", yscale="log", xlabel="rank", title=title, ylim=(0.0028, 0.09))
    axes.set_xticks(ranks, ranks)
    ticks = (0.004, 0.008, 0.016, 0.032, 0.064)
    axes.set_yticks(ticks, ticks)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
left.legend(loc="upper right", fontsize=10)
rates = {name: ", ".join(f"{of.rate:g}" for of in best[whole][name]) for name in RULES}
alt = f"Two charts over rank {', '.join(map(str, ranks))}. Left, the best rate: "
alt += "; ".join(f"{name} {own}" for name, own in rates.items()) + ". Right, s times the best rate falls for each rule."
caption = "The rate with the least held-out loss, by rank and rule, on the whole text."
picture("rules", pictures.show(figure, alt, caption))


def way(name, of):
    """Say in words how the best rate goes from the lowest rank to the highest."""
    first, last = of[0].rate, of[-1].rate
    if first == last:
        return f"stays at {first:g} with {name}"
    return f"{'rises' if last > first else 'falls'} from {first:g} to {last:g} with {name}"


falling = []
for windows, of in best.items():
    fixed, doubled, root = (way(f"alpha {name}" if name == "over the root" else name, of[name]) for name in RULES)
    says(
        f"it {fixed}, {doubled}, and {root}."
        if windows != whole
        else f"rank 1 and rank 16 {fixed}, {doubled}, and {root}."
    )
    if all(own[0].moves > own[-1].moves for own in of.values()):
        falling.append(windows)
# Where a new recording breaks these, the prediction above the picture has another answer.
rates_at = {name: (own[0].rate, own[-1].rate) for name, own in best[whole].items()}
assert rates_at["alpha = 2r"][0] > rates_at["alpha = 2r"][1]
assert all(rates_at[name][0] == rates_at[name][1] for name in ("alpha fixed", "over the root"))
times, apart = words.apart()
assert falling == [239, whole] and times == 4  # two steps of the search
says(f"their losses differ by at most {np.ceil(100 * apart) / 100:.2f} nats.")

# %% Do you remember?

assert round(2 * np.sqrt(8), 1) == 5.7 and np.isclose(2 * np.sqrt(8) / np.sqrt(32), 1)
