"""A number for each cell of a plan, in arrays: what is done, in which state, by which task made.

Pure: no torch, no I/O.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from trak_dist.cells import KINDS, Cell
from trak_dist.cells.series import Blocks, Series
from trak_dist.plan import Plan, cached_on_plan

Kinds = Collection[type[Cell]]


@dataclass(frozen=True)
class _Index:
    """All series of a plan, and the place of each cell."""

    series: tuple[Series[Cell], ...]
    blocks: dict[Hashable, int]
    listed: dict[Cell, tuple[int, int]]

    def find(self, cell: Cell) -> tuple[int, int] | None:
        """The number of the cell's series, and its place there; None of a cell of another plan."""
        if cell.shard is None:
            return self.listed.get(cell)
        group, rows = cell.shard
        number = self.blocks.get((type(cell), group))
        if number is None:
            return None
        series = self.series[number]
        assert isinstance(series, Blocks)
        place = rows.start // series.split.cell_rows
        return (number, place) if place < len(series) and series[place] == cell else None


@cached_on_plan
def _index(plan: Plan) -> _Index:
    series = tuple(s for kind in KINDS for s in kind.series(plan) if len(s))
    blocks, listed = dict[Hashable, int](), dict[Cell, tuple[int, int]]()
    for number, one in enumerate(series):
        if isinstance(one, Blocks):
            blocks[_group(one)] = number
        else:
            listed |= {cell: (number, place) for place, cell in enumerate(one)}
    return _Index(series, blocks, listed)


def _group(series: Blocks[Cell]) -> Hashable:
    shard = series[0].shard
    assert shard
    return type(series[0]), shard[0]


class CellMap(Collection[Cell]):
    """A number for each cell of `plan`, at first `fill`.

    As a collection it holds the cells whose number is not 0. A cell of another plan has 0, and none
    can be set.
    """

    def __init__(self, plan: Plan, *, fill: int = 0, dtype: Any = np.uint8) -> None:
        self._index = _index(plan)
        self.arrays = [np.full(len(s), fill, dtype) for s in self._index.series]

    @classmethod
    def of(cls, plan: Plan, *cells: Iterable[Cell]) -> Self:
        """The map with 1 for some cells."""
        made = cls(plan)
        for some in cells:
            made.mark(some, 1)
        return made

    def mark(self, cells: Iterable[Cell], number: int) -> None:
        """Set the number of some cells; for those of another map: which it holds."""
        if isinstance(cells, CellMap):
            for own, other in zip(self.arrays, cells.arrays, strict=True):
                own[other != 0] = number
        elif isinstance(cells, Blocks):
            self.view(cells)[:] = number
        else:
            for cell in cells:
                if found := self._index.find(cell):
                    self.arrays[found[0]][found[1]] = number

    def view(self, series: Blocks[Cell]) -> NDArray[Any]:
        """The numbers of a series' cells, to be changed in place."""
        places = slice(series.places.start, series.places.stop)
        return self.arrays[self._index.blocks[_group(series)]][places]

    def series(self, kinds: Kinds = KINDS) -> Iterator[tuple[Series[Cell], NDArray[Any]]]:
        """The series of some kinds, in order, with the numbers of their cells."""
        for series, numbers in zip(self._index.series, self.arrays, strict=True):
            if type(series[0]) in kinds:
                yield series, numbers

    def where(self, *numbers: int, kinds: Kinds = KINDS) -> Chosen:
        """The cells of some kinds that have one of some numbers."""
        return Chosen(self, frozenset(numbers), kinds)

    def __getitem__(self, cell: Cell) -> int:
        found = self._index.find(cell)
        return int(self.arrays[found[0]][found[1]]) if found else 0

    def __contains__(self, cell: object) -> bool:
        return isinstance(cell, Cell) and bool(self[cell])

    def __len__(self) -> int:
        return sum(map(np.count_nonzero, self.arrays))

    def __iter__(self) -> Iterator[Cell]:
        for series, numbers in self.series():
            yield from (series[int(place)] for place in np.flatnonzero(numbers))


@dataclass(frozen=True)
class Chosen(Collection[Cell]):
    """Cells that have one of some numbers in a map; made one by one when they are asked for."""

    map: CellMap
    numbers: frozenset[int]
    kinds: Kinds

    def masks(self) -> Iterator[tuple[Series[Cell], NDArray[np.bool_]]]:
        """Each series, and which of its cells are among them."""
        for series, numbers in self.map.series(self.kinds):
            yield series, np.isin(numbers, list(self.numbers))

    @property
    def rows(self) -> int:
        """The rows of a split that they have together."""
        return sum(s.rows_of(mask.tolist()) for s, mask in self.masks() if isinstance(s, Blocks))

    def __contains__(self, cell: object) -> bool:
        return (
            type(cell) in self.kinds and isinstance(cell, Cell) and self.map[cell] in self.numbers
        )

    def __len__(self) -> int:
        return sum(int(np.count_nonzero(mask)) for _, mask in self.masks())

    def __iter__(self) -> Iterator[Cell]:
        for series, mask in self.masks():
            yield from (series[int(place)] for place in np.flatnonzero(mask))


def others_by_checkpoint(plan: Plan) -> Iterator[CellMap]:
    """For each checkpoint all cells but its own, then all but those that are of no single one."""
    numbers = CellMap(plan, dtype=np.int64)
    for series, own in numbers.series():
        cells = series[:1] if isinstance(series, Blocks) else series
        own[:] = [_number(cell, plan) for cell in cells]
    for number in sorted({*np.concatenate(numbers.arrays).tolist()}, key=lambda n: (n == 0, n)):
        others = CellMap(plan)
        others.arrays = [(own != number).astype(np.uint8) for own in numbers.arrays]
        yield others


def _number(cell: Cell, plan: Plan) -> int:
    checkpoint = cell.checkpoint(plan)
    return 0 if checkpoint is None else 1 + checkpoint


class Owners(CellMap):
    """Which task makes a cell, by the task's name."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, dtype=np.uint32)
        self._names = [""]

    def take(self, task: Iterable[Cell], name: str) -> None:
        """Let the task of that name make some cells."""
        if self._names[-1] != name:
            self._names.append(name)
        self.mark(task, len(self._names) - 1)

    def drop(self, kinds: Kinds) -> None:
        """Let no task make the cells of some kinds."""
        for _, numbers in self.series(kinds):
            numbers[:] = 0

    def name(self, cell: Cell) -> str:
        """The task that makes a cell; empty if none does."""
        return self._names[self[cell]]

    def names(self, numbers: NDArray[Any]) -> set[str]:
        """The tasks that have some numbers."""
        return {self._names[number] for number in np.unique(numbers) if number}

    def copy(self) -> Owners:
        """Another, that may change by itself."""
        copied = object.__new__(Owners)
        copied._index, copied._names = self._index, [*self._names]
        copied.arrays = [numbers.copy() for numbers in self.arrays]
        return copied
