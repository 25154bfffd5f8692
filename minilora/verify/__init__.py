"""Verification: `gradcheck`, all layers in `instances`, a training step in `trace`, the optimum in `closed_form`."""
