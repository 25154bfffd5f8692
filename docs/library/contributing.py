"""What contributing.md asserts and shows; the names are the page's own."""

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
