"""Adapters as files, with right answers: for programs that read PEFT's layout and cannot be called from Python.

`folder` writes them: the `cases` of `cases.toml`, each with its `adapters` beside its `bases`, and with `signatures`,
the right answers and those of each bug. `reading` is what an adapter's files make of a base, in parts that a bug
replaces; `exact` computes the logits. The bugs are `misreadings` of files, `leftovers` of earlier requests, and
`mistakes` with a person's own adapter.

`judging` holds a program's `answerfiles` against the answers, as ``minilora golden`` does; `asking` takes `sessions` to
an engine in Python. `diagnosing` takes a person's own `subject`, as ``minilora diagnose`` does.
"""
