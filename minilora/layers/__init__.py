"""What a network is made of besides `Linear`: one file, one derivation each.

`activation` has the functions between two layers, `sequential` the chain rule along a list of layers. `embedding` and
`convolution` are linear layers on a rewritten input, and `flatten` stands between images and rows.
"""
