"""Receipts: the small JSON files that make cells done. Needs no zarr and no torch.

A cell is done when its receipt carries the key that the plan gives it; nothing else counts. A
checkpoint's featurize receipts are consolidated into one file of columns once its Gram is made; a
single receipt, being younger, wins over that file.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from trak_dist import decoding
from trak_dist.cells import Cell, FeaturizeCell
from trak_dist.errors import StoreError
from trak_dist.plan import Plan, digest
from trak_dist.store import atomic, columns, record
from trak_dist.store.columns import Columns
from trak_dist.store.layout import CONSOLIDATED, Layout, receipt_name
from trak_dist.store.record import Failure, Receipt

Found = TypeVar("Found")
log = logging.getLogger(__name__)


class Receipts:
    """The receipts of one run."""

    def __init__(self, layout: Layout, plan: Plan) -> None:
        self._layout = layout
        self._plan = plan

    def publish(self, cell: Cell, receipt: Receipt) -> None:
        """Make `cell` done. The last thing a cell does."""
        atomic.write(self._layout.receipt(self._plan, cell), record.dump(receipt))
        self.clear_failure(cell)

    def revoke(self, cell: Cell, *, why: str) -> None:
        """Make `cell` missing again, by a receipt whose key fits no plan."""
        receipt = Receipt(cell=cell.id, key="", fingerprint="", job={"revoked": why})
        atomic.write(self._layout.receipt(self._plan, cell), record.dump(receipt))
        if self.stale([cell]):
            self.clear_failure(cell)

    def mark_stale(self, cell: Cell, why: str) -> None:
        """Mark a done cell whose inputs have changed since."""
        key = cell.key(self._plan)
        note = Failure(cell=cell.id, key=key, error=why, traceback="", expected=True, doubted=True)
        self.fail(cell, note)

    def stale(self, cells: Iterable[Cell]) -> dict[Cell, str]:
        """The done `cells` that are marked as stale, and why."""
        return {c: f.error for c, f in self.failures(cells).items() if f.doubted}

    def clear_failure(self, cell: Cell) -> None:
        """Remove the record of a failure, or of stale inputs."""
        failure = self._layout.failure(self._plan, cell)
        with atomic.write_errors(failure):
            failure.unlink(missing_ok=True)

    def fail(self, cell: Cell, failure: Failure) -> None:
        """Record why the cell's last attempt failed."""
        atomic.write(self._layout.failure(self._plan, cell), record.dump(failure))

    def record_audit_failure(self, model_id: int, *, why: str) -> None:
        """Record that an audit failed: gradients of the checkpoint are computed one by one."""
        path = self._layout.audit_failure(model_id)
        atomic.write_once(path, json.dumps({"why": why}).encode())

    def audit_failure(self, model_id: int) -> str:
        """Why a checkpoint's gradients are computed one by one, if an audit of it failed."""
        try:
            record = decoding.mapping(atomic.read(self._layout.audit_failure(model_id)))
        except FileNotFoundError:
            return ""
        except ValueError:
            record = {}
        return str(record.get("why", "an audit failed"))

    def failed_audits(self) -> set[int]:
        """The checkpoints of which an audit failed."""
        return {m for m in self._plan.all_model_ids if self.audit_failure(m)}

    def done(self, cells: Iterable[Cell]) -> dict[Cell, Receipt]:
        """The receipts of those of `cells` that are done. Each directory is listed once."""
        cells = list(cells)
        by_directory: dict[Path, list[Cell]] = {}
        for cell in cells:
            by_directory.setdefault(self._layout.receipts(self._plan, cell), []).append(cell)
        found: dict[Cell, Receipt] = {}
        for directory, inside in by_directory.items():
            found.update(self._done_in(directory, inside))
        return {cell: found[cell] for cell in cells if cell in found}

    def _done_in(self, directory: Path, cells: Iterable[Cell]) -> Iterator[tuple[Cell, Receipt]]:
        by_id = {cell.id: cell for cell in cells}
        keys = {name: cell.key(self._plan) for name, cell in by_id.items()}
        read = (record.read(path, Receipt) for path in singles(directory, keys))
        single = {receipt.cell: receipt for receipt in read if receipt is not None}
        for name, cell in by_id.items():
            receipt = single.get(name)
            if receipt and receipt.key == keys[name]:
                yield cell, receipt
        in_columns = read_columns(directory) if len(single) < len(keys) else None
        if in_columns:
            for found in in_columns.records(rows_done(in_columns, keys, single)):
                yield by_id[found["cell"]], Receipt(**found)

    def failure(self, cell: Cell) -> Failure | None:
        """Why the last attempt at `cell` failed, if it did."""
        found = record.read(self._layout.failure(self._plan, cell), Failure)
        return found if found is not None and found.key == cell.key(self._plan) else None

    def failures(self, cells: Iterable[Cell]) -> dict[Cell, Failure]:
        """The failures of those of `cells` whose last attempt failed."""
        by_path = {self._layout.failure(self._plan, c): c for c in cells}
        existing = {d / n for d in {p.parent for p in by_path} for n in atomic.names(d)}
        found = {c: self.failure(c) for path, c in by_path.items() if path in existing}
        return {c: f for c, f in found.items() if f is not None}

    def consolidate(self, model_id: int) -> None:
        """Gather a checkpoint's featurize receipts into one file of columns.

        The single receipts go only once that file is on disk, so that a reader that lists singles
        first and reads the columns afterwards misses none. The identity of a split's cells is noted
        if all of them are done: their keys follow from it.
        """
        plan = self._plan
        by_split = [list(FeaturizeCell.of_split(plan, model_id, s.name)) for s in plan.splits]
        receipts = self.done(cell for cells in by_split for cell in cells)
        inputs = {
            cells[0].identity(plan): digest([receipts[c].facts.get("inputs_digest") for c in cells])
            for cells in by_split
            if receipts.keys() >= set(cells)
        }
        path = self._layout.consolidated(plan, by_split[0][0])
        there = read_columns(path.parent)
        before = there.records(range(len(there))) if there else ()
        by_cell = {r["cell"]: r for r in (*before, *map(vars, receipts.values()))}
        atomic.write(path, columns.dump(list(by_cell.values()), notes=inputs))
        for cell, receipt in receipts.items():
            single = self._layout.receipt(self._plan, cell)
            if record.read(single, Receipt) == receipt:
                with atomic.write_errors(single):
                    single.unlink(missing_ok=True)

    def inputs_digest(self, model_id: int, split: str) -> str | None:
        """The digest of all that a checkpoint's cells of a split were shown, if all are done.

        Read of the file of columns alone, however many cells there are; None if that does not say
        so, or a cell has a single receipt besides, which is younger.
        """
        cells = FeaturizeCell.of_split(self._plan, model_id, split)
        first = next(cells)
        path, own = (
            f(self._plan, first) for f in (self._layout.consolidated, self._layout.receipt)
        )
        prefix = own.name.removesuffix(f"{first.rows}{own.suffix}")
        if any(name.startswith(prefix) for name in atomic.names(own.parent)):
            return None
        notes = _whole(path, lambda: atomic.read_some(path, _notes_of)) or {}
        inputs = notes.get(first.identity(self._plan))
        return inputs if isinstance(inputs, str) else None


