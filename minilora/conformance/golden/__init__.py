"""Golden adapters: files with known answers, for testing programs that read adapters in PEFT's layout.

`folder` writes them: the `cases` of `cases.toml`, each with its `adapters`, its base from `bases`, and its answers from
`signatures`, both the right ones and those of each bug. `reading` applies an adapter's files to a base by formulas
whose parts a bug replaces; `exact` computes the logits. The bugs are `misreadings` of files, `leftovers` of earlier
requests, and `mistakes` with a user's own adapter.

`judging` compares a program's `answerfiles` with the answers, as ``minilora golden`` does; `asking` runs the `sessions`
on an engine in Python. `diagnosing` explains an engine's logits for a user's own `subject`, as ``minilora diagnose``
does.
"""
