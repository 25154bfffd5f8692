"""What attention-by-blocks.md asserts and shows; the names are the page's own."""

# %% What is kept

assert kept[2] == 2 * kept[1] == 4 * kept[0]  # of the last, by blocks
