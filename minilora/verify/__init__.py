"""Is it right? Gradients against measured slopes, and training against the best there is."""
