"""Series: cells of one kind by their place, without an object for each until it is asked for.

A run has few series and up to millions of cells. What is known of the cells of a series is an
array (`cell_map`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from trak_dist.coordinates import Rows
from trak_dist.hashing import digest_of
from trak_dist.plan import Plan
from trak_dist.plan_inputs import Split

if TYPE_CHECKING:
    from trak_dist.cells.cell import Cell

Cell_co = TypeVar("Cell_co", bound="Cell", covariant=True)


class Series(Sequence[Cell_co]):
    """Cells of one kind, whose receipts lie in one directory. A slice is a series too."""

    @overload
    def __getitem__(self, place: int) -> Cell_co: ...
    @overload
    def __getitem__(self, place: slice) -> Self: ...
    @abstractmethod
    def __getitem__(self, place: int | slice) -> Cell_co | Self: ...

    @abstractmethod
    def ids(self) -> list[str]:
        """The id of each cell."""

    @abstractmethod
    def keys(self, plan: Plan) -> dict[str, str]:
        """The key of each cell, by its id."""


@dataclass(frozen=True)
class Listed(Series[Cell_co]):
    """Any cells."""

    cells: tuple[Cell_co, ...]

    def __len__(self) -> int:
        return len(self.cells)

    @overload
    def __getitem__(self, place: int) -> Cell_co: ...
    @overload
    def __getitem__(self, place: slice) -> Self: ...
    def __getitem__(self, place: int | slice) -> Cell_co | Self:
        if isinstance(place, slice):
            return replace(self, cells=self.cells[place])
        return self.cells[place]

    def ids(self) -> list[str]:
        return [cell.id for cell in self.cells]

    def keys(self, plan: Plan) -> dict[str, str]:
        return {cell.id: cell.key(plan) for cell in self.cells}


@dataclass(frozen=True)
class Blocks(Series[Cell_co]):
    """The cells of a split's blocks: all coordinates but the last, which are rows, are equal.

    So are their dependencies, their identity, and what they have rows of.
    """

    kind: Callable[..., Cell_co]
    coordinates: tuple[Any, ...]
    split: Split
    places: range

    @classmethod
    def of(cls, kind: Callable[..., Cell_co], *coordinates: Any, split: Split) -> Self:
        """Those of all blocks."""
        return cls(kind, coordinates, split, range(split.cells))

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Cell_co: ...
    @overload
    def __getitem__(self, place: slice) -> Self: ...
    def __getitem__(self, place: int | slice) -> Cell_co | Self:
        if isinstance(place, slice):
            return replace(self, places=self.places[place])
        start = self.places[place] * self.split.cell_rows
        rows = Rows(start, min(start + self.split.cell_rows, self.split.rows))
        return self.kind(*self.coordinates, rows)

    @property
    def rows(self) -> int:
        """How many rows they have together."""
        size = self.split.cell_rows
        return min(self.places.stop * size, self.split.rows) - self.places.start * size

    def rows_of(self, chosen: Sequence[bool]) -> int:
        """The rows of some cells: a yes or no for each."""
        each, count = self.split.cell_rows, sum(chosen)
        beyond = len(self) * each - self.rows  # the last cell may have fewer than the others
        return count * each - (beyond if count and chosen[-1] else 0)

    def ids(self) -> list[str]:
        if not self.places:
            return []
        head, _, _ = self[0].id.rpartition("/")
        size, rows = self.split.cell_rows, self.split.rows
        return [f"{head}/{at * size}-{min(at * size + size, rows)}" for at in self.places]

    def keys(self, plan: Plan) -> dict[str, str]:
        identity = self[0].identity(plan) if self.places else ""
        return {name: digest_of(f"{identity}|{name}".encode()) for name in self.ids()}
