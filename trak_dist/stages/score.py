"""score: one chunk of the ensemble's scores, some train rows against one target set."""

from __future__ import annotations

import torch
from torch import Tensor

from trak_dist.cells import FeaturizeCell, KernelCell, PreconditionCell, ScoreCell
from trak_dist.cells.score import halves_of, halves_targets
from trak_dist.coordinates import TRAIN, Rows
from trak_dist.ops.scores import Ensemble
from trak_dist.runtime.cell_result import CellResult
from trak_dist.runtime.curvature import open_kernel
from trak_dist.runtime.inputs import check_same_rows, read_grads, require
from trak_dist.runtime.session import Session
from trak_dist.store import contents


def score(session: Session, cell: ScoreCell) -> CellResult:
    """Scores of `cell.rows`, over all checkpoints of the plan and, of some targets, its halves.

    Raises
    ------
    MissingInputs, MixedRun
        If an upstream cell is not done, or checkpoints were shown different examples.
    """
    run, plan = session.run, session.run.plan
    itself = cell.targets == TRAIN
    solved = [
        KernelCell(m) if itself else PreconditionCell(m, cell.targets) for m in plan.model_ids
    ]
    require(run, solved, needed_by=cell)
    splits = dict.fromkeys((TRAIN, cell.targets))
    session.run_once(
        f"rows of {cell.targets}", lambda: check_same_rows(run, splits, needed_by=cell)
    )
    half_targets = halves_targets(plan, cell.targets)
    whole, halves = Ensemble(), [(Ensemble(), model_ids) for model_ids in halves_of(plan)]
    for model_id, source in zip(plan.model_ids, solved, strict=True):
        grads, out_to_loss = _read(session, model_id, cell.rows)
        if itself:
            opened = open_kernel(session, KernelCell(model_id), needed_by=cell)
            products = opened.self_influence(grads)
        else:
            b = torch.from_numpy(contents.read(run, source, "precond")).to(session.device)
            products = grads.to(b.dtype) @ b
        whole.add(products, out_to_loss)
        for half, model_ids in halves:
            if half_targets and model_id in model_ids:
                half.add(products[:, half_targets], out_to_loss)
    values = {"scores": whole.scores()}
    if half_targets:
        values["halves"] = torch.stack([half.scores() for half, _ in halves], dim=1)
    written = {name: value.float().cpu().numpy() for name, value in values.items()}
    return CellResult(contents.write(run, cell, written), {"model_ids": list(plan.model_ids)})


def _read(session: Session, model_id: int, rows: Rows) -> tuple[Tensor, Tensor]:
    """The grads (rows, k) and out-to-loss (rows,) of one checkpoint."""
    sources = _overlapping(session, model_id, rows)
    grads = [_cut(read_grads(session, c), c, rows) for c in sources]
    out_to_loss = [
        _cut(torch.from_numpy(contents.read(session.run, c, "out_to_loss")), c, rows)
        for c in sources
    ]
    return torch.cat(grads), torch.cat(out_to_loss).to(session.device)


def _overlapping(session: Session, model_id: int, rows: Rows) -> list[FeaturizeCell]:
    blocks = session.run.plan.train.blocks(overlapping=rows)
    return [FeaturizeCell(model_id, TRAIN, block) for block in blocks]


def _cut(values: Tensor, source: FeaturizeCell, rows: Rows) -> Tensor:
    start = max(rows.start, source.rows.start) - source.rows.start
    stop = min(rows.stop, source.rows.stop) - source.rows.start
    return values[start:stop]
