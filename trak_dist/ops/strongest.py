"""The largest of many numbers, with their places, from one block after another."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FIRST = 1024


class Strongest:
    """The `count` largest scores of each column seen so far; ties go to the lower row."""

    def __init__(self, columns: int, count: int) -> None:
        self.count = count
        self.scores: NDArray[Any] = np.empty((columns, 0), np.float32)
        self.rows: NDArray[Any] = np.empty((columns, 0), np.int64)

    def add(self, scores: NDArray[Any], rows: NDArray[Any]) -> None:
        """Scores (columns, n), of these rows, that come after those of before."""
        n, first = scores.shape[1], FIRST + 8 * self.count
        if self.scores.shape[1] < self.count and n > 2 * first:  # by which most are left out
            self.add(scores[:, :first], rows[:, :first])
            scores, rows = scores[:, first:], rows[:, first:]
        if self.scores.shape[1] == self.count:
            scores, rows = _above(self.scores[:, -1:], scores, rows)
            if not scores.shape[1]:
                return
        all_scores = np.concatenate([self.scores, scores], axis=1)
        all_rows = np.concatenate([self.rows, rows], axis=1)
        order = strongest(all_scores, self.count)
        self.scores = np.take_along_axis(all_scores, order, axis=1)
        self.rows = np.take_along_axis(all_rows, order, axis=1)


def _above(
    least: NDArray[Any], scores: NDArray[Any], rows: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """What is larger than the `least` (columns, 1) that is kept; columns with less are filled up.

    Of rows that are spread evenly few are, so that nothing else needs to be sorted.
    """
    above = ~(scores <= least)  # also NaN, and beside NaN all
    most = int(above.sum(axis=1).max(initial=0))
    if 4 * most > scores.shape[1]:
        return scores, rows
    column, place = np.nonzero(above)
    first = np.searchsorted(column, np.arange(len(scores)))
    slot = np.arange(len(column)) - first[column]
    few = np.full((len(scores), most), -np.inf, scores.dtype), np.zeros((len(scores), most), int)
    few[0][column, slot] = scores[column, place]
    few[1][column, slot] = rows[column, place]
    return few


def strongest(scores: NDArray[Any], count: int) -> NDArray[np.intp]:
    """The places of the `count` largest of each row, the largest first; ties go to the lower place.

    Parameters
    ----------
    scores : (rows, n)
        NaN is less than any number.
    """
    keys = -scores
    if count >= scores.shape[1] or np.isnan(keys).any():
        return np.argsort(keys, axis=1, kind="stable")[:, :count]
    # All that are stronger than the last one, and of those that tie with it the first ones.
    last = np.partition(keys, count - 1, axis=1)[:, count - 1, None]
    chosen = keys <= last
    several = np.flatnonzero(chosen.sum(axis=1) > count)  # tie for the last place
    tied = keys[several] == last[several]
    room = count - (keys[several] < last[several]).sum(axis=1, keepdims=True)
    chosen[several] &= ~tied | (tied.cumsum(axis=1, dtype=np.int32) <= room)
    places = np.nonzero(chosen)[1].reshape(len(keys), count)
    order = np.argsort(np.take_along_axis(keys, places, axis=1), axis=1, kind="stable")
    return np.take_along_axis(places, order, axis=1)
