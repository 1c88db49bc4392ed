"""The largest of many numbers, with their places, from one block after another."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FIRST = 1024


class Strongest:
    """The `count` largest scores of each column seen so far; ties go to the lower row."""

    def __init__(self, columns: int, count: int) -> None:
        self._count = count
        self.scores: NDArray[Any] = np.empty((columns, 0), np.float32)
        self.rows: NDArray[Any] = np.empty((columns, 0), np.int64)

    def add(self, scores: NDArray[Any], rows: NDArray[Any]) -> None:
        """Scores (columns, n), of these rows, that come after those of before."""
        n, first = scores.shape[1], FIRST + self._count
        if self.scores.shape[1] < self._count and n > first:  # by which most others are left out
            self.add(scores[:, :first], rows[:, :first])
            scores, rows = scores[:, first:], rows[:, first:]
        if self.scores.shape[1] == self._count:  # most can't be among them: others are as strong
            some = ~(scores <= self.scores[:, -1:]).all(axis=0)
            scores, rows = scores[:, some], rows[:, some]
        all_scores = np.concatenate([self.scores, scores], axis=1)
        all_rows = np.concatenate([self.rows, rows], axis=1)
        order = strongest(all_scores, self._count)
        self.scores = np.take_along_axis(all_scores, order, axis=1)
        self.rows = np.take_along_axis(all_rows, order, axis=1)


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
    stronger = keys < last
    tied = keys == last
    room = count - stronger.sum(axis=1, keepdims=True)
    chosen = stronger | (tied & (tied.cumsum(axis=1, dtype=np.int32) <= room))
    places = np.nonzero(chosen)[1].reshape(len(keys), count)
    order = np.argsort(np.take_along_axis(keys, places, axis=1), axis=1, kind="stable")
    return np.take_along_axis(places, order, axis=1)
