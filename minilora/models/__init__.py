"""A door: the decoder stands in `minilora.language`."""
