"""What strength.md asserts and shows; the names are the page's own."""

# %% Where s enters

assert np.isclose(moved(8, False) / moved(4, False), 4) and np.isclose(moved(8, True) / moved(4, True), 2, rtol=1e-3)

# %% What the rank does

ratio = {case: values[-1] / values[0] for case, values in moves.items()}
assert 0.7 < ratio[1, False] < 1.4 and 0.7 < ratio[512, True] < 1.4
assert 3.5 < ratio[1, True] < 5.6 and 0.2 < ratio[512, False] < 0.33
