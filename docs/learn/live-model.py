"""What live-model.md asserts and shows; the names are the page's own."""

from pages import DOCS, Drawn, live

# %% Fine-tune a language model here

live("live-model", Drawn((DOCS / "_static" / "live" / "live-model.html").read_text(encoding="utf-8")))
