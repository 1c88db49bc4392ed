"""Lists in messages, which end before they are too long to read."""

from __future__ import annotations

from collections.abc import Sequence


def first_few(items: Sequence[object], count: int = 10, *, separator: str = ", ") -> str:
    """`a, b, c and 4 more`: the first `count` of some items, and how many others there are."""
    listed = separator.join(map(str, items[:count]))
    return f"{listed} and {len(items) - count} more" if len(items) > count else listed
