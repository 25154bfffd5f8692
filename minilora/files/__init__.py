"""The formats of the files that the rooms above write and read: what is in them, and what is refused.

`tensorfile` is the format of all of them, safetensors. `adapterfolder`, with `peftconfig` and `patterns`, is an adapter
in PEFT's layout; `basefile` is a checkpoint that an adapter is merged into, `checkpointfile` a training between two
epochs.
"""
