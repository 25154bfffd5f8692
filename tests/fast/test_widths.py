"""Rows of like widths together: no other cut has a smaller largest area."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilora.fast.widths import by_width, of_area, widths

from ..support.language import of_lengths

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
@example(lengths=[4, 1, 1, 1], rows=2)
@settings(max_examples=60)
def test_no_other_cut_has_a_smaller_largest_area(lengths, rows):
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
def test_no_part_exceeds_the_area_or_fits_into_the_last(lengths, area):
    parts = of_area(of_lengths(lengths)[1], area)
    assert [lengths[row] for part in parts for row in part] == sorted((n for n in lengths if n), reverse=True)
    for i, part in enumerate(parts):
        assert len(part) == 1 or len(part) * lengths[part[0]] <= area
        assert i == 0 or (len(parts[i - 1]) + 1) * lengths[parts[i - 1][0]] > area


def test_rows_of_one_width_keep_their_order():
    """Of so many rows, a sort that may exchange equals does, and each processor's in its own way."""
    lengths = [1 + i % 3 for i in range(40)]
    for cut, most in ((by_width, 7), (of_area, 20)):
        rows = np.concatenate(cut(of_lengths(lengths)[1], most)).tolist()
        assert rows == sorted(range(40), key=lambda row: -lengths[row])
