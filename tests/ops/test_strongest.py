"""The strongest, whatever ties."""

from __future__ import annotations

import numpy as np
import pytest

from trak_dist.ops import strongest as module
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


@pytest.mark.parametrize("first", [0, 3, 1024])
@pytest.mark.parametrize("count", [1, 4, 50])
def test_the_strongest_of_blocks_are_those_of_all(
    monkeypatch: pytest.MonkeyPatch, first: int, count: int
) -> None:
    monkeypatch.setattr(module, "FIRST", first)
    random = np.random.default_rng(count)
    for trial in range(20):
        scores = random.integers(-3, 4, (5, 40)).astype(np.float32)
        if trial % 2:
            scores[random.random(scores.shape) < 0.7] = random.choice([np.nan, np.inf, -0.0])
        rows = np.broadcast_to(np.arange(40), scores.shape)
        found, cuts = Strongest(5, count), np.sort(random.integers(0, 41, 3))
        for some in np.split(np.arange(40), cuts):
            found.add(scores[:, some], rows[:, some])
        wanted = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        np.testing.assert_array_equal(found.rows, wanted)
        np.testing.assert_array_equal(found.scores, np.take_along_axis(scores, wanted, axis=1))
