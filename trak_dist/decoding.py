"""JSON of a file that may be damaged or untrusted: a mapping, or a `ValueError` that says why."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 100  # more would overflow the stack of those that walk through it


def mapping(text: bytes | str) -> dict[str, Any]:
    """The mapping that `text` is.

    Raises
    ------
    ValueError
        If it is none, or nested too deeply.
    """
    try:
        found = json.loads(text)
        if _is_deeper_than(found, MAX_DEPTH):
            raise RecursionError
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it is no mapping")  # noqa: TRY004 -- of what is in a file
    return found


def _is_deeper_than(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_deeper_than(v, depth - 1) for v in inner)
