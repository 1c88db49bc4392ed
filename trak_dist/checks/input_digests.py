"""What featurize cells were shown, as digests of their batches in receipts.

Rows have to be the same for every checkpoint, and for every worker, however long a run takes.
`runtime.reread` holds them against the dataset. Cells that were computed from other rows than it
has now are marked, so that `verify`, which runs no code of a problem, can revoke them.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from typing import Any

from trak_dist.cells import Cell, FeaturizeCell
from trak_dist.coordinates import Rows
from trak_dist.datasets import content_bytes
from trak_dist.hashing import truncated
from trak_dist.store.record import Receipt
from trak_dist.store.run import Run

SHORT = 8  # characters of a batch's digest


class InputDigests:
    """Digests of a cell's batches: one of all of them, and a short one of each."""

    def __init__(self) -> None:
        self._sha, self._batches = hashlib.sha256(), ""

    def add(self, batch: Any) -> None:
        """Add the next batch."""
        crc = 0
        for piece in content_bytes(batch, where="problem.collate"):
            self._sha.update(piece)
            crc = zlib.crc32(piece, crc)
        self._batches += f"{crc:0{SHORT}x}"

    def facts(self) -> dict[str, str]:
        """What the receipt keeps."""
        return {"inputs_digest": truncated(self._sha), "batch_digests": self._batches}


def cells_with_other_inputs(run: Run) -> dict[Cell, str]:
    """Done cells whose input rows differ from other cells' or from the dataset's; and why.

    Without the data it can't be decided which of them are right: each is named.
    """
    found: dict[Cell, str] = {}
    for split in (run.plan.train, *run.plan.targets):
        done = featurized(run, split.name)
        by_rows: dict[Rows, dict[str, FeaturizeCell]] = {}
        for cell, receipt in done.items():
            by_rows.setdefault(cell.rows, {}).setdefault(inputs_digest(receipt), cell)
        for cell, receipt in done.items():
            others = [c for d, c in by_rows[cell.rows].items() if d != inputs_digest(receipt)]
            if others:
                found[cell] = f"computed from other rows than {others[0].id}"
        found |= run.receipts.stale(done)
    return found


def featurized(run: Run, split: str) -> dict[FeaturizeCell, Receipt]:
    """The done featurize cells of a split, of all checkpoints, with their receipts."""
    plan = run.plan
    cells = [
        c for model_id in plan.model_ids for c in FeaturizeCell.of_split(plan, model_id, split)
    ]
    return {c: r for c, r in run.receipts.done(cells).items() if isinstance(c, FeaturizeCell)}


def inputs_digest(receipt: Receipt) -> str:
    """The digest of all that a cell was shown."""
    return str(receipt.facts.get("inputs_digest"))


def batch_digests(facts: Mapping[str, Any]) -> list[str]:
    """The short digests of the batches that a cell was shown; none in earlier receipts."""
    digests = facts.get("batch_digests", "")
    return [digests[at : at + SHORT] for at in range(0, len(digests), SHORT)]
