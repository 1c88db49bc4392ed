"""score: one chunk of the ensemble's scores, some train rows against one target set."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trak_dist.cells import TRAIN, FeaturizeCell, PreconditionCell, Rows, ScoreCell
from trak_dist.ops.scores import ensemble_scores
from trak_dist.stages.outcome import Outcome
from trak_dist.stages.reduce import read_grads, refuse_other_rows, require
from trak_dist.stages.session import Session
from trak_dist.store import contents


def score(session: Session, cell: ScoreCell) -> Outcome:
    """Scores of `cell.rows`, over all checkpoints of the plan.

    Raises
    ------
    MissingInputs, MixedRun
        If an upstream cell is not done, or checkpoints were shown different examples.
    """
    run, plan = session.run, session.run.plan
    preconditioned = [PreconditionCell(m, cell.targets) for m in plan.model_ids]
    require(run, preconditioned, needed_by=cell)
    session.once(f"rows of {cell.targets}", lambda: _check_rows(session, cell))
    scores = ensemble_scores(_members(session, cell)).float().cpu().numpy()
    return Outcome(
        contents.write(run, cell, {"scores": scores}), {"model_ids": list(plan.model_ids)}
    )


def _check_rows(session: Session, cell: ScoreCell) -> None:
    run, splits = session.run, (TRAIN, cell.targets)
    cells = [c for m in run.plan.model_ids for s in splits for c in run.plan.featurize_cells(m, s)]
    refuse_other_rows(require(run, cells, needed_by=cell))


def _members(session: Session, cell: ScoreCell) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for model_id in session.run.plan.model_ids:
        sources = _overlapping(session, model_id, cell.rows)
        grads = [_cut(read_grads(session, c), c, cell.rows) for c in sources]
        out_to_loss = [
            _cut(torch.from_numpy(contents.read(session.run, c, "out_to_loss")), c, cell.rows)
            for c in sources
        ]
        solved = contents.read(session.run, PreconditionCell(model_id, cell.targets), "precond")
        yield (
            torch.cat(grads),
            torch.from_numpy(solved).to(session.device),
            torch.cat(out_to_loss).to(session.device),
        )


def _overlapping(session: Session, model_id: int, rows: Rows) -> list[FeaturizeCell]:
    cells = session.run.plan.featurize_cells(model_id, TRAIN)
    return [c for c in cells if c.rows.start < rows.stop and rows.start < c.rows.stop]


def _cut(values: Tensor, source: FeaturizeCell, rows: Rows) -> Tensor:
    start = max(rows.start, source.rows.start) - source.rows.start
    stop = min(rows.stop, source.rows.stop) - source.rows.start
    return values[start:stop]
