"""Checks and computed contents of experts.md; its parts see the page's own names."""

from pathlib import Path
from tempfile import TemporaryDirectory

import experts as script
import numpy as np
import pictures
from pages import holds, recording, says, shown

from minilora import Llama, adapt, cross_entropy
from minilora.language import save_llama
from minilora.layer import parameter_count
from minilora.layers.experts import Experts
from minilora.layers.mixture import MixtureOfExperts
from minilora.layers.router import Router
from minilora.layers.stacked import StackedLinear
from minilora.training import backpropagate

own = np.random.default_rng(1)

# %% The router

weight, rows = own.standard_normal((4, 3)), own.standard_normal((7, 3))
scores = rows @ weight.T
p, Z, choice = np.zeros_like(scores), np.exp(scores).sum(axis=1), np.argsort(-scores, axis=1)[:, :2]
np.put_along_axis(p, choice, Router(StackedLinear(weight), top_k=2).forward(rows)[0], axis=1)
softmax = np.exp(scores) / Z[:, None]
holds("\\begin{aligned}\np_{ne} &=", p=p, a=softmax, l=scores, Z=Z, S=np.array([{*kept} for kept in choice]))

best, next_one = np.exp((x @ W.T)[0, :2])
share, rest = np.array([best, next_one]) / (best + next_one)
says(
    f"$e^{{1}} = {best:.3f}$ and $e^{{0.5}} = {next_one:.3f}$ give the shares {share:.4f} and {rest:.4f}.",
    f"$dl = {share:.4f}\\,(1 - {share:.4f}) = {share * (1 - share):.4f}$",
    f"${rest:.4f}\\,(0 - {share:.4f}) = {rest * (0 - share):.4f}$",
)

# %% LoRA on experts

kinds = {
    "row of $A$": {e * 2 + k: (e, k) for e in range(3) for k in range(2)},
    "column of $B$": {k * 3 + e: (e, k) for e in range(3) for k in range(2)},
}
head = f"| | {' | '.join(map(str, range(6)))} |\n|{7 * '---|'}\n"
packed = [[name, *("expert {}, $k = {}$".format(*of[i]) for i in range(6))] for name, of in kinds.items()]
says(head + "\n".join(f"| {' | '.join(cells)} |" for cells in packed))

# %% Which name reaches what?


def mixture_of(count):
    arrays = (own.standard_normal((count, n, k)) for n, k in ((2 * m, d), (d, m)))
    return MixtureOfExperts(
        Router(StackedLinear(own.standard_normal((count, d))), 1), Experts(*map(StackedLinear, arrays))
    )


numbers = {
    count: parameter_count(
        adapt(mixture_of(count), [], rank=2, alpha=2, rng=own, target_parameters=names), trained=True
    )
    for count in (1, 128)
}
says(f"A model of 128\nexperts then has {numbers[128] / numbers[1]:g} times as many parameters")

# %% A mixture that learns

recorded = recording("experts")
untouched = recorded["mixture"]
ids = np.arange(64).reshape(2, 32)
assert np.abs(copies(ids) - dense(ids)).max() < 1e-12 and recorded["apart"] < 3e-5
assert abs(untouched["new"] - recorded["dense"]["new"]) < 1e-3
with TemporaryDirectory() as folder:
    save_llama(copies, Path(folder) / "mixture")
    again = Llama.load(Path(folder) / "mixture", dtype="float64")
assert again.config.model_type == "mixtral" and (again(ids) == copies(ids)).all()
says(
    f"glassllm's {parameter_count(dense):,} parameters become {parameter_count(copies):,} with four experts in each layer",
    f"{script.STEPS} steps of {script.BATCH} windows; the numbers below",
    f"and {script.STEPS} steps are few",
)
assert script.EXPERTS == 4 and script.KEPT == 2
grads = backpropagate(copies, ids, ids[:, ::-1], cross_entropy)
assert all(np.abs(g).max() < 1e-12 for name, g in grads.items() if name.endswith("mlp.gate.weight"))


