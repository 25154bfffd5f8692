"""What live-layer.md asserts and shows; the names are the page's own."""

from pages import DOCS, live

# %% Train a layer in your browser

live("live-layer", (DOCS / "_ext" / "live-layer.html").read_text(encoding="utf-8"))
