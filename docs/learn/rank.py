"""What rank.md asserts and shows; the names are the page's own."""

import hands
import leading
import numpy as np
import pictures
import ranks
from pages import holds, picture, recording, says, shown

n, r = 4096, 8
says(f"a matrix of {n} by {n}, an adapter of rank {r} trains {r * (n + n):,} numbers in place of {n * n:,}")

# %% A circle becomes an ellipse

picture("circle", hands.circle())
says(*(f"$\\sigma_{k}$ long, here {length:g}" for k, length in enumerate(hands.LENGTHS, start=1)))

# %% A sum of outer products

assert np.allclose(M, hands.example_matrix(), atol=1e-4) and np.allclose(S, hands.LENGTHS, atol=1e-4)

random = np.random.default_rng(0)
any_M, x = random.standard_normal((3, 2)), random.standard_normal(2)
u, sigma, v = np.linalg.svd(any_M, full_matrices=False)
of = {"sigma_1": sigma[0], "sigma_2": sigma[1], "x": x}
holds("M x =", **of, Mx=any_M @ x, u_1=u[:, 0], u_2=u[:, 1], v_1=v[0], v_2=v[1])
holds("M = ", **of, M=any_M, u_1=u[:, [0]], u_2=u[:, [1]], v_1=v[[0]].T, v_2=v[[1]].T)

# %% The best change of rank r

e = random.standard_normal(3)
keeps = {"lvertM^topervert^2": np.sum((any_M.T @ e) ** 2)}  # the name that |M^T e|^2 is read as
holds(r"$|M^\top e|^2 =", **of, **keeps, e=e, u_1=u[:, 0], u_2=u[:, 1])
picture("line", hands.nearest_on_a_line())

values = np.linalg.svd(ranks.word(), compute_uv=False)
left = [np.sum(values[r:] ** 2) / np.sum(values**2) for r in range(8)]
assert np.all(values[7:] < 1e-9)
says(f"It has rank {np.linalg.matrix_rank(ranks.word())}.")
trained = [
    1.0,
    *(np.sum((ranks.change() - own.delta()) ** 2) / np.sum(ranks.change() ** 2) for own in hands.learn_word(7)),
]
assert all(best - 1e-9 <= own <= best + 0.02 for best, own in zip(left, trained, strict=True))
rows = [(rank, f"{best:.0%}", f"{own:.0%}") for rank, (best, own) in enumerate(zip(left, trained, strict=True)) if rank]
shown("word", pictures.table(["rank", "left by the best", "left by training"], rows))

# %% What the loss sees

cut = (U[:, :8] * S[:8]) @ Vt[:8]
eight = [1 - np.sum((R - X @ d.T) ** 2) / np.sum(R**2) for d in (cut, best_adapter(X, R, rank=8).delta())]
assert 0.2 < eight[0] < 0.25
hold = np.sum(S[:8] ** 2) / np.sum(S**2)
says(f"With {len(S)} directions and a random $D$")
says(f"Eight of {len(S)} directions hold {hold:.0%} of $D$, and less than a quarter".replace("%", " %"))
says(f"another matrix of rank 8 has {eight[1]:.0%} of it".replace("%", " %"))

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
        (CUT, pictures.BASE_COLOR, 5, shares[0], "D, cut,"),
        (best, pictures.LORA_COLOR, 1.8, shares[1], "the best"),
    ):
        u, _, v = np.linalg.svd(change)
        way = 1.5 * np.array([-1, 1])[:, None] * (v[0] if points is X else u[:, 0])
        axes.plot(*way.T, color=colour, linewidth=width, alpha=0.8, label=f"{words} keeps {share:.0%}")
    axes.plot(*points.T, ".", color=pictures.INK, markersize=4)
    axes.set(title=title, aspect="equal", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), xticks=[], yticks=[])
figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=2)
axes.plot(*np.stack([X @ D.T, X @ best.T], axis=0).transpose(2, 0, 1), color=pictures.LORA_COLOR, linewidth=0.8)
alt = "Left a cloud of inputs, right what D makes of them, with two lines through each: wide and blue the one question that D "
alt += "keeps when it is cut to rank 1, thin and orange that of the best rank 1. The inputs go 4 times as far along D's weak "
alt += f"direction as along its strong one. D, cut to its strongest direction, keeps {shares[0]:.0%} of the outputs; the best "
alt += f"rank 1 keeps {shares[1]:.0%}."
picture("sees", pictures.show(figure, alt, "Thin lines: what the best change of rank 1 loses."))
ratio = np.divide(*np.linalg.svd(D, compute_uv=False))
says(f"the change $D$ has rank {np.linalg.matrix_rank(D)}, and is {ratio:g} times as strong")
says(f"D is {ratio:g} times as strong there", f"if the inputs go {ratio:g} times as far")
says(f"It keeps {shares[1]:.0%} of the outputs, the other {shares[0]:.0%}.".replace("%", " %"))
assert np.allclose(*sees(ratio)[2])
reach = [np.abs(X @ way).max() for way in (STRONG, WEAK)]
assert round(reach[1] / reach[0], 6) == 4
says("The inputs go four times as far along the weak one", "but the inputs go a quarter as far")
rows = [(stretch, *(f"{share:.0%}" for share in sees(stretch)[2])) for stretch in (1, 2, 4, 8)]
shown(
    "sees", pictures.table(["inputs, length over width", "D, cut to rank 1, keeps", "the best of rank 1 keeps"], rows)
)

