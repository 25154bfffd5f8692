"""What exercises.md asserts and shows; the names are the page's own."""

from pages import live, picture

# %% Exercises
from questions import ask, two_losses, write

from minilora.exercises import rank_curve, rate_curve

# %% 2. The gradient of B

live("exercises-2", write("grad_B"))

# %% 3. The gradient of h

live("exercises-3", write("grad_h"))

# %% 4. The gradient of A

live("exercises-4", write("grad_A"))

# %% 6. Predict before you run

live("exercises-5", ask("first step"))

live("exercises-6", ask("larger gradients"))

live("exercises-7", ask("larger alpha"))

live("exercises-8", ask("larger alpha, plain steps"))

live("exercises-9", ask("off by one"))

# %% 12. What does a 7B model take?

live("exercises-10", ask("7B in full"))

live("exercises-11", ask("7B at 4 bits"))

# %% 13. Which rank?

picture("exercises-12", two_losses(rank_curve(), "rank", "the 60 rows it was fitted to"))

live("exercises-13", ask("rank from a curve"))

picture("exercises-14", two_losses(rate_curve(), "rate", "the 60 rows it trained on"))

live("exercises-15", ask("rate from a curve"))

# %% 14. Adam's first move

live("exercises-16", ask("first move, one row"))

live("exercises-17", ask("first move, many rows"))

# %% 15. DoRA's gradient

live("exercises-18", ask("along V"))
