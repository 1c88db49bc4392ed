"""What is done of a run, read of its receipts without an object for each cell or receipt.

Which cells count as done is as in `receipts`; what is kept of a receipt besides is how fast its
cell was computed, and what its audit found.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trak_dist.cell_map import CellMap, Kinds
from trak_dist.cells import KINDS, Cell
from trak_dist.plan import Plan
from trak_dist.store import atomic, receipts, record
from trak_dist.store.layout import Layout, receipt_name

SUMS = ("audited_rows", "audited_batches", "slower_batches")
MEASURED = [
    *(("job", "seconds"), ("facts", "rows")),
    *(("facts", name) for name in (*SUMS, "largest_difference")),
]


@dataclass
class Measured:
    """What the done cells of one kind say: seconds, rows per second, what their audits found."""

    seconds: array[float] = field(default_factory=lambda: array("d"))
    rates: array[float] = field(default_factory=lambda: array("d"))
    sums: list[int] = field(default_factory=lambda: [0] * len(SUMS))
    largest_difference: float | None = None

    @property
    def median_seconds(self) -> float | None:
        """Of a cell; None if no receipt says it."""
        return float(np.median(self.seconds)) if self.seconds else None

    def add(self, columns: Iterable[Sequence[Any]]) -> None:
        """Add what some receipts have at each of the paths `MEASURED`."""
        seconds, rows, *audit = map(_numbers, columns)
        timed = [(n, s) for n, s in zip(rows, seconds, strict=True) if s is not None]
        self.seconds.extend([s for _, s in timed])
        self.rates.extend([n / s for n, s in timed if n and n > 0 and s > 0])
        audits = [found for found in zip(*audit, strict=True) if None not in found]
        if audits:
            *sums, differences = zip(*audits, strict=True)
            self.sums = [had + sum(new) for had, new in zip(self.sums, sums, strict=True)]
            self.largest_difference = max(self.largest_difference or 0.0, *differences)


def _numbers(column: Sequence[Any]) -> Sequence[float | None]:
    """The numbers of a column, None for what is none."""
    if {*map(type, column)} <= {int, float, type(None)}:
        return column
    return [value if isinstance(value, int | float) else None for value in column]


@dataclass(frozen=True)
class Progress:
    """The done cells of some kinds, and what they say together."""

    done: CellMap
    measured: Mapping[type[Cell], Measured]

    def rows_per_second(self, kinds: Kinds = KINDS) -> float:
        """Rows per second of one worker, the median of the cells; 0 if no receipt has them.

        A task's first cell also pays for what is imported and drawn once.
        """
        rates = np.concatenate([[], *(found.rates for found in self._of(kinds))])
        return float(np.median(rates)) if len(rates) else 0.0

    def _of(self, kinds: Kinds) -> list[Measured]:
        return [found for kind, found in self.measured.items() if kind in kinds]

    def audit_summary(self, kinds: Kinds = KINDS) -> str:
        """What the audits of some kinds' cells found, in a sentence; empty if there were none."""
        found = self._of(kinds)
        differences = [f.largest_difference for f in found if f.largest_difference is not None]
        if not differences:
            return ""
        rows, batches, slower = map(sum, zip(*(f.sums for f in found), strict=True))
        parts = [
            f"{rows:,} rows and {batches:,} batches computed again by autograd",
            f"largest difference {max(differences):.1e}",
        ]
        parts += [f"{slower:,} batches computed one by one"] if slower else []
        return ", ".join(parts)


def read_progress(layout: Layout, plan: Plan, kinds: Kinds = KINDS) -> Progress:
    """What is done of the cells of some kinds. Each directory is listed, and read, once."""
    done, measured = CellMap(plan), {kind: Measured() for kind in kinds}
    together: dict[Path, list[Any]] = {}
    for series, numbers in done.series(kinds):
        together.setdefault(layout.receipts(plan, series[0]), []).append((series, numbers))
    for directory, inside in together.items():
        keys = [series.keys(plan) for series, _ in inside]
        every = {name: key for some in keys for name, key in some.items()}
        found = _done_in(directory, every, measured[type(inside[0][0][0])])
        for own, (_, numbers) in zip(keys, inside, strict=True):
            numbers[:] = [name in found for name in own]
    return Progress(done, measured)


def _done_in(directory: Path, keys: Mapping[str, str], measured: Measured) -> set[str]:
    """The ids of the done cells in a directory, of those that have some keys."""
    single, said = dict[str, bool](), list[list[Any]]()
    for path in receipts.singles(directory, keys):
        if fields := record.read_fields(path):
            name = fields["cell"]
            single[name] = fields["key"] == keys.get(name)
            if single[name]:
                said.append([fields[part].get(fact) for part, fact in MEASURED])
    if said:
        measured.add(zip(*said, strict=True))
    done = {name for name, fits in single.items() if fits}
    columns = receipts.read_columns(directory) if len(single) < len(keys) else None
    if columns:
        rows = receipts.rows_done(columns, keys, single)
        names, *values = (columns.column(*path) for path in (("cell",), *MEASURED))
        done.update(names[row] for row in rows)
        measured.add([[column[row] for row in rows] for column in values])
    return done


def with_failure(layout: Layout, plan: Plan, kinds: Kinds = KINDS) -> Iterator[Cell]:
    """The cells of some kinds of which there is a record that their last attempt failed."""
    listed: dict[Path, set[str]] = {}
    for series, _ in CellMap(plan).series(kinds):
        directory = layout.failure(plan, series[0]).parent
        if directory not in listed:
            listed[directory] = atomic.names(directory)
        if names := listed[directory]:
            for place, cell_id in enumerate(series.ids()):
                if receipt_name(cell_id) in names:
                    yield series[place]
