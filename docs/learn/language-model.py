"""What language-model.md asserts and shows; the names are the page's own."""

from pages import RECORDINGS, picture, printed, shown

# %% How close does LoRA come?

with printed("language-model-1"):
    import json

    import pictures

    recorded = json.loads((RECORDINGS / "language-model.json").read_text())
    glass, smol = recorded["glassllm"], recorded["smollm2"]
    s = glass["settings"]
    print(
        f"{s['steps']} steps of {s['batch_size']} x {s['length']} tokens, {glass['when']}, "
        + ", ".join(f"{name} {number}" for name, number in glass["versions"].items())
    )

rows = [("nothing", "0", "–", f"{glass['before']:.3f}")]
for name, run in glass["runs"].items():
    rows.append((name, f"{run['parameters']:,}", f"{run['lr']:g}", f"{run['losses'][-1]:.3f}"))
shown("language-model-2", pictures.table(["trained", "parameters", "learning rate", "nats a token, held out"], rows))

figure = pictures.new_figure(5.6, 3.8)
axes = figure.subplots()
colours = [pictures.LORA] * 3 + [pictures.BASE, pictures.INK]
for (name, run), colour, style in zip(glass["runs"].items(), colours, (":", "--", "-", "-", "-"), strict=True):
    axes.plot([0, *run["steps"]], [glass["before"], *run["losses"]], style, color=colour, label=name)
axes.set(xlabel="steps", ylabel="nats a token, held out")
axes.grid(alpha=0.3)
axes.legend()
picture(
    "language-model-3",
    pictures.show(
        figure,
        "Five falling curves of the held-out loss. The higher the rank, the lower LoRA's curve; the curves of full training lie below, "
        "and that of all weights rises at its end.",
        "The loss on text that no run has seen. A higher rank ends lower; training all weights ends lowest, and turns up at its end.",
    ),
)

losses = {name: run["losses"] for name, run in glass["runs"].items()}
one, four, sixteen, matrices, everything = (values[-1] for values in losses.values())
assert glass["before"] > one > four > sixteen > matrices > everything
assert all(min(losses[name]) == losses[name][-1] for name in losses if name != "all weights")
assert everything > min(losses["all weights"]) + 0.03
assert (glass["before"] - sixteen) / (glass["before"] - matrices) > 0.9
assert 0.2 < glass["runs"]["LoRA, r = 16"]["parameters"] / glass["runs"]["the same matrices"]["parameters"] < 0.21
assert s["lr"] == 3e-3 and s["alpha"] == "2 r" and s["batch_size"] * s["length"] == 2048
from recordings import Recordings

laboratory = Recordings(json.loads((RECORDINGS / "laboratory.json").read_text()))
shares = {rank: laboratory.gain(rank) for rank in (1, 4, 16)}
assert all(abs(shares[rank] - told) < 0.03 for rank, told in ((1, 2 / 3), (4, 5 / 6), (16, 0.95)))

# %% The same in the library

assert (Y[:, :-1] == X[:, 1:]).all()

# %% A larger model

with printed("language-model-4"):
    s, run = smol["settings"], smol["runs"]["LoRA, r = 8"]
    print(
        f"{smol['parameters']:,} parameters, {run['parameters']:,} of them trained; "
        f"{s['steps']} steps of {s['batch_size']} x {s['length']} tokens, lr {s['lr']:g}"
    )
    print(f"held out: {smol['before']:.3f} nats a token before, {run['losses'][-1]:.3f} after")
    for name, text in smol["text"].items():
        print(f"\n{name}:\n{text}")

assert run["losses"][-1] < smol["before"] - 0.5
assert 0.4 < (smol["before"] - run["losses"][0]) / (smol["before"] - run["losses"][-1]) < 0.5
assert run["steps"][0] == 8 and run["parameters"] < smol["parameters"] / 50
