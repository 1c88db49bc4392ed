"""What one field may hold: values of its type, never converted, within the limits of its metadata.

The limits: `choices`, `min` (and finite), `below`, `not_empty` of a list, `one_line` of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args
from unicodedata import category


class Misfit(Exception):
    """A value is not what its field holds; the text says why."""


def scalar(raw: Any, kind: Any) -> Any:
    """`raw` if it is of `kind`: bool, int, float or str. An integer counts as a float too."""
    fits = isinstance(raw, (int, float) if kind is float else kind)
    if not fits or (isinstance(raw, bool) and kind is not bool):
        raise Misfit(f"{raw!r} is not of type {kind.__name__}")
    if isinstance(raw, int) and not -(2**64) < raw < 2**64:
        raise Misfit(f"a number of {len(str(abs(raw)))} digits is too large")
    return kind(raw)


def mapping(raw: Any, _: Any) -> dict[str, Any]:
    """A copy of `raw` if it is a mapping."""
    if not isinstance(raw, Mapping):
        raise Misfit(f"{raw!r} is not a mapping")
    return dict(raw)


def names_or_numbers(raw: Any, hint: Any) -> tuple[Any, ...]:
    """The items of a list of names or integers; a single one counts as a list."""
    several = tuple(raw) if is_list(raw) else (raw,)
    if not all(type(one) is get_args(hint)[0] for one in several):
        raise Misfit(f"{raw!r} is not {_list_of(hint)}")
    return several


def is_list(raw: Any) -> bool:
    """Whether `raw` is a list or, as in Python's own values, a tuple."""
    return isinstance(raw, list | tuple)


def check_limits(raw: Any, hint: Any, limits: Mapping[str, Any]) -> None:
    """Raise `Misfit` for a `raw`, of the right type, that is beyond a limit."""
    if "choices" in limits and raw not in limits["choices"]:
        raise Misfit(f"{raw!r} is not one of {', '.join(limits['choices'])}")
    if "min" in limits and not limits["min"] <= raw < float("inf"):
        raise Misfit(f"{raw!r} is not a finite number of at least {limits['min']}")
    if "below" in limits and not raw < limits["below"]:
        raise Misfit(f"{raw!r} is too large")
    if "not_empty" in limits and raw in ([], ()):
        raise Misfit(f"{raw!r} is not {_list_of(hint)}")
    if "one_line" in limits:
        texts = [raw] if isinstance(raw, str) else [f"{k}{v}" for k, v in raw.items()]
        for control in filter(None, map(control_character, texts)):
            raise Misfit(f"the control character {control!r} would begin another line")


def control_character(text: str) -> str:
    """The first character of `text` that could end a line or is not valid; empty if there is none.

    The latter are bytes of a command line that are not UTF-8.
    """
    return next((c for c in text if category(c) in ("Cc", "Cs", "Zl", "Zp")), "")


def _list_of(hint: Any) -> str:
    what = "name" if get_args(hint)[0] is str else "number"
    return f"a {what} or a list of {what}s"
