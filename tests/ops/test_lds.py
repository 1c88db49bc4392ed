"""The linear datamodeling score: correlation, interval, noise of the ground truth, choice of λ."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trak_dist.errors import EvaluationError
from trak_dist.ops import lds

steady = settings(derandomize=True, deadline=None, max_examples=60)


def spearman_by_scipy(a: np.ndarray, b: np.ndarray) -> list[float]:
    pairs = zip(a.T, b.T, strict=True)
    return [float(stats.spearmanr(x, y).statistic) for x, y in pairs]


@steady
@given(
    seed=st.integers(0, 2**32 - 1),
    subsets=st.integers(3, 30),
    targets=st.integers(1, 6),
    levels=st.sampled_from([2, 3, 10, 10**9]),
)
def test_spearman_is_scipys_of_each_column_ties_or_not(
    seed: int, subsets: int, targets: int, levels: int
) -> None:
    random = np.random.default_rng(seed)
    a, b = (random.integers(0, levels, (subsets, targets)).astype(float) for _ in range(2))
    for values in (a, b):  # no column is constant
        values[0], values[1] = -1, levels
    np.testing.assert_allclose(lds.spearman(a, b), spearman_by_scipy(a, b), atol=1e-12)


def test_spearman_takes_ranks_alone_and_each_column_by_itself() -> None:
    a = np.random.default_rng(0).normal(size=(9, 4))
    np.testing.assert_allclose(lds.spearman(a, np.exp(3 * a)), 1, atol=1e-15)
    np.testing.assert_allclose(lds.spearman(a, -(a**3)), -1, atol=1e-15)
    b = np.random.default_rng(1).normal(size=(9, 4))
    alone = [lds.spearman(a[:, [t]], b[:, [t]])[0] for t in range(4)]
    np.testing.assert_array_equal(lds.spearman(a, b), alone)


def test_constant_margins_have_no_correlation_and_are_named() -> None:
    a, steadfast = np.random.default_rng(0).normal(size=(2, 5, 4))
    steadfast[:, [1, 3]] = 2.5
    with pytest.raises(EvaluationError) as raised:
        lds.spearman(a, steadfast)
    assert str(raised.value) == (
        "no correlation over 5 subsets for 2 targets, 1 first: margins are the same for every "
        "subset\n"
        "  next:  more subsets"
    )


def test_a_constant_prediction_tells_nothing() -> None:
    steadfast, b = np.random.default_rng(0).normal(size=(2, 5, 4))
    expected = lds.spearman(steadfast, b)
    steadfast[:, [1, 3]] = 2.5
    expected[[1, 3]] = 0
    np.testing.assert_array_equal(lds.spearman(steadfast, b), expected)


def test_the_interval_is_that_of_a_mean_over_targets_and_always_the_same() -> None:
    values = np.random.default_rng(3).normal(0.3, 0.2, 400)
    found = lds.interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05 * half)
    assert lds.interval(values) == found
    assert str(lds.Interval(0.45, 0.27, 0.6304)) == "0.450 [0.270, 0.630]"


@steady
@given(st.lists(st.floats(-1, 1, width=16), min_size=2, max_size=30, unique=True))
def test_the_interval_brackets_the_mean_within_the_range_of_the_targets(values: list) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lds, "RESAMPLES", 499)
        found = lds.interval(np.array(values))
    assert min(values) - 1e-12 <= found.low <= found.mean <= found.high <= max(values) + 1e-12


def test_the_interval_covers_the_mean_of_a_population_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lds, "RESAMPLES", 499)
        found = [lds.interval(random.normal(0.2, 0.3, 50)) for _ in range(200)]
    covered = sum(i.low <= 0.2 <= i.high for i in found)
    assert 175 <= covered <= 198  # of 190; percentile intervals are a little short


def test_equal_targets_have_an_interval_of_no_width() -> None:
    found = [lds.interval(np.full(targets, 0.3333333)) for targets in range(2, 12)]
    assert all(i.low <= i.mean <= i.high for i in found)


def test_one_target_has_no_interval() -> None:
    assert lds.interval(np.array([0.5])) == lds.Interval(0.5, -1.0, 1.0)


def simulated(seeds: int, noise: float, subsets: int = 4000, targets: int = 12) -> tuple:
    random = np.random.default_rng(seeds)
    signal = random.normal(size=(subsets, targets))
    errors = random.normal(size=(subsets, seeds, targets))
    return signal, signal[:, None] + noise * errors


@pytest.mark.parametrize(("seeds", "noise"), [(2, 1.0), (4, 1.5), (10, 2.0), (3, 1.0), (7, 2.0)])
def test_reliability_is_that_of_known_signal_and_noise(seeds: int, noise: float) -> None:
    signal, margins = simulated(seeds, noise)
    found = lds.reliability(margins)
    half = seeds // 2
    of_half, of_all = (1 / (1 + noise**2 / n) for n in (half, seeds))
    # Spearman's correlation of normal variates whose Pearson correlation is r.
    assert found.halves.mean == pytest.approx(6 / math.pi * math.asin(of_half / 2), abs=0.01)
    assert found.of_mean == pytest.approx(of_all, abs=0.02)
    r, ratio = found.halves.mean, seeds / half
    assert found.of_mean == pytest.approx(ratio * r / (1 + (ratio - 1) * r))
    assert found.bound == pytest.approx(math.sqrt(found.of_mean))
    perfect = lds.spearman(signal, margins.mean(axis=1)).mean()
    assert found.bound == pytest.approx(perfect, abs=0.02)


def test_of_an_odd_number_of_seeds_the_last_one_is_left_out_of_the_halves() -> None:
    _, margins = simulated(3, 1.0, subsets=30)
    halves = lds.reliability(margins).halves
    wanted = spearman_by_scipy(margins[:, 0], margins[:, 1])
    assert halves.mean == pytest.approx(np.mean(wanted))
    margins[:, 2] = np.random.default_rng(1).normal(size=margins[:, 2].shape)
    assert lds.reliability(margins).halves == halves


def test_one_seed_tells_nothing_of_reliability() -> None:
    assert lds.reliability(np.random.default_rng(0).normal(size=(9, 1, 4))) is None


def test_halves_that_disagree_bound_nothing_above_0() -> None:
    a = np.random.default_rng(0).normal(size=(9, 1, 4))
    found = lds.reliability(np.concatenate([a, -a], axis=1))
    assert found.halves.mean == pytest.approx(-1)
    assert (found.of_mean, found.bound) == (0, 0)


@pytest.mark.parametrize("targets", [2, 3, 8, 25])
def test_no_target_has_a_say_in_the_choice_it_is_reported_at(targets: int) -> None:
    by_choice = np.random.default_rng(targets).uniform(-1, 1, (5, targets))
    chosen, picks = lds.cross_fitted(by_choice)
    halves = []
    for target in range(targets):  # a lone target's weight moves the choice of the other half
        _, follow = lds.cross_fitted(np.eye(targets)[[target, target]] * [[0], [1]])
        assert sorted(follow) == [0, 1]
        halves.append(follow.index(0))
    assert {halves.count(0), halves.count(1)} == {targets // 2, -(-targets // 2)}
    for half in (0, 1):
        others = [target for target in range(targets) if halves[target] != half]
        assert picks[half] == by_choice[:, others].mean(axis=1).argmax()
    wanted = [by_choice[picks[half], target] for target, half in enumerate(halves)]
    np.testing.assert_array_equal(chosen, wanted)
    for target, half in enumerate(halves):
        for choice in range(5):
            other = by_choice.copy()
            other[choice, target] += 1e6
            now, picks_now = lds.cross_fitted(other)
            assert picks_now[half] == picks[half]
            assert picks_now[1 - half] == choice
            assert now[target] == other[picks[half], target]


def test_the_only_target_is_reported_at_its_own_best_choice() -> None:
    chosen, picks = lds.cross_fitted(np.array([[0.1], [0.7], [0.3]]))
    assert chosen.tolist() == [0.7]
    assert picks == (1, 1)
