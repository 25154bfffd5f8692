"""What experts.md asserts and shows; the names are the page's own."""

# %% A mixture that learns
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pictures
from pages import picture, recording, shown

from minilora import Llama, cross_entropy
from minilora.language import save_llama
from minilora.layer import parameter_count
from minilora.training import backpropagate

files = ["examples/measure/experts.py", "examples/measure/laboratory.py"]
recorded = recording("experts")
ids = np.arange(64).reshape(2, 32)
assert np.abs(copies(ids) - dense(ids)).max() < 1e-12 and recorded["apart"] < 3e-5
assert abs(recorded["mixture"]["new"] - recorded["dense"]["new"]) < 1e-3
with TemporaryDirectory() as folder:
    save_llama(copies, Path(folder) / "mixture")
    again = Llama.load(Path(folder) / "mixture", dtype="float64")
assert again.config.model_type == "mixtral" and (again(ids) == copies(ids)).all()
assert [parameter_count(model) for model in (dense, copies)] == [852_608, 2_425_984]
grads = backpropagate(copies, ids, ids[:, ::-1], cross_entropy)
assert all(np.abs(g).max() < 1e-12 for name, g in grads.items() if name.endswith("mlp.gate.weight"))


def trainings(ranks, lr=None, seed=None):
    """Return the recorded trainings of adapters of these ranks, at one rate or all of them."""
    wanted = {"ranks": ranks} | ({} if lr is None else {"lr": lr}) | ({} if seed is None else {"seed": seed})
    return [point for point in recorded["trainings"] if wanted.items() <= point["run"].items()]


def best_rate(ranks):
    return min(trainings(ranks, seed=0), key=lambda point: point["result"]["new"])["run"]["lr"]


def at_best(ranks, what):
    """Return a number of each seed, at the best rate."""
    return np.array([point["result"][what] for point in trainings(ranks, best_rate(ranks))])


ways = {
    "experts": {"experts": 4},
    "attention": {"attention": 23},
    "both": {"experts": 3, "attention": 6},
    "dense": {"all": 9},
}

# %% Are my experts adapted?

rows = []
for name, ranks in ways.items():
    new, old = at_best(ranks, "new"), at_best(ranks, "old")
    beside = "dense model, all linear layers" if name == "dense" else {"both": "experts and attention"}.get(name, name)
    told = ", ".join(str(rank) for rank in ranks.values())
    rows.append(
        (
            beside,
            told,
            f"{at_best(ranks, 'trained')[0]:,}",
            f"{best_rate(ranks):g}",
            f"{new.mean():.3f}",
            f"{np.ptp(new):.3f}",
        )
    )
shown("experts-1", pictures.table(["adapters beside", "rank", "numbers", "best rate", "held-out loss", "span"], rows))

loss = {name: at_best(ranks, "new") for name, ranks in ways.items()}
assert all(len(of) == 3 for of in loss.values())
numbers = [at_best(ranks, "trained")[0] for ranks in ways.values()]
assert max(numbers) / min(numbers) < 1.0135
assert (loss["attention"] - loss["experts"]).min() > 0.28 and (loss["attention"] - loss["experts"]).mean() < 0.32
assert (loss["experts"] - loss["dense"]).min() > 0.02 and round((loss["experts"] - loss["dense"]).mean(), 2) == 0.05
assert abs((loss["both"] - loss["experts"]).mean()) < 0.015 and (loss["both"] - loss["experts"]).min() < 0.0

# %% What is the rank of one expert's adapter, and what does it cost?

assert 13.4 < 4 * 10 * r * attention / 1e6 < 13.9 and 3.65 < 4 * layers * r * experts / 1e9 < 3.75

steps = {json.dumps(of["ranks"]): of for of in recorded["steps"]}
least = {}
for rank in (1, 4, 16):
    tried = {point["run"]["lr"]: point["result"] for point in trainings({"experts": rank}, seed=0)}
    lr = min(tried, key=lambda lr: tried[lr]["new"])
    least[rank] = tried[lr] | {"lr": lr, "step": steps[json.dumps({"experts": rank})]["step"]}
shown(
    "experts-2",
    pictures.table(
        ["rank of each expert", "numbers", "best rate tried", "held-out loss", "a step, of the dense model's"],
        [
            (rank, f"{of['trained']:,}", f"{of['lr']:g}", f"{of['new']:.3f}", f"{of['step']:.2f}")
            for rank, of in least.items()
        ],
    ),
)

assert [f"{of['new']:.2f}" for of in least.values()] == ["3.68", "3.36", "3.16"]
assert least[1]["lr"] == least[4]["lr"] == 2 * least[16]["lr"]
assert [f"{of['old'] - recorded['mixture']['old']:.1f}" for of in least.values()] == ["1.0", "1.3", "1.4"]
assert (
    all(1.4 < of["step"] < 1.7 for of in least.values())
    and max(of["step"] for of in least.values()) - min(of["step"] for of in least.values()) < 0.12
)
assert least[16]["trained"] / least[1]["trained"] == 16

# %% Should the router train?

alone, routed = {"experts": 4}, {"experts": 4, "router": 4}
lr = best_rate(alone)
rows = []
for name, ranks in (("experts", alone), ("experts and router", routed)):
    new, old = (np.array([point["result"][what] for point in trainings(ranks, lr)]) for what in ("new", "old"))
    moved = np.mean([point["result"]["routing"]["moved"] for point in trainings(ranks, lr)])
    rows.append((name, f"{new.mean():.3f}", f"{np.ptp(new):.3f}", f"{old.mean():.3f}", f"{moved:.0%}"))