def singles(directory: Path, cell_ids: Collection[str]) -> list[Path]:
    """The single receipts of some cells in their directory, which is listed once."""
    listed = atomic.names(directory)
    own = {name for name in map(receipt_name, cell_ids) if name in listed} if listed else ()
    return [directory / name for name in sorted(own)]


def read_columns(directory: Path) -> Columns | None:
    """The consolidated receipts in a directory, if there are any, and they are whole."""
    path = directory / CONSOLIDATED
    return _whole(path, lambda: _columns_of(io.BytesIO(atomic.read(path))))


def rows_done(columns: Columns, keys: Mapping[str, str], single: Collection[str]) -> list[int]:
    """The rows of the cells that are done by the columns: those without a single receipt."""
    cells = zip(columns.column("cell"), columns.column("key"), strict=True)
    return [
        row for row, (cell, key) in enumerate(cells) if keys.get(cell) == key and cell not in single
    ]


def _columns_of(content: BinaryIO) -> Columns:
    with np.load(content, allow_pickle=False) as file:
        if "receipt" not in file:
            return Columns(file)
        # of earlier versions: a column of JSON texts
        receipts = [vars(record.parsed(text, Receipt)) for text in file["receipt"].tolist()]
    return _columns_of(io.BytesIO(columns.dump(receipts, notes={})))


def _notes_of(content: BinaryIO) -> dict[str, Any]:
    with np.load(content, allow_pickle=False) as file:
        return columns.read_notes(file)


def _whole(path: Path, read: Callable[[], Found]) -> Found | None:
    """What is read of a file of columns; None if there is none, or none that is whole."""
    try:
        return read()
    except FileNotFoundError:
        return None
    except StoreError:
        raise
    except Exception as error:  # zip, npy and JSON have their own ways to fail on damage
        log.warning("unreadable, its cells counted as missing: %s (%s)", path, error)
        return None
