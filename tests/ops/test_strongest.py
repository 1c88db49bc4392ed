"""The strongest, whatever ties."""

from __future__ import annotations

import numpy as np
import pytest

from trak_dist.ops.strongest import Strongest, strongest


@pytest.mark.parametrize("count", [1, 2, 6, 29, 40])
@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_the_strongest_are_those_of_a_stable_sort(n: int, count: int) -> None:
    random = np.random.default_rng(n)
    scores = random.integers(-3, 4, (20, n)).astype(np.float32)
    scores[:4] = random.choice([np.inf, -np.inf, 0.0, -0.0], (4, n))
    for sparse in (False, True):
        if sparse:
            scores[:2, ::2] = np.nan
        by_sort = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        assert np.array_equal(strongest(scores, count), by_sort)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_block_after_block_they_are_those_of_all(count: int) -> None:
    random = np.random.default_rng(count)
    scores = random.integers(-40, 41, (15, 90)).astype(np.float32)
    scores[0], scores[1, ::3], scores[2, 50:] = 7, np.nan, np.inf
    found = Strongest(len(scores), count)
    for start in range(0, 90, 9):
        block = scores[:, start : start + 9]
        found.add(block, np.broadcast_to(np.arange(start, start + 9), block.shape))
    by_sort = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    assert np.array_equal(found.rows, by_sort)
    assert np.array_equal(found.scores, np.take_along_axis(scores, by_sort, axis=1), equal_nan=True)
