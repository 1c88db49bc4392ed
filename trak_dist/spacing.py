"""Which rows to look at, where not all are."""

from __future__ import annotations


def evenly_spaced(size: int, count: int) -> list[int]:
    """`count` of `size` rows in ascending order, the first and the last among them; or all."""
    count = min(count, size)
    return sorted({round(i * (size - 1) / max(1, count - 1)) for i in range(count)})
