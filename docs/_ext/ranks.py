"""A change of weight that spells a word, for adapters to learn on the front page (also in the README's picture)."""

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
"""The number of outputs, and of inputs, for each cell of the word."""


def word() -> np.ndarray:  # -> (9, 28)
    """Return a change of weight that can be read: 1 where a letter has ink, else 0. Its rank is 7."""
    return np.array([[float(cell == "#") for cell in line] for line in WORD.split()])


def change() -> np.ndarray:  # -> (90, 280)
    """Return the same word for a larger layer. Its rank is also 7."""
    return np.kron(word(), np.ones((SIDE, SIDE)))
