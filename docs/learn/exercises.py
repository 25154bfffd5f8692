"""What exercises.md asserts and shows; the names are the page's own."""

from pages import live, picture, shown
from questions import answered, ask, asked, kept, starts, two_losses, write

from minilora.exercises import rank_curve, rate_curve


def question(name):
    """Show a question at its place, below it its form, and its answer."""
    place = name.replace(" ", "-").replace(",", "").lower()
    shown(place, asked(name))
    live(f"answer-{place}", ask(name))
    shown(f"{place}-answer", answered(name))


def function(name):
    """Show the form of a function's lines."""
    live(name.replace("_", "-").lower(), write(name))


live("kept", kept())

# %% 1. The gradient of the loss

function("loss_gradient")

# %% 2. The gradient of B

function("grad_B")

# %% 3. The gradient of h

function("grad_h")

# %% 4. The gradient of A

function("grad_A")

# %% 5. The whole backward

function("backward")
function("lora_backward")

# %% Train with it

assert my_loss < 1e-6
assert their_loss < 1e-6

# %% 6. Predict before you run

question("first step")
question("larger gradients")
question("larger alpha")
question("larger alpha, plain steps")
question("off by one")

# %% 7. Which factor can move?

live("first-to-move", starts())
function("start")

# %% 8. Merge

function("merged")

# %% 9. How many parameters?

function("count")
question("square alone")

# %% 10. The best factors of a change

function("factors")

# %% 11. Back through a softmax

function("grad_scores")

# %% 12. What does a 7B model take?

question("7B in full")
question("7B at 4 bits")

# %% 13. Which rank?

picture("loss-by-rank", two_losses(rank_curve(), "rank", "the 60 rows it was fitted to"))
question("rank from a curve")
picture("loss-by-rate", two_losses(rate_curve(), "rate", "the 60 rows it trained on"))
question("rate from a curve")

# %% 14. Adam's first move

question("first move, one row")
question("first move, many rows")

# %% 15. DoRA's gradient

function("grad_V")
question("along V")
