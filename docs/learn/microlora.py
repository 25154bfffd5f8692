"""What microlora.md asserts and shows; the names are the page's own."""

import math
import re

import microlora_runs as micro
from microlora import ALPHA, DINOSAURS, LETTERS, PEOPLE, PLACES, RANK, WIDTH, LoRA, Model
from pages import block, says, shown

lines = len(micro.FILE.read_text(encoding="utf-8").splitlines())

# %% 7. LoRA in 200 lines of plain Python

says(f"# 7. LoRA in {lines} lines of plain Python\n", f"LoRA and a language model in {lines} lines of plain Python")
shown("output", block(*micro.lines("as it is")), exact=True)
(people, other), (forgot, dinosaurs) = micro.losses("as it is")
whole, thin = micro.trained("as it is")
blind = math.log(len(LETTERS))
assert -0.1 < blind - other < 0.1 and other - people > 0.7
says(
    f"no better than a blind guess, {blind:.2f}.",
    f"{thin} numbers changed them, {100 * thin / whole:.0f} % of the model.",
)
assert other - dinosaurs > 1 and forgot > people + 0.5
assert float(micro.lines("as it is")[-1].split()[-1]) < 1e-13

# %% The names

code = micro.FILE.read_text(encoding="utf-8")
assert all(code.count(f"{name}[100:]") == code.count(f"{name}[:100]") == 1 for name in ("PEOPLE", "DINOSAURS"))
assert min(len(PEOPLE), len(DINOSAURS)) > 200
says("The first hundred names of each list are never learned")

# %% LoRA

layers = Model().layers
s, halved = (LoRA(layers["q"], rank, ALPHA).s for rank in (RANK, 2 * RANK))
assert halved == s / 2
says("twice the rank halves s.")

# %% The model

assert len(layers) == 6

says(
    "Six layers, all linear,",
    f"A letter comes in as {len(LETTERS) + PLACES} numbers: a 1 says which of {len(LETTERS)} signs it is, "
    f"another 1 at which of {PLACES} places. `embed` makes {WIDTH} numbers of it.",
)

# %% Two challenges

NAMES = "rank 1", "as it is", "rank 8"
told = (f"{name:9} {micro.trained(name)[1]:5} numbers   loss {micro.losses(name)[1][1]}" for name in NAMES)
shown("other-ranks", block(*told), exact=True)
sides = 4 * 2 * WIDTH + (len(LETTERS) + PLACES + WIDTH) + (WIDTH + len(LETTERS))  # in and out over the six layers
ranks = [int(re.search(r"= (\d+),", new)[1]) for name in (NAMES[0], NAMES[2]) for _, new in micro.CHALLENGES[name]]
assert [micro.trained(name)[1] for name in NAMES] == [ranks[0] * sides, RANK * sides, ranks[1] * sides]
says(
    f"Set the rank to {ranks[0]}, then to {ranks[1]},",
    f"A rank takes {sides} numbers, the sum of `in` and `out` over the six layers.",
)
ranked = [micro.losses(name)[1][1] for name in NAMES]
gains = ranked[0] - ranked[1], (ranked[1] - ranked[2]) / (ranks[1] - RANK)  # for one rank more
assert gains[0] > 2 * gains[1] > 0

code = [new.replace("\n    ", "\n") + "\n" for _, new in micro.CHALLENGES["the head trains whole"]]
told = (
    f"{micro.trained('the head trains whole')[1]} numbers train",
    f"loss on unseen dinosaurs: {micro.losses('the head trains whole')[1][1]}",
)
shown("head", block(*code, *told), exact=True)
says("beside LoRA on the other five layers.")
assert micro.trained("the head trains whole")[1] == thin - RANK * (len(LETTERS) + WIDTH) + len(LETTERS) * WIDTH