def trainings(ranks, **wanted):
    """Return the recorded trainings of adapters of these ranks, by default at all rates and seeds: {rate: results}."""
    wanted, found = {"ranks": ranks} | wanted, {}
    for point in recorded["trainings"]:
        if wanted.items() <= point["run"].items():
            found.setdefault(point["run"]["lr"], []).append(point["result"])
    return found


def best_rate(ranks):
    first = {lr: results[0]["new"] for lr, results in trainings(ranks, seed=0).items()}
    return min(first, key=first.get)


def at_best(ranks, what, lr=None):
    """Return the values of `what` for each seed, at the best rate."""
    return np.array([result[what] for result in trainings(ranks)[lr or best_rate(ranks)]])


ways = {
    "experts": {"experts": 4},
    "attention": {"attention": 23},
    "both": {"experts": 3, "attention": 6},
    "dense": {"all": 9},
}

# %% Are my experts adapted?

NAMES = {"both": "experts and attention", "dense": "dense model, all linear layers"}
loss = {name: at_best(ranks, "new") for name, ranks in ways.items()}
trained = {name: at_best(ranks, "trained")[0] for name, ranks in ways.items()}
rows = [
    (
        NAMES.get(name, name), ", ".join(map(str, ranks.values())), f"{trained[name]:,}", f"{best_rate(ranks):g}",
        f"{loss[name].mean():.3f}", f"{np.ptp(loss[name]):.3f}",
    )
    for name, ranks in ways.items()
]  # fmt: skip
shown("adapted", pictures.table(["adapters on", "rank", "parameters", "best rate", "held-out loss", "span"], rows))
assert all(len(of) == 3 for of in loss.values())
above = loss["attention"] - loss["experts"]
assert 0.28 < above.min() <= above.mean() < 0.32
says(
    f"The parameter counts are equal within {100 * (max(trained.values()) / min(trained.values()) - 1):.1f} %.",
    f"Attention alone ends {above.mean():.1f} nats above the experts",
)
assert (loss["experts"] - loss["dense"]).min() > 0.02
says(f"The dense model ends {(loss['experts'] - loss['dense']).mean():.2f} lower than the mixture, with each seed:")
assert abs((loss["both"] - loss["experts"]).mean()) < 0.015 and (loss["both"] - loss["experts"]).min() < 0.0

# %% What is the rank of one expert's adapter, and what does it cost?

says(f"{layers} layers of {E} experts, and an attention with four projections in ten of them")
# Facts from elsewhere: the report that the page links to.
says("that is 13.5 MB or 3.7 GB, depending on what")
assert 13.4 < 4 * 10 * r * attention / 1e6 < 13.9 and 3.65 < 4 * layers * r * experts / 1e9 < 3.75
steps = {tuple(of["ranks"].items()): of["step"] for of in recorded["steps"]}
least = {}
for rank in (1, 4, 16):
    lr = best_rate({"experts": rank})
    (result,) = trainings({"experts": rank}, seed=0)[lr]
    least[rank] = result | {"lr": lr, "step": steps[("experts", rank),]}
rows = [
    (rank, f"{of['trained']:,}", f"{of['lr']:g}", f"{of['new']:.3f}", f"{of['step']:.2f}") for rank, of in least.items()
]
head = ["rank of each expert", "parameters", "best rate tried", "held-out loss", "step time / dense model"]
shown("each", pictures.table(head, rows))
gained = [round(least[low]["new"] - least[high]["new"], 1) for low, high in ((1, 4), (4, 16))]
says(
    f"Rank 1 to 4 gains {gained[0]} nats and rank 4 to 16 another {gained[1]}, with one seed each, and rank 16 at half the rate"
)
assert least[1]["lr"] == least[4]["lr"] == 2 * least[16]["lr"] and least[16]["trained"] / least[1]["trained"] == 16
of_step = [of["step"] for of in least.values()]
says("A step costs about one and a half times the dense model's at each rank")
assert min(of_step) > 1.4 and max(of_step) < 1.7 and max(of_step) - min(of_step) < 0.12

# %% Should the router train?

alone, routed = {"experts": 4}, {"experts": 4, "router": 4}
lr = best_rate(alone)
rows = []
for name, ranks in (("experts", alone), ("experts and router", routed)):
    new, old = at_best(ranks, "new", lr), at_best(ranks, "old", lr)
    moved = np.mean([routing["moved"] for routing in at_best(ranks, "routing", lr)])
    rows.append((name, f"{new.mean():.3f}", f"{np.ptp(new):.3f}", f"{old.mean():.3f}", f"{moved:.0%}"))