shown(
    "experts-3",
    pictures.table(
        ["adapters beside", "held-out loss", "span", "old text", "of the old text's positions, on other experts"], rows
    ),
)

frozen, trains = ([point["result"] for point in trainings(ranks, lr)] for ranks in (alone, routed))
assert len(frozen) == len(trains) == 3 and [point["run"]["seed"] for point in trainings(routed, lr)] == [0, 1, 2]
gained = np.array([a["new"] - b["new"] for a, b in zip(frozen, trains)])
forgot = np.array([b["old"] - a["old"] for a, b in zip(frozen, trains)])
assert (f"{gained.min():.3f}", f"{gained.max():.3f}", f"{gained.mean():.3f}") == ("0.004", "0.030", "0.015")
assert (f"{forgot.min():.2f}", f"{forgot.max():.2f}") == ("0.01", "0.06")
back = [[of["router put back"][text] - of[text] for text in ("new", "old")] for of in trains]
assert all(0.04 < new < 0.06 and -0.04 < old < -0.025 for new, old in back)
assert round(100 * (trains[0]["trained"] / frozen[0]["trained"] - 1), 1) == 2.6

from matplotlib.colors import ListedColormap

SHOWN = 16
tokens = [token.replace(" ", "·").replace("\n", "↵") for token in recorded["passage"][:SHOWN]]
trained = trainings({"experts": 4, "router": 4}, seed=0)[0]["result"]["routing"]
figure = pictures.new_figure(5.2, 4.8)
colours = ListedColormap([pictures.BASE, pictures.LORA, pictures.THIRD, "#b0a9c9"])
for axes, (title, routing) in zip(
    figure.subplots(2, 1, sharex=True), (("before", recorded["mixture"]["routing"]), ("after, router trained", trained))
):
    grid = np.array(routing["passage"])[:, :SHOWN]
    axes.pcolormesh(range(SHOWN), range(4), grid, cmap=colours, vmin=0, vmax=3, shading="nearest", alpha=0.8)
    axes.invert_yaxis()
    for (layer, place), expert in np.ndenumerate(grid):
        axes.text(place, layer, expert, ha="center", va="center", color="#111")
    axes.set(yticks=range(4), yticklabels=[f"layer {layer}" for layer in range(4)], title=title)
axes.set_xticks(range(len(tokens)), tokens, rotation=90)
picture(
    "experts-4",
    pictures.show(
        figure,
        "Two grids of four layers by 16 tokens. Each cell has the number and the colour of an expert. Many cells differ between the two grids, and the lowest layers' change least.",
        "The best of four experts for each token. A dot is a space.",
    ),
)

told = recorded["mixture"]["routing"]["told by the token"]
assert (
    told[0] > 0.85
    and told[3] < 0.75
    and min(told) > 0.74
    and max(max(of) for of in recorded["mixture"]["routing"]["rows of new"]) < 0.46
)
assert all(0.79 < of < 0.87 for of in trained["told by the token"])
assert [min(of) for of in recorded["mixture"]["routing"]["rows of new"]][1] < 0.09

# %% Why did the merged mixture forget?

untouched, rows = recorded["mixture"], []
for name, ranks in ways.items():
    new, old = at_best(ranks, "new").mean(), at_best(ranks, "old").mean()
    half = trainings(ranks, best_rate(ranks), seed=0)[0]["result"]["half"]
    rows.append(
        (
            name,
            f"{new:.2f}",
            f"{old - untouched['old']:.2f}",
            f"{half['new']:.2f}",
            f"{half['old'] - untouched['old']:.2f}",
        )
    )
shown(
    "experts-5",
    pictures.table(["adapters beside", "held-out loss", "forgotten", "half: held-out loss", "forgotten"], rows),
)

for point in recorded["trainings"]:
    assert abs(point["result"]["old"] - point["result"]["old, not merged"]) < 2e-4
for ranks in ways.values():
    result = trainings(ranks, best_rate(ranks), seed=0)[0]["result"]
    half = result["half"]
    gain = (untouched["new"] - half["new"]) / (untouched["new"] - result["new"])
    left = (half["old"] - untouched["old"]) / (result["old"] - untouched["old"])
    assert 0.66 < gain < 0.85 and 0.24 < left < 0.36
frozen = trainings({"experts": 4}, best_rate({"experts": 4}), seed=0)[0]["result"]["routing"]
apart = np.abs(np.array(frozen["rows of new"]) - np.array(frozen["rows of old"]))
assert apart.max() < 0.1 and np.min([frozen["rows of new"], frozen["rows of old"]]) > 0.02
assert frozen["moved"][0] == 0 and 0.2 < frozen["moved"][1] < frozen["moved"][3] < 0.5
assert [round(100 * of) for of in frozen["moved"][1:]] == [26, 33, 45]
learned = {
    name: [(point["result"]["new"], point["result"]["old"]) for point in trainings(ranks, seed=0)]
    for name, ranks in ways.items()
}
experts_4, dense_2 = (
    trainings(ranks, rate, seed=0)[0]["result"] for ranks, rate in (({"experts": 4}, 0.004), ({"all": 9}, 0.002))
)
assert [f"{of['old'] - untouched['old']:.2f}" for of in (experts_4, dense_2)] == ["1.22", "1.16"]
assert abs(experts_4["new"] - dense_2["new"]) < 0.012 and 0.05 < experts_4["old"] - dense_2["old"] < 0.08
