"""Adapters as files, with right answers: for programs that read PEFT's layout and cannot be called from Python.

`folder` writes a folder of them, `judging` holds what a program answered against it, and so does the command
``minilora golden``.

- `bases`: the random decoders, and their files
- `cases`: the adapters, a row each, with what each is there for; `prompts`: which tokens they are asked
- `formulas`: what adapters make of a base's weights
- `stored`: cases of files as they are found, in half precision or under another program's names
- `misreadings`: what programs make of them that read wrongly, a row each
- `exact`: a decoder's logits, the same bits on every processor
- `answers`: the numbers that stand in a case's file
- `mixtures`: the same for mixtures of experts
- `sessions`: requests to one living engine; `leftovers`: what engines make of them that keep something of earlier ones;
  `sessionanswers`: the right answers; `asking`: an engine in Python is asked
"""
