"""Is it right? `gradcheck`, every layer in `instances`, one training step in `trace`, the optimum in `closed_form`."""
