"""What is true of a router beside the claims: ties, and where its balance is least."""

import numpy as np

from minilora.layers.router import Router, balance
from minilora.layers.stacked import StackedLinear


def test_of_equal_scores_the_lower_number_is_kept():
    router = Router(StackedLinear(np.ones((5, 2))), 3)
    _, choice, _ = router.route(np.ones((2, 2)))
    assert choice.tolist() == [[0, 1, 2]] * 2
    scored = Router(StackedLinear(np.array([[0.0], [1.0], [0.0], [1.0]])), 3)
    assert scored.route(np.ones((1, 1)))[1].tolist() == [[1, 3, 0]]
    many = np.arange(40.0) % 3  # so many that a sort which may exchange equals does
    every = Router(StackedLinear(many[:, None]), 40)
    assert every.route(np.ones((1, 1)))[1].tolist() == [sorted(range(40), key=lambda e: -many[e])]


def test_the_balance_is_least_where_all_are_kept_equally():
    randn = np.random.default_rng(0).standard_normal((8, 4))
    for size in (1, 5):
        assert np.isclose(balance(np.tile(size * np.eye(4), (3, 1)), 1)[0], 1)
    assert balance(np.tile([5.0, 0, 0, 0], (12, 1)), 1)[0] > 3
    assert np.isclose(balance(randn, 4)[0], 4)  # all kept: K = E
    assert {part.dtype.name for part in balance(randn.astype("f4"), 2)} == {"float32"}
