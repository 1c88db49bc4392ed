"""Receipts: the small JSON files that make cells done. Needs no zarr and no torch.

A cell is done when its receipt carries the key that the plan gives it; nothing else counts. A
checkpoint's featurize receipts are consolidated into one columnar file once its Gram is made; a
single receipt, being younger, wins over the columnar file.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np

from trak_dist import decoding
from trak_dist.cells import Cell, FeaturizeCell
from trak_dist.configuration.structuring import structure, unstructure
from trak_dist.errors import CorruptChunk, StoreError
from trak_dist.plan import Plan, digest
from trak_dist.store import atomic
from trak_dist.store.layout import Layout

Fact = TypeVar("Fact")
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

    def fact(self, name: str, kind: type[Fact] | tuple[type[Fact], ...]) -> Fact:
        """One of the facts.

        Raises
        ------
        CorruptChunk
            If it is not there, or not of that kind.
        """
        found = self.facts.get(name)
        if not isinstance(found, kind):
            raise CorruptChunk(
                f"the receipt's {name} is {found!r}",
                where=self.cell,
                next="remove the cell's receipt, then the same command again",
            )
        return found


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The last failed attempt of a cell; `expected` errors need no traceback to be understood.

    `error_class` is the name of the error's class; empty in records of earlier versions. `doubted`
    ones are not attempts: the cell is done, but its inputs have changed since.
    """

    cell: str
    key: str
    error: str
    traceback: str
    expected: bool
    job: Mapping[str, Any] = field(default_factory=dict)
    doubted: bool = False
    error_class: str = ""


class Receipts:
    """The receipts of one run."""

    def __init__(self, layout: Layout, plan: Plan) -> None:
        self._layout = layout
        self._plan = plan

    def publish(self, cell: Cell, receipt: Receipt) -> None:
        """Make `cell` done. The last thing a cell does."""
        atomic.write(self._layout.receipt(self._plan, cell), _dump(receipt))
        self.clear_failure(cell)

    def revoke(self, cell: Cell, *, why: str) -> None:
        """Make `cell` missing again, by a receipt whose key fits no plan."""
        receipt = Receipt(cell=cell.id, key="", fingerprint="", job={"revoked": why})
        atomic.write(self._layout.receipt(self._plan, cell), _dump(receipt))
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
        atomic.write(self._layout.failure(self._plan, cell), _dump(failure))

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
        names_by_directory: dict[Path, set[str]] = {}
        for cell in cells:
            path = self._layout.receipt(self._plan, cell)
            names_by_directory.setdefault(path.parent, set()).add(path.name)
        found: dict[str, Receipt] = {}
        for directory, names in names_by_directory.items():
            found.update(_read_directory(directory, names))
        receipts = ((cell, found.get(cell.id)) for cell in cells)
        return {c: r for c, r in receipts if r is not None and r.key == c.key(self._plan)}

    def failure(self, cell: Cell) -> Failure | None:
        """Why the last attempt at `cell` failed, if it did."""
        found = _read(self._layout.failure(self._plan, cell), Failure)
        return found if found is not None and found.key == cell.key(self._plan) else None

    def failures(self, cells: Iterable[Cell]) -> dict[Cell, Failure]:
        """The failures of those of `cells` whose last attempt failed."""
        by_path = {self._layout.failure(self._plan, c): c for c in cells}
        existing = {d / n for d in {p.parent for p in by_path} for n in atomic.names(d)}
        found = {c: self.failure(c) for path, c in by_path.items() if path in existing}
        return {c: f for c, f in found.items() if f is not None}

    def consolidate(self, model_id: int) -> None:
        """Gather a checkpoint's featurize receipts into one columnar file.

        The single receipts go only once the columnar file is on disk, so that a reader that lists
        singles first and reads the columns afterwards misses none.
        """
        splits = (self._plan.train, *self._plan.targets)
        cells = [c for s in splits for c in FeaturizeCell.of_split(self._plan, model_id, s.name)]
        receipts = self.done(cells)
        path = self._layout.consolidated(self._plan, cells[0])
        by_cell = {r.cell: r for r in (*_read_columns(path), *receipts.values())}
        columns = {
            "cell": [cell.encode() for cell in by_cell],
            "key": [r.key.encode() for r in by_cell.values()],
            "receipt": [_dump(r) for r in by_cell.values()],
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{n: np.array(c, dtype=bytes) for n, c in columns.items()})  # type: ignore[arg-type]
        atomic.write(path, buffer.getvalue())
        for cell, receipt in receipts.items():
            single = self._layout.receipt(self._plan, cell)
            if _read(single, Receipt) == receipt:
                with atomic.write_errors(single):
                    single.unlink(missing_ok=True)


