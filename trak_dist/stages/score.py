"""score: one chunk of the ensemble's scores, some train rows against one target set."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak_dist.cells import Cell, KernelCell, PreconditionCell, ScoreCell
from trak_dist.cells.featurize import cells_with
from trak_dist.cells.precondition import array_of, target_blocks
from trak_dist.cells.score import halves_of, halves_targets
from trak_dist.coordinates import TRAIN, Rows
from trak_dist.errors import NonFiniteScore
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
    NonFiniteScore
        If a score is no finite float32.
    """
    run, plan = session.run, session.run.plan
    check_inputs(session, cell.targets, needed_by=cell)
    facts = {"model_ids": list(plan.model_ids)}
    if cell.targets == TRAIN:
        written = {"scores": _self_influence(session, cell)}
        return CellResult(contents.write(run, cell, written), facts)
    blocks = target_blocks(plan, cell.targets)
    found = [block_scores(session, cell.targets, cell.rows, block) for block in blocks]
    written = {"scores": np.concatenate([scores for scores, _ in found], axis=1)}
    if halves_targets(plan, cell.targets):
        written["halves"] = np.concatenate([halves for _, halves in found], axis=2)
    return CellResult(contents.write(run, cell, written), facts)


def check_inputs(session: Session, targets: str, *, needed_by: Cell) -> None:
    """Check that all is there that scores are made of, and that checkpoints saw the same rows.

    Raises
    ------
    MissingInputs, MixedRun
        If it is not.
    """
    run, plan = session.run, session.run.plan
    itself = targets == TRAIN
    solved = [KernelCell(m) if itself else PreconditionCell(m, targets) for m in plan.model_ids]
    require(run, solved, needed_by=needed_by)
    splits = dict.fromkeys((TRAIN, targets))
    session.run_once(
        f"rows of {targets}", lambda: check_same_rows(run, splits, needed_by=needed_by)
    )


def block_scores(
    session: Session, targets: str, rows: Rows, block: Rows
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The scores of some train rows for a block of targets.

    Returns
    -------
    scores : (rows, block) float32
    halves : (rows, 2, targets) float32
        By either half of the ensemble, of those `halves_targets` that are in the block.
    """
    run, plan = session.run, session.run.plan
    name = array_of(plan, targets, block)
    chosen = [t - block.start for t in halves_targets(plan, targets) if t in block.numbers]
    whole, halves = Ensemble(), [(Ensemble(), model_ids) for model_ids in halves_of(plan)]
    for model_id in plan.model_ids:
        grads, out_to_loss = _read(session, model_id, rows)
        solved = contents.read(run, PreconditionCell(model_id, targets), name)
        b = torch.from_numpy(solved).to(session.device)
        products = grads.to(b.dtype) @ b
        whole.add(products, out_to_loss)
        for half, model_ids in halves:
            if chosen and model_id in model_ids:
                half.add(products[:, chosen], out_to_loss)
    of_halves = [half.scores() for half, _ in halves] if chosen else [torch.empty(len(rows), 0)] * 2
    where = f"rows {rows} for {targets} {block}"
    both = torch.stack(of_halves, dim=1)
    return _finite(whole.scores(), where=where), _finite(both, where=where)


def _self_influence(session: Session, cell: ScoreCell) -> NDArray[np.float32]:
    whole = Ensemble()
    for model_id in session.run.plan.model_ids:
        grads, out_to_loss = _read(session, model_id, cell.rows)
        opened = open_kernel(session, KernelCell(model_id), needed_by=cell)
        whole.add(opened.self_influence(grads), out_to_loss)
    return _finite(whole.scores(), where=cell.id)


def _read(session: Session, model_id: int, rows: Rows) -> tuple[Tensor, Tensor]:
    """The grads (rows, k) and out-to-loss (rows,) of one checkpoint."""
    grads, out_to_loss = [], []
    for source, some in cells_with(session.run.plan, model_id, TRAIN, rows):
        grads.append(some.of(read_grads(session, source), source.rows))
        q = contents.read(session.run, source, "out_to_loss")
        out_to_loss.append(torch.from_numpy(some.of(q, source.rows)))
    return torch.cat(grads), torch.cat(out_to_loss).to(session.device)


def _finite(scores: Tensor, *, where: str) -> NDArray[np.float32]:
    found: NDArray[np.float32] = scores.float().cpu().numpy()
    if bad := int((~np.isfinite(found)).sum()):
        raise NonFiniteScore(
            f"{bad} of {found.size} scores are NaN or too large for float32",
            where=where,
            next="a larger reduce.lambda_reg; stage=verify tells whether what is stored is whole",
        )
    return found
