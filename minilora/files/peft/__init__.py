"""An adapter's folder in PEFT's layout.

`adapterfolder` opens one and checks its two files against each other. `adapterconfig` reads adapter_config.json.
`adapterkeys` says under which keys and in which shapes the other file holds the arrays of each kind of layer,
and `expertkeys` how those of a mixture's experts are named and packed.
"""
