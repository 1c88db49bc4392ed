"""What cells are numbered and named by: rows, names of splits and subsets. Pure values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeAlias

from trak_dist.errors import ConfigError

TRAIN = "train"
FULL = "full"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def check_name(name: str, *, what: str) -> str:
    """Return `name` if it is fit to be a path component and a part of a cell id.

    Raises
    ------
    ConfigError
        If it is not.
    """
    if not _NAME.fullmatch(name) or name == "zarr.json":
        raise ConfigError(
            f"{what} {name!r} is not usable as a name",
            next="at most 100 letters, digits, '_', '-' and '.', not beginning with '-' or '.'",
        )
    return name


@dataclass(frozen=True, order=True)
class Rows:
    """The rows `start` to `stop`, the last one excluded."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.start}-{self.stop}"

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def numbers(self) -> range:
        """The rows one by one."""
        return range(self.start, self.stop)

    def of(self, values: Any, held: Rows) -> Any:
        """These of the rows that `values` holds, which are `held`."""
        assert held.start <= self.start
        assert self.stop <= held.stop
        return values[self.start - held.start : self.stop - held.start]


@dataclass(frozen=True)
class HelpfulTo:
    """Train rows are selected by their scores for one target: the most helpful ones."""

    target: int

    def __str__(self) -> str:
        return str(self.target)


@dataclass(frozen=True)
class AtRandom:
    """Train rows are drawn at random."""

    def __str__(self) -> str:
        return "random"


Selection: TypeAlias = HelpfulTo | AtRandom
