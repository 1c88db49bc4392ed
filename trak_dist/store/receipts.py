"""Receipts: the small JSON files that make cells done. Needs no zarr and no torch.

A cell is done when its receipt carries the key that the plan gives it; nothing else counts. A
checkpoint's featurize receipts are consolidated into one columnar file once its Gram is made; a
single receipt, being younger, wins over the columnar file.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from trak_dist.cells import Cell, FeaturizeCell
from trak_dist.config import flatten
from trak_dist.plan import Plan
from trak_dist.store import atomic
from trak_dist.store.layout import Layout

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What one cell did.

    `digests` are those of what it wrote, by array name; `facts` are compared between cells that
    belong together; `job` says who did it, where, when and how fast.
    """

    cell: str
    key: str
    fingerprint: str
    digests: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    job: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The last failed attempt of a cell; `expected` errors need no traceback to be understood."""

    cell: str
    error: str
    traceback: str
    expected: bool
    job: Mapping[str, Any] = field(default_factory=dict)


class Receipts:
    """The receipts of one run."""

    def __init__(self, layout: Layout, plan: Plan) -> None:
        self._layout = layout
        self._plan = plan

    def publish(self, cell: Cell, receipt: Receipt) -> None:
        """Make `cell` done. The last thing a cell does."""
        atomic.write(self._layout.receipt(self._plan, cell), _dump(receipt))
        self._layout.failure(cell).unlink(missing_ok=True)

    def revoke(self, cell: Cell, *, why: str) -> None:
        """Make `cell` missing again, by a receipt whose key fits no plan."""
        receipt = Receipt(cell=cell.id, key="", fingerprint="", job={"revoked": why})
        atomic.write(self._layout.receipt(self._plan, cell), _dump(receipt))

    def fail(self, cell: Cell, failure: Failure) -> None:
        """Record why the cell's last attempt failed."""
        atomic.write(self._layout.failure(cell), _dump(failure))

    def done(self, cells: Iterable[Cell]) -> dict[Cell, Receipt]:
        """The receipts of those of `cells` that are done. Each directory is read once."""
        cells = list(cells)
        found: dict[str, Receipt] = {}
        for directory in {self._layout.receipts(self._plan, c) for c in cells}:
            found.update(_read_directory(directory))
        receipts = ((cell, found.get(cell.id)) for cell in cells)
        return {c: r for c, r in receipts if r is not None and r.key == self._plan.key(c)}

    def is_done(self, cell: Cell) -> bool:
        """Whether one cell is done."""
        single = _read(self._layout.receipt(self._plan, cell), Receipt)
        if single is not None:
            return single.key == self._plan.key(cell)
        return isinstance(cell, FeaturizeCell) and cell in self.done([cell])

    def failures(self, cells: Iterable[Cell]) -> dict[Cell, Failure]:
        """The failures of those of `cells` whose last attempt failed."""
        by_name = {self._layout.failure(c).name: c for c in cells}
        directory = self._layout.run_dir / "receipts" / "failed"
        found = {}
        for path in sorted(directory.glob("*.json")) if by_name else ():
            if path.name in by_name and (failure := _read(path, Failure)) is not None:
                found[by_name[path.name]] = failure
        return found

    def consolidate(self, model_id: int) -> None:
        """Gather a checkpoint's featurize receipts into one columnar file.

        The single receipts go only once the columnar file is on disk, so that a reader that lists
        singles first and reads the columns after them misses none.
        """
        splits = (self._plan.train, *self._plan.targets)
        cells = [c for s in splits for c in self._plan.featurize_cells(model_id, s.name)]
        receipts = self.done(cells)
        path = self._layout.consolidated(self._plan, cells[0])
        rows = [_flat(r) for r in (*_read_columns(path), *receipts.values())]
        by_cell = {row["cell"]: row for row in rows}
        names = sorted({name for row in rows for name in row})
        columns = {
            n: np.array([json.dumps(row.get(n)) for row in by_cell.values()], dtype=bytes)
            for n in names
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **columns)  # type: ignore[arg-type]
        atomic.write(path, buffer.getvalue())
        for cell, receipt in receipts.items():
            single = self._layout.receipt(self._plan, cell)
            if _read(single, Receipt) == receipt:
                single.unlink(missing_ok=True)


def _dump(value: Receipt | Failure) -> bytes:
    return json.dumps(asdict(value), indent=1).encode()


Kind = TypeVar("Kind", Receipt, Failure)


def _read(path: Path, kind: type[Kind]) -> Kind | None:
    """What is at `path`; None if there is nothing, or nothing whole."""
    try:
        value = kind(**json.loads(path.read_bytes()))
        if not isinstance(value.cell, str) or not isinstance(value.job, dict):
            raise TypeError("not what a receipt holds")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        # Ours appear whole, so this is damage to the file: its cell counts as missing and is rerun.
        log.warning("unreadable, counted as missing: %s (%s)", path, error)
        return None
    return value


def _read_directory(directory: Path) -> dict[str, Receipt]:
    singles = [_read(path, Receipt) for path in directory.glob("*.json")]
    found = {r.cell: r for r in _read_columns(directory / "consolidated.npz")}
    return found | {r.cell: r for r in singles if r is not None}


def _flat(receipt: Receipt) -> dict[str, Any]:
    return flatten(asdict(receipt))


def _read_columns(path: Path) -> list[Receipt]:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            columns = {name: file[name].tolist() for name in file.files}
        return [
            _unflat(dict(zip(columns, row, strict=True)))
            for row in zip(*columns.values(), strict=True)
        ]
    except FileNotFoundError:
        return []
    except Exception as error:  # zip, npy and JSON have their own ways to fail on damage
        log.warning("unreadable, its cells counted as missing: %s (%s)", path, error)
        return []


def _unflat(row: Mapping[str, bytes]) -> Receipt:
    fields: dict[str, Any] = {"digests": {}, "facts": {}, "job": {}}
    for name, text in row.items():
        value = json.loads(text)
        section, _, key = name.partition(".")
        if not key:
            fields[section] = value
        elif value is not None:
            fields[section][key] = value
    return Receipt(**fields)
