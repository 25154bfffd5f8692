"""A change of weight that spells a word: README's picture and the front page show what adapters learn of it."""

from __future__ import annotations

import numpy as np

WORD = """
............................
.#..............####....#...
.#..............#...#..#.#..
.#......###.....#...#.#...#.
.#.....#...#....####..#...#.
.#.....#...#....#.#...#####.
.#.....#...#....#..#..#...#.
.#####..###.....#...#.#...#.
............................
"""
SIDE = 10
"""How many outputs, and how many inputs, a cell of the word stands for."""


def word() -> np.ndarray:  # -> (9, 28)
    """Return a change of weight that can be read: 1 where a letter has ink, else 0. Its rank is 7."""
    return np.array([[float(cell == "#") for cell in line] for line in WORD.split()])


def change() -> np.ndarray:  # -> (90, 280)
    """Return the same word for a larger layer. Its rank is 7, too."""
    return np.kron(word(), np.ones((SIDE, SIDE)))
