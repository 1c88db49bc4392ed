"""What featurize cells were shown, by digests of their batches.

Rows have to be the same for every checkpoint, and for every worker, however long a run takes. A
worker that begins with a split reads some batches of done cells again; each cell is compared with
those of the same rows. Cells that were shown other rows than the dataset has now are marked, so
that `verify`, which runs no code of a problem, can take them back.
"""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Mapping
from typing import Any

from trak_dist.cells import Cell, FeaturizeCell, Rows
from trak_dist.datasets import content
from trak_dist.errors import DatasetError
from trak_dist.runtime.session import Session
from trak_dist.store.receipts import Receipt
from trak_dist.store.run import Run

REREAD_ROWS = 512  # of done cells, by a worker that begins with a split
SHORT = 8  # characters of a batch's digest

Done = Mapping[FeaturizeCell, Receipt]


class Shown:
    """Digests of the batches that a cell is shown: one of all, and a short one of each."""

    def __init__(self) -> None:
        self._sha, self._batches = hashlib.sha256(), ""

    def add(self, batch: Any) -> None:
        """Take the next batch into account."""
        crc = 0
        for piece in content(batch, where="problem.collate"):
            self._sha.update(piece)
            crc = zlib.crc32(piece, crc)
        self._batches += f"{crc:0{SHORT}x}"

    def facts(self) -> dict[str, str]:
        """What the receipt keeps."""
        return {"inputs_digest": self._sha.hexdigest()[:32], "batch_digests": self._batches}


def refuse_changed_rows(session: Session, cell: FeaturizeCell) -> None:
    """Hold what done cells of the split of `cell` were shown against the dataset.

    Raises
    ------
    DatasetError
        If it was something else, naming the cells.
    """
    run, split = session.run, cell.split
    done = _done(run, split)
    alike = {(c.rows, _digest(r)): (c, r) for c, r in done.items()}
    session.shown.update({(split, rows): digest for rows, digest in alike})
    mixed = len({rows for rows, _ in alike}) < len(alike)
    batches = [
        (c, r.facts["batch_digests"], at)
        for c, r in alike.values()
        for at in range(len(r.facts.get("batch_digests", "")) // SHORT)
    ]
    random.Random(run.plan.key(cell)).shuffle(batches)  # noqa: S311
    size = run.plan.spec.featurize.batch_rows
    for c, digests, at in batches[: max(1, REREAD_ROWS // size)]:
        again = _shown(session, split, _batch_rows(c.rows, at, size))
        mixed |= again["batch_digests"] != digests[at * SHORT : (at + 1) * SHORT]
    if mixed or run.receipts.doubted(done):
        _refuse_changed(session, split, done)


def refuse_unlike(session: Session, cell: FeaturizeCell, shown: Shown) -> None:
    """Hold what a cell was shown against what those of other checkpoints were, before it is done.

    Raises
    ------
    DatasetError
        If it is something else.
    """
    digest = shown.facts()["inputs_digest"]
    if session.shown.setdefault((cell.split, cell.rows), digest) == digest:
        return
    _refuse_changed(session, cell.split, _done(session.run, cell.split))
    raise DatasetError(
        f"the rows {cell.rows} of {cell.split!r} are others when they are read again",
        where=cell.id,
        next="switch random augmentation off: an example must be the same every time",
    )


def of_other_rows(run: Run) -> dict[Cell, str]:
    """Done cells that were shown other rows than others were, or than their dataset has; and why.

    Which ones of those that disagree are right can't be told without the data: each is named.
    """
    found: dict[Cell, str] = {}
    for split in (run.plan.train, *run.plan.targets):
        done = _done(run, split.name)
        by_rows: dict[Rows, dict[str, FeaturizeCell]] = {}
        for cell, receipt in done.items():
            by_rows.setdefault(cell.rows, {}).setdefault(_digest(receipt), cell)
        for cell, receipt in done.items():
            others = [c for d, c in by_rows[cell.rows].items() if d != _digest(receipt)]
            if others:
                found[cell] = f"shown other rows than {others[0].id}"
        found |= run.receipts.doubted(done)
    return found


def _refuse_changed(session: Session, split: str, done: Done) -> None:
    """Read all that the done cells were shown again, mark those that were shown something else."""
    run, size = session.run, session.run.plan.spec.featurize.batch_rows
    now = {rows: _shown(session, split, rows) for rows in {c.rows for c in done}}
    doubted, odd = run.receipts.doubted(done), dict[FeaturizeCell, str]()
    for cell, receipt in done.items():
        found = now[cell.rows]
        if _digest(receipt) == found["inputs_digest"]:
            if cell in doubted:
                run.receipts.trust(cell)
            continue
        pairs = zip(*map(_each, (receipt.facts, found)), strict=False)
        at = next((i for i, (then, again) in enumerate(pairs) if then != again), None)
        odd[cell] = str(cell.rows if at is None else _batch_rows(cell.rows, at, size))
        run.receipts.doubt(cell, f"shown other rows than {split!r} has at {odd[cell]}")
    if odd:
        shown = ", ".join(f"{c.id} (rows {rows})" for c, rows in list(odd.items())[:5])
        command = (
            f"python -m trak_dist.launch stage=verify repair=true run_dir={run.layout.run_dir}"
        )
        raise DatasetError(
            f"{len(odd)} of {len(done)} done cells of {split!r} were shown other rows than the "
            f"dataset has now: {shown}{', …' if len(odd) > 5 else ''}",
            where=next(iter(odd)).id,
            next="if the data were right then, restore them and run the same command again; if "
            f"they are right now, take these cells back by {command}",
        )


def _done(run: Run, split: str) -> dict[FeaturizeCell, Receipt]:
    plan = run.plan
    cells = [c for model_id in plan.model_ids for c in plan.featurize_cells(model_id, split)]
    return {c: r for c, r in run.receipts.done(cells).items() if isinstance(c, FeaturizeCell)}


def _shown(session: Session, split: str, rows: Rows) -> dict[str, str]:
    shown = Shown()
    for batch in session.batches(split, rows):
        shown.add(batch)
    return shown.facts()


def _batch_rows(rows: Rows, at: int, size: int) -> Rows:
    return Rows(rows.start + at * size, min(rows.start + (at + 1) * size, rows.stop))


def _each(facts: Mapping[str, Any]) -> list[str]:
    digests = facts.get("batch_digests", "")
    return [digests[at : at + SHORT] for at in range(0, len(digests), SHORT)]


def _digest(receipt: Receipt) -> str:
    return str(receipt.facts.get("inputs_digest"))
