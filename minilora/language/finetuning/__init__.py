"""A fine-tuning from the model's file to the adapter's.

`recipe` says what is trained, and how, with `defaults` that fit a model's size; `session` does it. `withdropout` puts
masks into a step, and `keepingbest` keeps the parameters of the best one. `costs` foretells memory and time,
`losstable` shows the losses as they are measured, `stopped` is what a checkpoint says of a training that was stopped,
`heartbeat` says what takes long, and `cores` on how many cores it computes.
"""
