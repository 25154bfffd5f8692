"""What guards against hostile files and machines that die: a reader of the mathematics passes this room by."""
