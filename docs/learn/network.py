"""What network.md asserts and shows; the names are the page's own."""

import re

import next_letter
import numpy as np
import rungs
from pages import DOCS, ROOT, holds, own_picture, says, shown

from minilora import Attention, LoRA, LoRALinear, gradcheck
from minilora.layers.attention import attend, attend_backward
from minilora.losses import IGNORE_INDEX

# %% Layers, one after another

kept = {name: cache_bytes(m.forward(X)[1]) for name, m in {"all": model, "fc1": low, "fc2": high}.items()}
assert kept["fc2"] < kept["all"] < kept["fc1"]

draw = np.random.default_rng(1).standard_normal
row, dy = X[:1], draw((1, 3))
slopes = model.fc2.weight * (1 - np.tanh(model.fc1(row)) ** 2) @ model.fc1.weight
holds(r"\frac{\partial L}", dx=model.backward(dy, model.forward(row)[1])[0][0], dy=dy[0], dydx=slopes)

# %% Activations

x = np.random.default_rng(2).standard_normal(7)
share = lambda x: 1 / (1 + np.exp(-x))
slope = lambda f: f(x + 1e-20j).imag / 1e-20
holds("$q = 1/(1", x=x, q=share(x))
holds("$q' = q", q=share(x), **{"q'": slope(share)})
holds("$(x q)' =", x=x, q=share(x), **{"(xq)'": slope(lambda x: x * share(x))})

# %% A norm

normed = lambda p: RMSNorm(p["weight"])(p["x"])
assert gradcheck(normed, {"x": row, "weight": norm.weight}, {"x": dx, **grads}, cotangent=dy).passed

x, back, g = draw((7, 5)), draw((7, 5)), draw(5)
one = RMSNorm(g, eps=0.3)
r = np.sqrt((x**2).mean(axis=1) + one.eps)
names = {"dx": one.backward(back, one.forward(x)[1])[0], "dxhat": back * g, "x": x, "xhat": x / r[:, None], "r": r}
holds(r"dx_{nj} = \frac", **names, d=5)

# %% Cross-entropy

assert gradcheck(lambda p: cross_entropy(p["z"], t)[0], {"z": z}, {"z": dz}).passed
assert np.allclose(dz.sum(axis=1), 0) and (dz[2] == 0).all()
says(
    f"(A target of {IGNORE_INDEX} marks",
    f"at 3 nats, the right class got a probability of $e^{{-3}}$, 1 in {np.exp(3):.0f},",
)

# %% How high a rank does the change take?


def found(model, rule):
    """Return the shares that are right: of the rows of the training, of unseen ones."""
    return [float(np.mean(model(x).argmax(1) == rule(x).argmax(1))) for x in (X, unseen)]


def trained(start):
    train(start, X, new(X).argmax(1), epochs=80, lr=0.01, rng=np.random.default_rng(2), loss=cross_entropy)
    return start


shares = {"the model, its own task": found(model, teacher), "rank 1, the new task": found(adapted, new)}
for rank in (4, 16):
    start = adapt(model, ["fc1"], rank=rank, alpha=2 * rank, rng=np.random.default_rng(1))
    shares[f"rank {rank}, the new task"] = found(trained(start), new)
lines = [f"| {name} | {own:.0%} | {other:.0%} |\n" for name, (own, other) in shares.items()]
shown("ranks", "| | rows it learned from | unseen rows |\n|---|--:|--:|\n" + "".join(lines))

base, one, four, sixteen = shares.values()
says(f"learns it from {len(X):,} rows", "what do ranks 4 and 16 add?", "What rank 16 adds")
says(
    f"the model had {base[0]:.0%} of these rows right. On the new one, with rank 1, it has {one[0]:.0%}".replace(
        "%", " %"
    )
)
says(f"had {base[0]:.0%} of its own rows and {base[1]:.0%} of unseen ones".replace("%", " %"))
assert base[0] > one[0] + 0.05 and one[1] > base[1] - 0.02
assert sixteen[0] > one[0] + 0.04 and max(one[1], four[1], sixteen[1]) - min(one[1], four[1], sixteen[1]) < 0.02

exact = MLP(fc1=LoRALinear(teacher.fc1, LoRA(a, b, alpha=1)), act=teacher.act, fc2=teacher.fc2)
assert found(exact, new) == [1, 1]

# %% Attention

places = [name for name in Attention.fits() if name.endswith("_proj")]
says(f"the {len(places)} places for an adapter")
assert len(places) == 4 and len({*places} - {"o_proj"}) == 3
says("Three linear layers make three vectors from each row")

# %% Its derivative

S, c = draw((4, 5)), 5**-0.5
share = lambda S: np.exp(S) / np.exp(S).sum(axis=-1, keepdims=True)
moved = S + 1e-20j * np.eye(S.size).reshape(*S.shape, *S.shape)  # [t, w] has the entry t, w moved along i
dPdS = share(moved).imag.transpose(2, 3, 0, 1) / 1e-20
holds("\\begin{aligned}\n\\frac{\\partial P_{tu}}", dPdS=dPdS, P=share(S), S=S, Z=np.exp(S).sum(axis=-1))

