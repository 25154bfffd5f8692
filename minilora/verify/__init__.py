"""Is it right? `gradcheck`, the check of every layer in `instances`, and the best adapter there is in `closed_form`."""
