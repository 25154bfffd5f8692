"""Golden adapters of mixtures of experts: the cases whose ids begin with ``experts-``.

Their factors are packed, so that a reader can pair those of different experts and get right shapes all the same.

- `bases`: the random mixtures, and their files
- `cases`: the adapters, a row each; `prompts`: which tokens they are asked
- `formulas`: what adapters make of a mixture's weights
- `misreadings`: what programs make of them that read wrongly, a row each
- `answers`: the numbers that stand in a case's file
"""
