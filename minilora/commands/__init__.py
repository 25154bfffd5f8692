"""The commands of ``minilora``, one file each: `add` says what a command takes, `run` does it.

`options` has what several of them share, `streams` what the process writes to. No file here imports NumPy or what needs
it before a command runs: that takes so long that Ctrl-C often comes then.
"""
