"""top_part and top: the strongest train rows of each target, found while scoring, then merged."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak_dist.cells import TopCell, TopPartCell
from trak_dist.cells.top_part import rows_at_once
from trak_dist.coordinates import Rows
from trak_dist.ops.strongest import Strongest
from trak_dist.runtime.cell_result import CellResult
from trak_dist.runtime.inputs import require
from trak_dist.runtime.session import Session
from trak_dist.stages.score import block_scores, check_inputs
from trak_dist.store import contents


def top_part(session: Session, cell: TopPartCell) -> CellResult:
    """The strongest of `cell.rows` for a block of targets, over all checkpoints and its halves.

    Raises
    ------
    MissingInputs, MixedRun
        If an upstream cell is not done, or checkpoints were shown different examples.
    NonFiniteScore
        If a score is no finite float32.
    """
    plan, held = session.run.plan, cell.rows
    check_inputs(session, cell.targets, needed_by=cell)
    best = _none_yet(session, cell)
    step = rows_at_once(len(cell.block))
    for start in range(held.start, held.stop, step):
        rows = Rows(start, min(start + step, held.stop))
        scores, halves = block_scores(session, cell.targets, rows, cell.block)
        both_ends = np.stack([scores.T, -scores.T], axis=1)  # (targets, 2, rows)
        by_half = halves.transpose(2, 1, 0)  # (targets, 2, rows)
        for name, values in (("top", both_ends), ("halves", by_half)):
            if name in best:
                of_each = values.reshape(-1, len(rows))
                numbers = np.arange(start - held.start, rows.stop - held.start)
                best[name].add(of_each, np.broadcast_to(numbers, of_each.shape))
    whole = {name: _padded(found)[None].astype(np.float32) for name, found in best.items()}
    digests = contents.write(session.run, cell, whole)
    return CellResult(digests, {"model_ids": list(plan.model_ids)})


def top(session: Session, cell: TopCell) -> CellResult:
    """The strongest of all train rows for a block of targets.

    Raises
    ------
    MissingInputs
        If a part is missing.
    """
    run, plan = session.run, session.run.plan
    parts = list(TopPartCell.of_block(plan, cell.targets, cell.block))
    require(run, parts, needed_by=cell)
    best = _none_yet(session, cell)
    for part in parts:
        for name, found in best.items():
            stored = contents.read(run, part, name)[0]
            rows, scores = stored.reshape(-1, 2, stored.shape[-1]).swapaxes(0, 1)
            there = rows >= 0
            found.add(np.where(there, scores, -np.inf), rows.astype(np.int64) + part.rows.start)
    whole = {name: _padded(found) for name, found in best.items()}
    return CellResult(contents.write(run, cell, whole), {"model_ids": list(plan.model_ids)})


def _none_yet(session: Session, cell: TopPartCell | TopCell) -> dict[str, Strongest]:
    """A column for each target and end, or each target and half, as the cell's arrays have them."""
    found = {}
    for name, owned in cell.arrays(session.run.plan).items():
        *_, targets, ends, _, count = owned.spec.shape
        found[name] = Strongest(targets * ends, count)
    return found


def _padded(best: Strongest) -> NDArray[Any]:
    """What is kept (targets, 2, 2, count) float64: [row, score]; −1 where there are fewer rows."""
    found = np.stack([best.rows, best.scores], axis=1)
    missing = best.count - found.shape[-1]
    found = np.pad(found, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
    return found.reshape(-1, 2, *found.shape[1:])
