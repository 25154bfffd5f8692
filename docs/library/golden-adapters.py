"""What golden-adapters.md asserts and shows; the names are the page's own."""

# %% The report

assert status == 1

# %% Sessions

assert status == 1
assert printed.getvalue().split("\n")[0].endswith(f"[{flag}]")
