"""The random subsets of the ground truth: their size, their order, and that they never change."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trak_dist.ops import draws

steady = settings(derandomize=True, deadline=None, max_examples=100)


@steady
@given(index=st.integers(0, 10**6), rows=st.integers(1, 300), share=st.floats(0.001, 0.999))
def test_a_subset_is_so_many_distinct_rows_in_ascending_order(
    index: int, rows: int, share: float
) -> None:
    chosen = draws.subset(index, rows, share).tolist()
    assert chosen == sorted(set(chosen))
    assert len(chosen) == round(share * rows)
    assert all(0 <= row < rows for row in chosen)


def test_subsets_are_unlike_each_other_and_take_each_row_alike() -> None:
    masks = np.zeros((400, 100))
    for index, mask in enumerate(masks):
        mask[draws.subset(index, 100, 0.5).numpy()] = 1
    assert len(np.unique(masks, axis=0)) == 400
    per_row, common = masks.sum(axis=0), masks @ masks.T
    assert (np.abs(per_row - 200) < 5 * 10).all()  # 5 σ of 400 fair coins
    others = common[~np.eye(400, dtype=bool)]
    assert abs(others.mean() - 25) < 0.1  # two random halves of 100 have 25 in common
    assert (np.abs(others - 25) < 6 * 2.6).all()


def test_a_larger_share_holds_the_smaller_one() -> None:
    small, large = (set(draws.subset(3, 50, share).tolist()) for share in (0.2, 0.6))
    assert small < large


def test_subsets_never_change() -> None:
    assert [draws.subset(index, 20, 0.5).tolist() for index in range(3)] == [
        [1, 4, 5, 6, 7, 8, 9, 10, 12, 18],
        [1, 6, 7, 9, 10, 11, 13, 14, 16, 18],
        [0, 1, 2, 3, 6, 7, 12, 14, 17, 18],
    ]
    assert draws.subset(0, 1000, 0.3)[:6].tolist() == [1, 5, 7, 10, 12, 18]
    assert draws.subset(2, 1000, 0.3)[:6].tolist() == [0, 1, 2, 3, 6, 7]
