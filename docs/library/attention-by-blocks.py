"""What attention-by-blocks.md asserts and shows; the names are the page's own."""

from pages import says

from minilora.fast.blockwise import CPU, GPU

# %% Attention by blocks

says(f"for texts of more than {CPU.plain_up_to} positions, on a GPU of more than {GPU.plain_up_to:,}.")

# %% What is cached

assert kept[2] == 2 * kept[1] == 4 * kept[0]  # of the last, by blocks
page = freeze(Attention(*linears, layer.rotary))
shares = [page.forward(rng.standard_normal((T, 12)))[1].kept[-1][-1] for T in (5, 10)]
assert shares[1].size == 4 * shares[0].size
says("A text twice as long needs four\ntimes the memory.")
D = layer.rotary.in_features
(_, queries), (_, keys), *_ = widths
says(f"a layer of {queries // D} heads over {keys // D} key heads, $D = {D}$")
