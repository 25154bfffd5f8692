"""What microlora.md asserts and shows; the names are the page's own."""

from pages import printed

# %% LoRA in 200 lines of plain Python

with printed("microlora-1"):
    import micro

    print("\n".join(micro.lines("as it is")))

import math

(people, other), (forgot, dinosaurs) = micro.losses("as it is")
whole, thin = micro.trained("as it is")
assert (whole, thin) == (3984, 620)
assert round(100 * thin / whole) == 16
assert abs(other - math.log(27)) < 0.1 and other - people > 0.7
assert other - dinosaurs > 1 and forgot > people + 0.5
gap = float(micro.lines("as it is")[-1].split()[-1])
assert gap < 1e-13

# %% 1. Both at zero

assert before == after == (people, other)

# %% 2. Another rank

assert [micro.trained(name)[1] for name in ("rank 1", "as it is", "rank 8")] == [310, 620, 2480]
ranked = [micro.losses(name)[1][1] for name in ("rank 1", "as it is", "rank 8")]
gains = ranked[0] - ranked[1], (ranked[1] - ranked[2]) / 6  # for one rank more
assert gains[0] > 2 * gains[1] > 0

# %% 3. A head of its own

assert micro.trained("the head trains whole")[1] == 620 - 2 * (27 + 24) + 27 * 24 == 1166
