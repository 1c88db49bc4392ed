"""The strongest, whatever ties."""

from __future__ import annotations

import numpy as np
import pytest

from trak_dist.ops.strongest import strongest


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
