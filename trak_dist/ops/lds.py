"""The linear datamodeling score (LDS), its interval, and how far the ground truth can be trusted.

Park et al. 2023, "TRAK: Attributing Model Behavior at Scale", section 2: for subsets S of the train
set, the sum of a target's scores over S predicts the output of a model trained on S; the LDS of a
target is Spearman's correlation, over subsets, between prediction and output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from trak_dist.errors import EvaluationError

Matrix = NDArray[np.float64]
CONFIDENCE = 0.95
RESAMPLES = 1999


@dataclass(frozen=True)
class Interval:
    """A mean over targets, and its bootstrap interval at 95 %."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def spearman(a: Matrix, b: Matrix) -> Matrix:
    """Spearman's ρ between the columns of `a` and `b` (subsets, targets), one for each target.

    A constant prediction, of a target whose scores are all zero, counts as 0.

    Raises
    ------
    EvaluationError
        If a column of `b` is constant, where no correlation exists.
    """
    ranks = [stats.rankdata(values, axis=0) for values in (a, b)]
    centred = [r - r.mean(axis=0) for r in ranks]
    norms = [np.linalg.norm(c, axis=0) for c in centred]
    constant = np.flatnonzero(norms[1] == 0)
    if len(constant):
        raise EvaluationError(
            f"no correlation over {len(a)} subsets for {len(constant)} targets, {constant[0]} "
            "first: margins are the same for every subset",
            next="more subsets",
        )
    norms[0][norms[0] == 0] = 1
    correlation: Matrix = (centred[0] * centred[1]).sum(axis=0) / (norms[0] * norms[1])
    return correlation


def interval(per_target: Matrix, *, minimum: float = -1.0) -> Interval:
    """The mean over targets with its percentile bootstrap interval over targets.

    One target allows no estimate of the spread: the interval is everything possible, from `minimum`
    to 1.
    """
    mean = float(per_target.mean())
    if len(per_target) < 2:
        return Interval(mean, minimum, 1.0)
    found = stats.bootstrap(
        (per_target,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=1000,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    # Rounding may put an end of no width beyond the mean.
    return Interval(mean, min(mean, float(found.low)), max(mean, float(found.high)))


def two_way_interval(values: Matrix) -> Interval:
    """The mean of `values` (targets, seeds), its percentile bootstrap interval over both.

    A seed's models are shared by all targets, so that what is peculiar to them does not average
    out over targets.
    """
    draws = np.random.default_rng(0)
    targets, seeds = values.shape
    rows = draws.integers(targets, size=(RESAMPLES, targets, 1))
    columns = draws.integers(seeds, size=(RESAMPLES, 1, seeds))
    means = values[rows, columns].mean(axis=(1, 2))
    mean = float(values.mean())
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(mean, min(mean, float(low)), max(mean, float(high)))


@dataclass(frozen=True)
class Reliability:
    """How reliable the ground truth is.

    `halves` is the correlation, per target, between the means over either half of the seeds;
    `of_mean` what follows from its mean for the mean over all seeds (Spearman–Brown); `bound` its
    square root: about what the LDS of perfect scores would be.
    """

    halves: Interval
    of_mean: float
    bound: float


def reliability(margins: NDArray[np.float64]) -> Reliability | None:
    """Agreement of halves of the seeds of `margins` (subsets, seeds, targets)."""
    seeds = margins.shape[1]
    if seeds < 2:
        return None
    half = seeds // 2
    # With an odd number one seed is left out, so that the halves have equal size.
    halves = spearman(margins[:, :half].mean(axis=1), margins[:, half : 2 * half].mean(axis=1))
    by_targets = interval(halves)
    ratio = seeds / half
    r = max(0.0, by_targets.mean)
    of_mean = ratio * r / (1 + (ratio - 1) * r)
    return Reliability(by_targets, of_mean, of_mean**0.5)


def cross_fitted(by_choice: Matrix) -> tuple[Matrix, tuple[int, int]]:
    """Per-target LDS, each at the choice that is best for the other half of the targets.

    Parameters
    ----------
    by_choice : (choices, targets)
        Per-target LDS at each choice.

    Returns
    -------
    (targets,) and the two choices
        No target influences the choice that it is reported at.
    """
    targets = by_choice.shape[1]
    first = np.zeros(targets, dtype=bool)
    first[np.random.default_rng(0).permutation(targets)[: targets // 2]] = True
    chosen = np.empty(targets)
    picks = []
    for half in (first, ~first):
        others = by_choice[:, ~half] if (~half).any() else by_choice
        best = int(others.mean(axis=1).argmax())
        chosen[half] = by_choice[best, half]
        picks.append(best)
    return chosen, (picks[0], picks[1])
