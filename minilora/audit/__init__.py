"""An adapter's files looked at from outside: is it applied, and is it right? ``minilora audit`` prints the answer.

`auditing` goes through the other files. `headers` opens an adapter or a model, and `formats` says which program wrote
the adapter. Then come the rules, functions that yield `findings`: of the `keys` of the configuration, the `contents`
of the file, its `landing` in the model, the `fitting` of shapes, the `numbers`, and the `changes` that merging loses.

A merged model is held against its base by `merging`, in `units`. `roads` has what a right merge may write, `suspects`
what a wrong weight is, and `verdicts` what is said of the whole.
"""
