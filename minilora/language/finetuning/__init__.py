"""A fine-tuning from the model's file to the adapter's.

`recipe` says what is trained, and how, with `defaults` that fit a model's size; `session` does it. `costs` foretells
memory and time, and `cores` on how many cores it computes. `losstable` shows the losses as they are measured, and
`heartbeat` says what takes long. `keepingbest` keeps the best step, `withdropout` puts masks into a step, and `stopped`
is what a checkpoint says of a training that was stopped.
"""
