"""fisher: grads of the log-likelihood of labels drawn from the model, to one chunk of them."""

from __future__ import annotations

from dataclasses import replace

from trak_dist.cells import FeaturizeCell, FisherCell
from trak_dist.coordinates import TRAIN
from trak_dist.ops import draws
from trak_dist.ops import rows as row_format
from trak_dist.runtime.cell_result import CellResult
from trak_dist.runtime.computed_rows import compute_rows, or_by_loop
from trak_dist.runtime.reread import check_done_rows, check_same_inputs
from trak_dist.runtime.session import Session
from trak_dist.store import contents

SAMPLE = 0  # the seed of the train rows that labels are drawn for


def fisher(session: Session, cell: FisherCell) -> CellResult:
    """Compute and write Fisher rows / √p and their scales.

    A row's label follows from its number, the draw and the model's prediction alone.

    Raises
    ------
    NonFiniteGradient, WrongGradient, CheckpointError, DatasetError, ProblemError
        As a featurize cell.
    """
    return or_by_loop(session, cell, lambda: _computed(session, cell))


def _computed(session: Session, cell: FisherCell) -> CellResult:
    plan = session.run.plan
    train = next(FeaturizeCell.of_split(plan, cell.model_id, TRAIN))
    session.run_once(f"done cells of {TRAIN}", lambda: check_done_rows(session, train))
    sample = draws.some_rows(SAMPLE, plan.train.rows, plan.fisher_rows)
    rows = sample[cell.rows.start : cell.rows.stop].tolist()
    computed = compute_rows(session, cell, TRAIN, rows, draw=cell.draw)
    if len(sample) == plan.train.rows:
        check_same_inputs(session, replace(train, rows=cell.rows), computed.shown)
    stored, scale = row_format.encode(computed.grads, plan.spec.featurize.dtype)
    arrays = {"grads": stored.cpu().numpy(), "row_scale": scale.cpu().numpy()}
    return CellResult(contents.write(session.run, cell, arrays), computed.facts)
