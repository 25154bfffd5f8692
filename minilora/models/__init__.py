"""Models: layers made of layers, with the paths that adapters call them by."""
