"""How far rows reach, and parts of a batch in which little is filling: what they are, and that nothing else changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import Llama, cross_entropy
from minilora.fast.accumulation import Accumulated
from minilora.language.text import next_token_loss, where_it_counts
from minilora.language.widths import by_width, of_area, widths
from minilora.training import backpropagate
from minilora.variants.dropout import with_dropout

from ..support.language import adapted, of_lengths

TARGETS = ["q_proj", "gate_proj", "lm_head"]
LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=6)


def all_cuts(n):
    """Every way to cut n rows in a line, as slices."""
    for last in range(n):
        for cut in all_cuts(last) if last else [[]]:
            yield [*cut, slice(last, n)]


@given(lengths=LENGTHS)
def test_a_row_reaches_to_its_last_target_that_counts(lengths):
    np.testing.assert_array_equal(widths(of_lengths(lengths)[1]), lengths)


@given(lengths=LENGTHS, rows=st.integers(1, 7))
@settings(max_examples=60)
def test_no_cut_into_as_many_parts_has_a_smaller_largest_area(lengths, rows):
    parts, wide = by_width(of_lengths(lengths)[1], rows), sorted((n for n in lengths if n), reverse=True)
    if not wide:
        np.testing.assert_array_equal(parts, [np.arange(min(rows, len(lengths)))])
        return
    assert sorted(np.concatenate(parts)) == [row for row, n in enumerate(lengths) if n]
    assert [lengths[row] for part in parts for row in part] == wide
    most = -(-len(wide) // rows)
    assert len(parts) <= most
    least = min(max((p.stop - p.start) * wide[p.start] for p in cut) for cut in all_cuts(len(wide)) if len(cut) <= most)
    assert max(len(part) * lengths[part[0]] for part in parts) == least <= rows * wide[0]


@given(lengths=LENGTHS, area=st.integers(1, 40))
def test_no_part_is_larger_than_an_area_nor_fits_into_the_one_before(lengths, area):
    parts = of_area(of_lengths(lengths)[1], area)
    assert [lengths[row] for part in parts for row in part] == sorted((n for n in lengths if n), reverse=True)
    for i, part in enumerate(parts):
        assert len(part) == 1 or len(part) * lengths[part[0]] <= area
        assert i == 0 or (len(parts[i - 1]) + 1) * lengths[parts[i - 1][0]] > area


@pytest.mark.parametrize("dropout", [0, 0.5])
@pytest.mark.parametrize("lengths", [(2, 4), (3, 9, 0, 4, 1), (5,), (0, 3), (0, 0)])
@pytest.mark.parametrize(("rows", "workers"), [(None, 1), (1, 1), (2, 1), (2, 2), (5, 1)])
def test_gradients_of_texts_of_many_lengths_are_those_of_all_logits(lengths, rows, workers, dropout):
    """Their masks are those of the batch, whichever part a text is in, and however far that reaches."""
    model, (X, Y) = adapted(TARGETS), of_lengths(lengths)
    model = with_dropout(model, dropout, range(5, 5 + len(lengths))) if dropout else model
    gradients = where_it_counts if rows is None else Accumulated(rows, workers, where_it_counts, by_width)
    found, expected = (way(model, X, Y, next_token_loss) for way in (gradients, backpropagate))
    assert found.keys() == expected.keys()
    for name, g in found.items():
        assert np.abs(g - expected[name]).max() <= 1e-12


def test_each_part_of_a_batch_is_computed_as_far_as_its_widest_row(monkeypatch):
    model, (X, Y), seen, right = adapted(TARGETS), of_lengths([2, 6, 1, 3, 2]), [], Llama.forward
    monkeypatch.setattr(Llama, "forward", lambda self, x, at=None: seen.append(x) or right(self, x, at))
    Accumulated(3, 1, where_it_counts, by_width)(model, X, Y, cross_entropy)
    for part, rows, width in zip(seen, ([1, 3], [0, 4, 2]), (6, 2), strict=True):
        np.testing.assert_array_equal(part, X[rows, :width])


def test_targets_of_fewer_rows_than_inputs_are_refused():
    model, (X, Y) = adapted(TARGETS), of_lengths([2, 6, 3])
    for cut in (Accumulated(2, 1, where_it_counts, by_width), Accumulated(2, 1)):
        with pytest.raises(ValueError, match="y has 2 rows, expected 3 as x has"):
            cut(model, X, Y[:2], next_token_loss)
