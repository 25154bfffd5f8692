"""An adapter's files looked at from outside: is it applied, and is it right? ``minilora audit`` prints the answer.

`auditing` asks the questions in turn, `findings` are what came out, and `report` writes them.

- `tensors`: the tensors of a file, whichever format it has; `adapterfile`: what an adapter is, whichever wrote it
- `adapteropening`: which format that is
- `peftadapter`, `mlxadapter`, `ggufadapter`, `kohyaadapter`: the names of each format, and what is wrong with the names
- `modelheaders`: the names and the shapes of a model's weights; `landing`: which of them each module changes, by the
  names in `spellings`; `shapes` and `expertshapes`: whether it fits there
- `targets`: which modules the configuration names, and which of them the file has
- `configkeys`: the keys that change the meaning, and who reads them
- `numbers`: each module's numbers: NaN, zeros, and the size of the change
- `mergeloss`: what merging loses in a few bits
"""