found = leading.shares(16)
rows = [(kind, width, f"{low:.0%} to {high:.0%}", f"{even:.0%}") for kind, (width, low, high, even) in found.items()]
head = ["inputs of", "directions", "the strongest 16 hold", "of noise they would hold"]
shown("leading", pictures.table(head, rows))
times = [of / even for _, low, high, even in found.values() for of in (low, high)]
assert 2.9 < min(times) < 3.1 and 5.4 < max(times) < 5.6
says("three to five and a half times as much as noise")

# %% A real change

model = recording("language-model")["glassllm"]
before, full = model["before"], "the same matrices"
loss = {name: run["losses"][-1] for name, run in model["runs"].items()}
gain = {name: (before - value) / (before - loss[full]) for name, value in loss.items()}
values = {name: {path: np.array(v) for path, v in of.items()} for name, of in model["singular values"].items()}
says(f"its {len(values[full])} matrices by LoRA, and the same {len(values['LoRA, r = 16'])} with every entry free")
says(f"a small language model, {model['parameters'] / 1e6:.2f} million numbers")

held = np.array([(np.cumsum(v**2) / np.sum(v**2))[:64] for v in values[full].values()])
number = np.arange(1, 65)
figure = pictures.new_figure(5.6, 3.2)
axes = figure.subplots()
axes.fill_between(number, held.min(0), held.max(0), color=pictures.BASE_COLOR, alpha=0.25, linewidth=0)
axes.plot(number, held.mean(0), color=pictures.BASE_COLOR, label="every entry trained")
for rank, style in ((4, "--"), (16, "-")):
    of = np.array([np.cumsum(v**2) / np.sum(v**2) for v in values[f"LoRA, r = {rank}"].values()])
    axes.plot(number[:rank], of.mean(0), style, color=pictures.LORA_COLOR, label=f"LoRA, r = {rank}")
axes.set(xscale="log", xlabel="strongest directions", ylabel="their share of the square", ylim=(0, 1.02))
axes.set_xticks([1, 4, 16, 64], [1, 4, 16, 64], minor=False)
axes.set_xticks([], minor=True)
axes.grid(alpha=0.3)
axes.legend(loc="lower right")
alt = "The share of the square in the strongest directions. LoRA's curves reach one at rank 4 and at 16. That of the free change "
alt += f"rises slowly: {held.mean(0)[15]:.0%} at 16 directions, {held.mean(0)[63]:.0%} at 64."
caption = "Lines are means over the 28 matrices; the band has all 28 of the free change."
picture("spectrum", pictures.show(figure, alt, caption))
assert 0.45 < held.mean(0)[15] < 0.6
says("16 of {} or {} directions hold about half".format(*sorted({v.size for v in values[full].values()})))

kept = {int(rank): (before - value) / (before - loss[full]) for rank, value in model["cut to rank"].items()}
rows = [
    (f"{rank}", f"{kept[rank]:.0%}", f"{gain[name]:.0%}" if (name := f"LoRA, r = {rank}") in gain else "–")
    for rank in (1, 4, 16, 64)
]
shown("enough", pictures.table(["rank", "the free change, cut: of its gain", "LoRA, trained: of that gain"], rows))
one, four, sixteen = (gain[f"LoRA, r = {rank}"] for rank in (1, 4, 16))
assert one > kept[16] > 0.5 and 0.6 < one < 2 / 3 and 0.9 < sixteen < 0.95
assert loss[full] < loss["LoRA, r = 16"]
says("more than the first 16 directions", "misses more than a third of the gain, and rank 16 still some")
says(f"ends lower still: {loss['all weights']:.2f} [nats](glossary.md#nat) a token against {loss[full]:.2f}.")

# Facts from elsewhere: Eckart and Young 1936; the papers that the page links where it names them.
says("found this in 1936", "rank 1 beside q and v of GPT-3 about as good as rank 64")
says("about 200 dimensions reached 90 % of full fine-tuning")
says("on up to 20 billion tokens, the full change had a rank 10 to 100 times that of usual adapters")

# %% What the assumption buys

rank, noise = np.linalg.matrix_rank(truth), Y_new - X_new @ (base.weight + truth).T
says(f"the true change has rank {rank}, there are only {len(X)} rows for {X.shape[1]} inputs")
says(f"The noise has a variance of {noise.var():.0f},", f"On new rows rank {rank} is best", "Rank 12 and full training")
new = {name: evaluate(model, X_new, Y_new) for name, model in models.items()}
assert sorted(new, key=new.get) == ["LoRA, rank 3", "LoRA, rank 12", "every entry of W", "LoRA, rank 1", "base"]
full = models["every entry of W"].weight - base.weight
alt = "The first eight singular values of three changes. The truth and LoRA have three, of nearly the same height, and nothing "
alt += "after. Full training has these three and five more, slowly falling: the noise."
caption = "Singular values of the true change, of the one that LoRA of rank 3 learned, and of full training's."
CHANGES = {
    "every entry": (full, pictures.BASE_COLOR), "the truth": (truth, pictures.INK), "LoRA": (models["LoRA, rank 3"].delta(), pictures.LORA_COLOR),
}  # fmt: skip
first = {name: (range(1, 9), np.linalg.svd(of, compute_uv=False)[:8], colour) for name, (of, colour) in CHANGES.items()}
spectra = pictures.lines(first, points=True, xlabel="number", ylabel="singular value")
picture("overfits", pictures.show(spectra, alt, caption))

# %% Do you remember?

dropped, square = 3**2 + 1**2, 5**2 + 3**2 + 1**2
says(
    "singular values of a change are 5, 3 and 1",
    f"9 + 1 = {dropped} of 25 + 9 + 1 = {square}, or {dropped / square:.0%}.".replace("%", " %"),
)
says("Does LoRA of rank 4 then fail", "another change, of rank 4, may")