head = ["adapters on", "held-out loss", "span", "old text", "share of old text's positions on other experts"]
shown("router", pictures.table(head, rows))
gained = at_best(alone, "new", lr) - at_best(routed, "new", lr)
forgot = at_best(routed, "old", lr) - at_best(alone, "old", lr)
more = 100 * (at_best(routed, "trained", lr)[0] / at_best(alone, "trained", lr)[0] - 1)
says(
    f"An adapter of rank {routed['router']} on each router adds {more:.1f} % more parameters. It gains {gained.min():.3f} to {gained.max():.3f} nats",
    f"it forgets {forgot.min():.2f} to {forgot.max():.2f} more.",
)
back = [[of["router put back"][text] - of[text] for text in ("new", "old")] for of in trainings(routed)[lr]]
lost, regained = np.array(back).T * [[1], [-1]]
assert len(back) == 3 and f"{regained.min():.2f}" == f"{regained.max():.2f}"
says(f"and {lost.min():.2f} to {lost.max():.2f} of the new text are lost and {regained.mean():.2f} of the old regained")
told, busy = untouched["routing"]["told by the token"], untouched["routing"]["rows of new"]
says(
    f"and {100 * told[0]:.0f} % of the held-out positions are right in the first layer and {100 * told[3]:.0f} % in the last",
    f"No expert takes more than {100 * max(map(max, busy)):.0f} % of the positions; one in the second layer takes {100 * min(busy[1]):.0f} %.",
)
after = [routing["told by the token"] for ranks in (alone, routed) for routing in at_best(ranks, "routing", lr)]
says(f"the token still predicts at least\n{100 * np.min(after):.0f} % of them in each layer")
assert min(told) > 0.74 and np.max(after) < 0.89

# %% Why did the merged mixture forget?

rows = []
for name, ranks in ways.items():
    first = trainings(ranks, seed=0)[best_rate(ranks)][0]
    half = first["half"]
    new, forgotten = at_best(ranks, "new").mean(), at_best(ranks, "old").mean() - untouched["old"]
    rows.append((name, *(f"{x:.2f}" for x in (new, forgotten, half["new"], half["old"] - untouched["old"]))))
    gain = (untouched["new"] - half["new"]) / (untouched["new"] - first["new"])
    left = (half["old"] - untouched["old"]) / (first["old"] - untouched["old"])
    assert 0.66 < gain < 0.85 and 0.24 < left < 0.36
says("two thirds to five sixths of the gain and a quarter to a third of the forgetting, in all four rows")
head = ["adapters on", "held-out loss", "forgotten", "half: held-out loss", "half: forgotten"]
shown("forgotten", pictures.table(head, rows))
for point in recorded["trainings"]:
    assert abs(point["result"]["old"] - point["result"]["old, not merged"]) < 2e-4
frozen = trainings(alone, seed=0)[lr][0]["routing"]
apart = np.abs(np.array(frozen["rows of new"]) - np.array(frozen["rows of old"]))
says("differ by more than a tenth from its share of the old one's")
assert apart.max() < 0.1 and np.min([frozen["rows of new"], frozen["rows of old"]]) > 0.02
assert frozen["moved"][0] == 0
says("{:.0f}, {:.0f} and {:.0f} % of the old text's positions".format(*(100 * of for of in frozen["moved"][1:])))
experts_4, dense_2 = (trainings(ranks, seed=0)[rate][0] for ranks, rate in ((alone, 0.004), (ways["dense"], 0.002)))
of_4, of_2 = (of["old"] - untouched["old"] for of in (experts_4, dense_2))
says(
    f"At nearly the same loss on the new text, {experts_4['new']:.2f} and {dense_2['new']:.2f}, the experts at a rate of 0.004 have forgotten {of_4:.2f} nats and the dense model at 0.002 has forgotten {of_2:.2f}"
)
assert abs(experts_4["new"] - dense_2["new"]) < 0.012
