"""Settings of the problems for files, as a command line or a call gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from trak_dist.coordinates import TRAIN
from trak_dist.errors import ConfigError

T = TypeVar("T", str, int, float)


def files_of(train: str, targets: Mapping[str, str | None]) -> dict[str, tuple[str, str]]:
    """By split, the train rows first: a file, and the setting that names it; none that are null.

    Raises
    ------
    ConfigError
        If they are no mapping, or one is called as the train set.
    """
    if not isinstance(targets, Mapping):
        raise ConfigError(
            f"target sets have names, and {targets!r} has none",
            where="problem.targets",
            next=f"problem.targets.val={targets}",
        )
    if TRAIN in targets:
        raise ConfigError(
            f"a target set can't be called {TRAIN!r}: the name is taken",
            where=f"problem.targets.{TRAIN}",
            next="give it another name; self_influence=true scores the train rows themselves",
        )
    named = {name: (file, f"problem.targets.{name}") for name, file in targets.items() if file}
    return {TRAIN: (train, f"problem.{TRAIN}"), **named}


def several(value: Sequence[T] | T | None) -> list[T]:
    """A list of what is given; one text or number is a list of one."""
    if value is None:
        return []
    return [value] if isinstance(value, str | int | float) else list(value)