def rows_per_second(receipts: Iterable[Receipt]) -> float:
    """Rows per second of one worker, the median of the cells; 0 if no receipt has them.

    A task's first cell also pays for what is imported and drawn once.
    """
    measured = ((r.facts.get("rows"), r.job.get("seconds")) for r in receipts)
    rates = [
        rows / seconds
        for rows, seconds in measured
        if isinstance(rows, int) and isinstance(seconds, int | float) and rows > 0 and seconds > 0
    ]
    return float(median(rates or [0.0]))


def audit_summary(receipts: Iterable[Receipt]) -> str:
    """What the audits of featurize cells found, in a sentence; empty if there were none."""
    facts = [r.facts for r in receipts if "audited_rows" in r.facts]
    if not facts:
        return ""
    rows, batches, slower = (
        sum(f[name] for f in facts)
        for name in ("audited_rows", "audited_batches", "slower_batches")
    )
    parts = [
        f"{rows:,} rows and {batches:,} batches computed again by autograd",
        f"largest difference {max(f['largest_difference'] for f in facts):.1e}",
    ]
    parts += [f"{slower:,} batches computed one by one"] if slower else []
    return ", ".join(parts)


def _dump(value: Receipt | Failure) -> bytes:
    content = json.loads(json.dumps(unstructure(value)))
    return json.dumps({**content, "digest": digest(content)}).encode()


Kind = TypeVar("Kind", Receipt, Failure)


def _read(path: Path, kind: type[Kind]) -> Kind | None:
    """What is at `path`; None if there is nothing, or nothing whole."""
    try:
        return _parsed(atomic.read(path), kind)
    except FileNotFoundError:
        return None
    except ValueError as error:
        # Receipts are published atomically, so the file is damaged: its cell counts as missing and
        # runs again.
        log.warning("unreadable, counted as missing: %s (%s)", path, " ".join(str(error).split()))
        return None


def _parsed(text: bytes, kind: type[Kind]) -> Kind:
    """A receipt of an earlier version has no digest: only its form is checked."""
    raw = decoding.mapping(text)
    recorded = raw.pop("digest", None)
    if recorded not in (None, digest(raw)):
        raise ValueError("its content is not what was written")
    return structure(kind, raw, "it is no record of a cell:")


def _read_directory(directory: Path, names: Container[str]) -> dict[str, Receipt]:
    existing = sorted(name for name in atomic.names(directory) if name in names)
    singles = [_read(directory / name, Receipt) for name in existing]
    found = {r.cell: r for r in _read_columns(directory / "consolidated.npz")}
    return found | {r.cell: r for r in singles if r is not None}


def _read_columns(path: Path) -> list[Receipt]:
    try:
        with np.load(io.BytesIO(atomic.read(path)), allow_pickle=False) as file:
            return [_parsed(text, Receipt) for text in file["receipt"].tolist()]
    except FileNotFoundError:
        return []
    except StoreError:
        raise
    except Exception as error:  # zip, npy and JSON have their own ways to fail on damage
        log.warning("unreadable, its cells counted as missing: %s (%s)", path, error)
        return []
