"""What exercises.md asserts and shows; the names are the page's own."""

from pages import DOCS, live, picture, says, shown
from questions import answered, ask, asked, kept, starts, two_losses, write

from minilora.exercises import QUESTIONS, rank_curve, rate_curve
from minilora.exercises.functions import EXERCISES
from minilora.exercises.questions import ANSWER_TOLERANCE

live("kept", kept())
live("first-to-move", starts())
for name in EXERCISES:
    live(name.replace("_", "-").lower(), write(name))
for name in QUESTIONS:
    place = name.replace(" ", "-").replace(",", "").lower()
    shown(place, asked(name))
    live(f"answer-{place}", ask(name))
    shown(f"{place}-answer", answered(name))
picture("loss-by-rank", two_losses(rank_curve(), "rank", "the 60 rows it was fitted to"))
picture("loss-by-rate", two_losses(rate_curve(), "rate", "the 60 rows it trained on"))
assert [*EXERCISES].index("backward") + 1 == 5
says("yourself, in five steps; then predict", "## 5. The whole backward")
checks = (DOCS / "learn" / "is-a-gradient-right.md").read_text(encoding="utf-8").partition("\nAnd six checks:\n\n")[2]
assert checks.partition("\n\n")[0].count("\n- ") + 1 == 6
says(f"right within {100 * ANSWER_TOLERANCE:g} %", "in 16 bits, and in four", "([six checks](is-a-gradient-right.md))")

# %% Train with it

assert my_loss < 1e-6
assert their_loss < 1e-6
