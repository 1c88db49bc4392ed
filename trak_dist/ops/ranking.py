"""How well a ranking finds what it should: AUC, the share found by looking at so many, overlaps."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from trak_dist.ops.lds import Interval

SHARES = (0.05, 0.1, 0.2, 0.3)


def auc(values: NDArray[Any], positive: NDArray[np.bool_]) -> Interval:
    """P(a positive one's value is above a negative one's), ties half, with its interval at 95 %.

    The area under the ROC curve, by its relation to the rank sum (Mann & Whitney); the interval
    is Hanley & McNeil's (1982, equation 1), on the normal approximation.

    Parameters
    ----------
    values : (n,)
        What is ranked by, the largest first.
    positive : (n,) bool
        What should be found: some, not all.
    """
    m, n = int(positive.sum()), int((~positive).sum())
    assert m and n
    ranks = stats.rankdata(values)
    area = (float(ranks[positive].sum()) - m * (m + 1) / 2) / (m * n)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (m - 1) * (q1 - area**2) + (n - 1) * (q2 - area**2)
    width = 1.959964 * float(np.sqrt(max(0.0, variance) / (m * n)))
    return Interval(area, max(0.0, area - width), min(1.0, area + width))


def first_found(values: NDArray[Any], positive: NDArray[np.bool_]) -> dict[str, float]:
    """The share of the positive ones among the first 5, 10, 20, 30 % with the largest values."""
    order = np.argsort(-values, kind="stable")
    cut = {share: order[: max(1, round(share * len(order)))] for share in SHARES}
    total = positive.sum()
    return {f"{share:g}": float(positive[rows].sum() / total) for share, rows in cut.items()}


def overlaps(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """The share of the rows of a column's top that `a` and `b` have in common (columns,).

    Parameters
    ----------
    a, b : (columns, count)
        The rows of the tops of two rankings.
    """
    shared = [len(np.intersect1d(x, y)) for x, y in zip(a, b, strict=True)]
    found: NDArray[np.float64] = np.array(shared) / a.shape[1]
    return found
