"""What microlora.md asserts and shows; the names are the page's own."""

import math

import microlora_runs as micro
from pages import block, shown

# %% 7. LoRA in 200 lines of plain Python

shown("output", block(*micro.lines("as it is")))
(people, other), (forgot, dinosaurs) = micro.losses("as it is")
whole, thin = micro.trained("as it is")
assert (whole, thin) == (3984, 620)
assert round(100 * thin / whole) == 16
assert abs(other - math.log(27)) < 0.1 and other - people > 0.7
assert other - dinosaurs > 1 and forgot > people + 0.5
assert float(micro.lines("as it is")[-1].split()[-1]) < 1e-13

# %% Two challenges

NAMES = "rank 1", "as it is", "rank 8"
told = (f"{name:9} {micro.trained(name)[1]:5} numbers   loss {micro.losses(name)[1][1]}" for name in NAMES)
shown("other-ranks", block(*told))
assert [micro.trained(name)[1] for name in NAMES] == [310, 620, 2480]
ranked = [micro.losses(name)[1][1] for name in NAMES]
gains = ranked[0] - ranked[1], (ranked[1] - ranked[2]) / 6  # for one rank more
assert gains[0] > 2 * gains[1] > 0

code = [new.replace("\n    ", "\n") + "\n" for _, new in micro.CHALLENGES["the head trains whole"]]
told = (
    f"{micro.trained('the head trains whole')[1]} numbers train",
    f"loss on unseen dinosaurs: {micro.losses('the head trains whole')[1][1]}",
)
shown("head", block(*code, *told))
assert micro.trained("the head trains whole")[1] == 620 - 2 * (27 + 24) + 27 * 24 == 1166
