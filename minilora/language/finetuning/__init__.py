"""A fine-tuning from the model's file to the adapter's.

`recipe` says what is trained, and how, with `defaults` that fit a model's size; `session` does it. `costs` foretells
memory and time, `losstable` shows the losses as they are measured, `heartbeat` names what takes long, `stopped` is what a checkpoint says of a training
that was stopped, and `cores` says on how many cores it computes.
"""
