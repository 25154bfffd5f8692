"""What contributing.md asserts and shows; the names are the page's own."""

from runpy import run_path

from pages import ROOT, says

# %% Tests

mutation = run_path(str(ROOT / ".ci" / "mutation.py"))
bars = mutation["BARS"]
assert bars["layers"] == bars["core"] and len({bars[part] for part in bars.keys() - {"core", "layers"}}) == 1
says(
    f"At least {100 * bars['core']:.0f} % of those to the mathematics and to layers must fail a test, and {100 * bars['rim']:.0f} % elsewhere",
    f"{mutation['SAMPLE']} changes to the judge",
    "--sample 5    five changes to one module",  # an example's number, in figures and in words
)

# %% Add a known bug

assert check(theirs).diagnoses == [row[1]]
table.BUGS = usual
assert all(row[0] != bug.flag for bug in table.BUGS)

# %% Add a command

from contextlib import redirect_stderr
from io import StringIO

with redirect_stderr(StringIO()) as said:
    assert cli.main(["count", "1001", "1000", "--rank", "0"]) == 2
assert said.getvalue() == "minilora: rank must be at least 1, got 0\n"
