"""Evenly spaced rows."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trak_dist.spacing import evenly_spaced


@pytest.mark.parametrize(
    ("size", "count", "rows"),
    [(10, 4, [0, 3, 6, 9]), (3, 5, [0, 1, 2]), (1, 4, [0]), (9, 1, [0]), (0, 4, []), (9, 0, [])],
)
def test_rows_are_spaced_from_the_first_to_the_last(size: int, count: int, rows: list[int]) -> None:
    assert evenly_spaced(size, count) == rows


@given(st.integers(1, 10**6), st.integers(2, 300))
def test_there_are_as_many_rows_as_asked_for_and_gaps_differ_by_one(size: int, count: int) -> None:
    rows = evenly_spaced(size, count)
    assert len(rows) == min(size, count)
    assert (rows[0], rows[-1]) == (0, size - 1)
    gaps = [b - a for a, b in pairwise(rows)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