q, k, v, do = draw((4, 5)), np.eye(5), draw((5, 5)), draw((4, 5))  # k is the unit matrix, so dq is c dS
heads = [of.reshape(1, 1, 1, *of.shape) for of in (q, k, v, do)]
P = attend(*heads[:3])[1]
says("Three layers read $x$, so its gradient is a sum of three:")
holds("dS_{tw} =", dS=attend_backward(heads[3], *heads[:3], P)[0][0, 0, 0] / c, dP=do @ v.T, P=P[0, 0])

# %% A small example

says("Three positions, $D = 2$.")
params = {name: rows.reshape(3, 2) for name, rows in zip("qkv", (q, k, v))}
grads = {name: g.reshape(3, 2) for name, g in zip("qkv", attend_backward(do, q, k, v, P))}
attended = lambda p: attend(*(p[name].reshape(q.shape) for name in "qkv"))[0]
assert gradcheck(attended, params, grads, cotangent=do).passed
assert (grads["q"][0] == 0).all()


def head(q, k, v):
    """Return what the head computes of rows (3, 2), and what comes back of do, under the page's names."""
    back = do.reshape(3, 2)
    o, P = attend(*(rows.reshape(do.shape) for rows in (q, k, v)))
    dq, _, dv = (g.reshape(3, 2) for g in attend_backward(do, *(rows.reshape(do.shape) for rows in (q, k, v)), P))
    P, dP = P[0, 0], back @ v.T
    dS = P * (dP - (P * dP).sum(axis=1, keepdims=True))
    S = q @ k.T / np.sqrt(2)
    return {"S": S, "P": P, "o": o.reshape(3, 2), "dP": dP, "dS": dS, "dy": back, "dq": dq, "dv": dv}


by_hand = own_picture(DOCS / "learn" / "network.md", "by-hand")
found = {name: of[1, :2] for name, of in head(**params).items()}  # position 2 reads from two
for number, name in enumerate(("S", "P", "o", "", "dP", "dS", "dq"), start=1):
    if name:  # its box ends with its numbers
        box = re.search(rf'eq-att-{number}">.*?(?=<rect|</svg>)', by_hand, re.S)[0].replace("\u2212", "-")
        said = [float(n) for of in re.findall(r"= ([^=]*)</text>", box) for n in re.findall(r"-?[\d.]+", of)]
        assert np.allclose(said[-found[name].size :], found[name], atol=0.005), name

# %% Where LoRA goes

says("Nothing trains but the four linear layers.")

q_adapter, v_adapter = (
    lambda times: LoRA(np.array([[0.0, 0, 1]]), times * np.array([[-1.0], [-2]]), alpha=1),
    lambda times: LoRA(np.array([[0.0, 1, 0]]), times * np.array([[1.0], [1]]), alpha=1),
)
x, lines = np.eye(3), []  # whose rows are the columns of the weights
before = head(**params)
for on_q, on_v in ((1, 0), (2, 0), (0, 1), (0, 2)):
    on = {"q": q_adapter(on_q), "v": v_adapter(on_v)}
    now = head(params["q"] + on["q"](x), params["k"], params["v"] + on["v"](x))
    moved = np.abs(now["P"] - before["P"]).max(), np.abs(now["o"] - before["o"]).mean()
    lines.append(f"| {on_q} | {on_v} | {moved[0]:.2f} | {moved[1]:.2f} |\n")
    assert (moved[0] == 0) == (on_q == 0) and moved[1] > 0
    if on_q == 1:
        for name, adapter in on.items():
            _, grads = adapter.backward(now[f"d{name}"], adapter.forward(x)[1], need_dx=False)
            now |= {f"{name}_proj.{factor}": np.atleast_2d(np.linalg.norm(g)) for factor, g in grads.items()}
        drawn = own_picture(DOCS / "learn" / "network.md", "shares").replace("\u2212", "-")
        cells = re.findall(r'data-cell="(\S+) (\d)(\d)">.*?>([-\d.]+)</text>', drawn, re.S)
        assert len(cells) == 46 and all(
            abs(now[name][int(i), int(j)] - float(said)) < 0.006 for name, i, j, said in cells
        )
says("moves the shares, by the table's third column at most")
shown("shares", "| on q | on v | a share changes by | an output moves by |\n|--:|--:|--:|--:|\n" + "".join(lines))

# %% One task, three networks

shown("rungs", rungs.table("attention"))
assert [*rungs.RECORDED].index("attention") + 1 == 3
says("## One task, three networks")
losses = [row["dinosaurs after"] for row in rungs.RECORDED.values()]
assert losses == sorted(losses, reverse=True)
(people, _), _ = next_letter.split("people")
signs = len(next_letter.LETTERS)
says(f"learns {len(people):,} first names of people", f"LoRA of rank {next_letter.RANK} learns")
says(f"among {signs} signs costs $\\ln {signs} = {np.log(signs):.2f}$")

# %% Do you remember?

dz = cross_entropy(np.log([[0.7, 0.2, 0.1]]), np.array([1]))[1]
assert dz.size == 3
says(
    "The logits of three classes give the probabilities 0.7, 0.2 and 0.1. The second is right",
    "$({:.1f}, {:.1f}, {:.1f})$".format(*dz[0]),
)
microlora = (ROOT / "examples" / "microlora.py").read_text(encoding="utf-8")
says(f"LoRA in {len(microlora.splitlines())} lines of plain Python")
