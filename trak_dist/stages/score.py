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
    train = [c for m in plan.model_ids for c in _overlapping(session, m, cell.rows)]
    targets = [c for m in plan.model_ids for c in plan.featurize_cells(m, cell.targets)]
    require(run, [*train, *targets], needed_by=cell)
    session.once(
        f"rows of {TRAIN} and {cell.targets}",
        lambda: refuse_other_rows(run, plan.model_ids, (TRAIN, cell.targets)),
    )
    scores = ensemble_scores(_members(session, cell)).float().cpu().numpy()
    return Outcome(
        contents.write(run, cell, {"scores": scores}), {"model_ids": list(plan.model_ids)}
    )


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
