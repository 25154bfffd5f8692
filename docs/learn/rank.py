"""What rank.md asserts and shows; the names are the page's own."""

import hands
import leading
import pictures
import ranks
from pages import picture, recording, shown

assert 4096 * 4096 == 16_777_216 and 8 * (4096 + 4096) == 65_536

# %% A circle becomes an ellipse

picture("circle", hands.circle())

# %% A sum of outer products

assert np.allclose(M, hands.example_matrix(), atol=1e-4) and np.allclose(S, hands.LENGTHS, atol=1e-4)

# %% The best change of rank r

picture("line", hands.nearest_on_a_line())

values = np.linalg.svd(ranks.word(), compute_uv=False)
left = [np.sum(values[r:] ** 2) / np.sum(values**2) for r in range(8)]
assert np.linalg.matrix_rank(ranks.word()) == 7 and np.all(values[7:] < 1e-9)
trained = [
    1.0,
    *(np.sum((ranks.change() - own.delta()) ** 2) / np.sum(ranks.change() ** 2) for own in hands.learn_word(7)),
]
assert all(best - 1e-9 <= own <= best + 0.02 for best, own in zip(left, trained, strict=True))
rows = [(rank, f"{best:.0%}", f"{own:.0%}") for rank, (best, own) in enumerate(zip(left, trained, strict=True)) if rank]
shown("word", pictures.table(["rank", "left by the best", "left by training"], rows))

# %% What the loss sees

STRONG, WEAK = hands.toward(60), hands.toward(150)
CUT = 1.5 * np.outer(hands.toward(20), STRONG)
D = CUT + np.outer(hands.toward(110), WEAK)


def sees(stretch):
    """Return inputs that go along D's weak direction, the best change of rank 1, and what D cut and that one keep."""
    around = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    ring = np.array([size * np.array([np.cos(a), np.sin(a)]) for size in (1 / 3, 2 / 3, 1) for a in around])
    X = ring * [1, stretch] @ [STRONG, WEAK]
    X /= np.abs(X).max()
    R = X @ D.T
    best = best_adapter(X, R, rank=1).delta() if stretch > 1 else CUT  # of a round cloud no direction is better
    return X, best, [1 - np.sum((R - X @ change.T) ** 2) / np.sum(R**2) for change in (CUT, best)]


X, best, shares = sees(4)
figure = pictures.new_figure(5.2, 3.2)
for axes, points, title in zip(figure.subplots(1, 2), (X, X @ D.T), ("inputs x", "outputs D x"), strict=True):
    for change, colour, width, share, words in (
        (CUT, pictures.BASE, 5, shares[0], "D, cut,"),
        (best, pictures.LORA, 1.8, shares[1], "the best"),
    ):
        u, _, v = np.linalg.svd(change)
        way = 1.5 * np.array([-1, 1])[:, None] * (v[0] if points is X else u[:, 0])
        axes.plot(*way.T, color=colour, linewidth=width, alpha=0.8, label=f"{words} keeps {share:.0%}")
    axes.plot(*points.T, ".", color=pictures.INK, markersize=4)
    axes.set(title=title, aspect="equal", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), xticks=[], yticks=[])
figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=2)
axes.plot(*np.stack([X @ D.T, X @ best.T], axis=0).transpose(2, 0, 1), color=pictures.LORA, linewidth=0.8)
alt = "Left a cloud of inputs, right what D makes of them, with two lines through each: wide and blue the one question that D "
alt += "keeps when it is cut to rank 1, thin and orange that of the best rank 1. The inputs go 4 times as far along D's weak "
alt += f"direction as along its strong one. D, cut to its strongest direction, keeps {shares[0]:.0%} of the outputs; the best "
alt += f"rank 1 keeps {shares[1]:.0%}."
picture("sees", pictures.show(figure, alt, "Thin lines: what the best change of rank 1 loses."))
assert np.allclose(*sees(1.5)[2])
rows = [(stretch, *(f"{share:.0%}" for share in sees(stretch)[2])) for stretch in (1, 2, 4, 8)]
shown(
    "sees", pictures.table(["inputs, length over width", "D, cut to rank 1, keeps", "the best of rank 1 keeps"], rows)
)

