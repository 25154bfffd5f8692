"""What alpha.md asserts and shows; the names are the page's own."""

import pictures
import words
from pages import picture, says
from recordings import SEEDS

low, high = 8, 16  # ranks
says(f"when you go from rank {low} to rank {high}, does")

# %% Where s enters

assert np.isclose(moved(8, False) / moved(4, False), 4) and np.isclose(moved(8, True) / moved(4, True), 2, rtol=1e-3)
assert np.allclose(loaded.delta(), trained.delta() / 2)
says(
    "Twice the alpha makes the first step of the weight twice as long with Adam, and four times with gradient descent",
    "so $s$ enters a step of $\\Delta W = s\\,B A$ twice.",
    "Half of the change is gone",
)

# %% Three rules

assert np.isclose(Adapter(np.ones((16, 6)), np.ones((4, 16)), 4, use_rslora=True).scaling, 1)
assert [LoRA(np.ones((r, 99)), np.ones((99, r)), 2 * r).scaling for r in (4, 16, 64)] == [2, 2, 2]
says(
    "## Three rules\n",
    "Three are in use.",
    "The third rule is **rsLoRA**",
    f"So from rank {low} to {high}, $\\alpha$ stays under the first and the third rule, and $s$ falls to a half or to {np.sqrt(low / high):.2f}.",
)
assert high == 2 * low

# %% Why divide at all?

ranks = 4, 16, 64
fixed, doubled, root = (", ".join(f"{s(r):g}" for r in ranks) for s in RULES.values())
alphas = [[f"{s(r) * of(r):g}" for r in ranks] for s, of in zip(RULES.values(), (float, float, np.sqrt), strict=True)]
agree = [r for r in range(1, 65) if len({s(r) for s in RULES.values()}) == 1]
assert len(RULES) == 3 and len(agree) == 1 and {*alphas[0]} == {"8"} and {*alphas[2]} == {"4"}
says(
    f"Here they agree at rank {agree[0]}:",
    f"at rank {', '.join(map(str, ranks))} |",
    f"**alpha fixed**, at {alphas[0][0]} | $8 / r$ | {fixed} |",
    f"**alpha = 2r**: {', '.join(alphas[1])} | $2r / r$ | {doubled} |",
    f"**alpha over the root**, at {alphas[2][0]} | $4 / \\sqrt r$ | {root} |",
    f"for {max(moves)[0]} unrelated rows",
    "for gradient descent, where $s$ enters twice.)",
)
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
looks = dict(
    zip(RULES, ((pictures.LORA_COLOR, "o-"), (pictures.BASE_COLOR, "s--"), (pictures.THIRD, "^:")), strict=True)
)
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
picture("rules", pictures.show(figure, alt, caption), exact=True)


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
        f"With {windows} of its windows it {fixed}, {doubled}, and {root}."
        if windows != whole
        else f"between rank {ranks[0]} and rank {ranks[-1]} {fixed}, {doubled}, and {root}."
    )
    if all(own[0].moves > own[-1].moves for own in of.values()):
        falling.append(windows)
# Where a new recording breaks these, the prediction above the picture has another answer.
rates_at = {name: (own[0].rate, own[-1].rate) for name, own in best[whole].items()}
assert rates_at["alpha = 2r"][0] > rates_at["alpha = 2r"][1]
assert all(rates_at[name][0] == rates_at[name][1] for name in ("alpha fixed", "over the root"))
times, apart = words.apart()
assert falling == [239, whole] and times == 2**2  # two steps of the search
says(
    f"on the whole text and {falling[0]} windows is $s$ times the rate",
    f"within a factor of {times:g}, two steps of the search.",
    f"their losses differ by at most {np.ceil(100 * apart) / 100:.2f} nats. (One small model, three seeds.)",
)
assert len(SEEDS) == 3

# %% Do you remember?

r, alpha, to = 8, 16, 32
root = alpha / r * np.sqrt(r)
says(
    f"Rank {r}, $\\alpha = {alpha}$. You go to rank {to}.",
    f"under each of the three rules, if they agree at rank {r}?",
    f"Alpha fixed: $\\alpha = {alpha}$, $s = {alpha / to}$. Alpha = 2r: $\\alpha = {2 * to}$, $s = {alpha / r:g}$.",
    f"($2 \\sqrt {r} = {root:.1f}$), and $s = {root:.1f} / \\sqrt{{{to}}} = {root / np.sqrt(to):g}$.",
)
assert alpha == 2 * r
