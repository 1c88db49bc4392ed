"""AUC against pairs that are counted, its interval, what is found first, and overlaps of sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trak_dist.ops import ranking

FEW = st.integers(-3, 3).map(float)  # ties are common


@st.composite
def flagged(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Values with ties, and flags of which some, not all, are set."""
    values = draw(st.lists(FEW, min_size=2, max_size=30))
    flags = draw(
        st.lists(st.booleans(), min_size=len(values), max_size=len(values)).filter(
            lambda f: 0 < sum(f) < len(f)
        )
    )
    return np.array(values), np.array(flags)


def counted(values: np.ndarray, positive: np.ndarray) -> float:
    """The share of pairs of a positive and a negative one that are in order, ties half."""
    pairs = [(a, b) for a in values[positive] for b in values[~positive]]
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


@given(flagged())
def test_the_auc_is_the_share_of_ordered_pairs_and_lies_in_its_interval(case) -> None:
    values, positive = case
    found = ranking.auc(values, positive)
    assert found.mean == pytest.approx(counted(values, positive), abs=1e-12)
    assert 0 <= found.low <= found.mean <= found.high <= 1


@given(flagged())
def test_the_auc_of_the_reverse_ranking_is_the_rest_to_one(case) -> None:
    values, positive = case
    there, back = ranking.auc(values, positive), ranking.auc(-values, positive)
    assert there.mean + back.mean == pytest.approx(1)
    assert ranking.auc(np.exp(values), positive) == there, "only the order counts"


def test_the_auc_at_its_ends_and_for_nothing_but_ties() -> None:
    positive = np.array([True, True, False, False, False])
    for values, area in (([5, 4, 3, 2, 1], 1.0), ([1, 2, 3, 4, 5], 0.0), ([7] * 5, 0.5)):
        found = ranking.auc(np.array(values), positive)
        assert found.mean == area
    assert (
        ranking.auc(np.array([5, 4, 3, 2, 1]), positive).low == 1.0
    )  # the formula knows no better


def test_the_interval_is_hanley_and_mcneils_and_narrows_with_n() -> None:
    draws = np.random.default_rng(0)
    values, positive = draws.normal(size=60), np.arange(60) < 20
    values[positive] += 1
    widths = []
    for copies in (1, 4, 16):
        found = ranking.auc(np.tile(values, copies), np.tile(positive, copies))
        a, m, n = found.mean, 20 * copies, 40 * copies
        assert a == pytest.approx(counted(values, positive))
        beyond = (m - 1) * (a / (2 - a) - a**2) + (n - 1) * (2 * a**2 / (1 + a) - a**2)
        width = 1.96 * np.sqrt((a * (1 - a) + beyond) / (m * n))
        assert (found.low, found.high) == pytest.approx((a - width, a + width), abs=1e-4)
        widths.append(found.high - found.low)
    assert widths[1] == pytest.approx(widths[0] / 2, rel=0.05)
    assert widths[2] == pytest.approx(widths[0] / 4, rel=0.05)


def test_the_interval_covers_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1)
    truth, inside = 0.7602, 0  # P(N(1, 1) > N(0, 1)) = Φ(1/√2)
    for _ in range(400):
        values = np.concatenate([draws.normal(1, 1, 30), draws.normal(0, 1, 60)])
        found = ranking.auc(values, np.arange(90) < 30)
        inside += found.low <= truth <= found.high
    assert 0.92 <= inside / 400 <= 0.98


def test_the_share_found_first_is_that_among_the_largest_values() -> None:
    values = np.arange(40.0)[::-1]
    positive = np.zeros(40, dtype=bool)
    positive[[0, 1, 3, 7, 11, 39]] = True  # of the first 2, 4, 8, 12
    assert ranking.first_found(values, positive) == {
        "0.05": 2 / 6,
        "0.1": 3 / 6,
        "0.2": 4 / 6,
        "0.3": 5 / 6,
    }
    shuffled = np.random.default_rng(0).permutation(40)
    again = ranking.first_found(values[shuffled], positive[shuffled])
    assert again == ranking.first_found(values, positive)


@given(flagged())
def test_the_share_found_grows_from_one_cut_to_the_next(case) -> None:
    values, positive = case
    found = ranking.first_found(values, positive)
    assert list(found) == ["0.05", "0.1", "0.2", "0.3"]
    shares = list(found.values())
    assert shares == sorted(shares)
    assert all(0 <= share <= 1 for share in shares)


@given(st.integers(2, 20), st.integers(1, 4), st.data())
def test_overlaps_are_those_of_sets(rows: int, columns: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, rows))
    ranks = st.permutations(range(rows))
    a, b = (np.array([data.draw(ranks)[:count] for _ in range(columns)]) for _ in range(2))
    found = ranking.overlaps(a, b)
    assert found == pytest.approx([len({*x} & {*y}) / count for x, y in zip(a, b, strict=True)])
    np.testing.assert_array_equal(ranking.overlaps(b, a), found)
    np.testing.assert_array_equal(ranking.overlaps(a, a), np.ones(columns))