found = leading.shares(16)
rows = [(kind, width, f"{low:.0%} to {high:.0%}", f"{even:.0%}") for kind, (width, low, high, even) in found.items()]
head = ["inputs of", "directions", "the strongest 16 hold", "of noise they would hold"]
shown("leading", pictures.table(head, rows))
assert all(2.9 * even < low < high < 5.6 * even for _, low, high, even in found.values())

# %% A real change

model = recording("language-model")["glassllm"]
before, full = model["before"], "the same matrices"
loss = {name: run["losses"][-1] for name, run in model["runs"].items()}
gain = {name: (before - value) / (before - loss[full]) for name, value in loss.items()}
values = {name: {path: np.array(v) for path, v in of.items()} for name, of in model["singular values"].items()}
assert len(values[full]) == 28 and round(model["parameters"], -4) == 850_000

held = np.array([(np.cumsum(v**2) / np.sum(v**2))[:64] for v in values[full].values()])
number = np.arange(1, 65)
figure = pictures.new_figure(5.6, 3.2)
axes = figure.subplots()
axes.fill_between(number, held.min(0), held.max(0), color=pictures.BASE, alpha=0.25, linewidth=0)
axes.plot(number, held.mean(0), color=pictures.BASE, label="every entry trained")
for rank, style in ((4, "--"), (16, "-")):
    of = np.array([np.cumsum(v**2) / np.sum(v**2) for v in values[f"LoRA, r = {rank}"].values()])
    axes.plot(number[:rank], of.mean(0), style, color=pictures.LORA, label=f"LoRA, r = {rank}")
axes.set(xscale="log", xlabel="strongest directions", ylabel="their share of the square", ylim=(0, 1.02))
axes.set_xticks([1, 4, 16, 64], [1, 4, 16, 64], minor=False)
axes.set_xticks([], minor=True)
axes.grid(alpha=0.3)
axes.legend(loc="lower right")
alt = "The share of the square in the strongest directions. LoRA's curves reach one at rank 4 and at 16. That of the free change "
alt += f"rises slowly: {held.mean(0)[15]:.0%} at 16 directions, {held.mean(0)[63]:.0%} at 64."
caption = "Lines are means over the 28 matrices; the band has all 28 of the free change."
picture("spectrum", pictures.show(figure, alt, caption))
assert {v.size for v in values[full].values()} == {64, 128} and 0.45 < held.mean(0)[15] < 0.6

kept = {int(rank): (before - value) / (before - loss[full]) for rank, value in model["cut to rank"].items()}
rows = [
    (f"{rank}", f"{kept[rank]:.0%}", f"{gain[name]:.0%}" if (name := f"LoRA, r = {rank}") in gain else "–")
    for rank in (1, 4, 16, 64)
]
shown("enough", pictures.table(["rank", "the free change, cut: of its gain", "LoRA, trained: of that gain"], rows))
one, four, sixteen = (gain[f"LoRA, r = {rank}"] for rank in (1, 4, 16))
assert one > kept[16] > 0.5 and 0.6 < one < 2 / 3 and 0.9 < sixteen < 0.95
assert f"{loss['all weights']:.2f} {loss[full]:.2f} {loss['LoRA, r = 16']:.2f}" == "2.72 2.80 2.94"

# %% What the assumption buys

new = {name: evaluate(model, X_new, Y_new) for name, model in models.items()}
assert sorted(new, key=new.get) == ["LoRA, rank 3", "LoRA, rank 12", "every entry of W", "LoRA, rank 1", "base"]
full = models["every entry of W"].weight - base.weight
alt = "The first eight singular values of three changes. The truth and LoRA have three, of nearly the same height, and nothing "
alt += "after. Full training has these three and five more, slowly falling: the noise."
caption = "Singular values of the true change, of the one that LoRA of rank 3 learned, and of full training's."
CHANGES = {
    "every entry": (full, pictures.BASE), "the truth": (truth, pictures.INK), "LoRA": (models["LoRA, rank 3"].delta(), pictures.LORA),
}  # fmt: skip
first = {name: (range(1, 9), np.linalg.svd(of, compute_uv=False)[:8], colour) for name, (of, colour) in CHANGES.items()}
spectra = pictures.lines(first, points=True, xlabel="number", ylabel="singular value")
picture("overfits", pictures.show(spectra, alt, caption))

# %% Do you remember?

assert round(100 * (3**2 + 1**2) / (5**2 + 3**2 + 1**2)) == 29
