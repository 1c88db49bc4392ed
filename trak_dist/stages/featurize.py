"""featurize: one cell's projected per-sample gradients, from examples to one chunk of grads."""

from __future__ import annotations

from trak_dist.cells import FeaturizeCell
from trak_dist.ingest import streamed_rows
from trak_dist.ops import rows as row_format
from trak_dist.runtime.cell_result import CellResult
from trak_dist.runtime.computed_rows import compute_rows, or_by_loop
from trak_dist.runtime.reread import check_done_rows, check_same_inputs
from trak_dist.runtime.session import Session
from trak_dist.store import contents


def featurize(session: Session, cell: FeaturizeCell) -> CellResult:
    """Compute and write grads X / √p, their row scales, and out-to-loss Q.

    If the audit fails, and `featurize.gradients` leaves the way open, the cell and all others of
    its checkpoint are computed one by one.

    Raises
    ------
    NonFiniteGradient
        If a row has NaN or infinite entries; nothing is written then.
    WrongGradient
        If the audit fails.
    CheckpointError, DatasetError, ProblemError
        If the inputs are not the planned ones.
    """
    if session.run.plan.split(cell.split).streamed:
        return streamed_rows.gather_parts(session.run, cell)
    return or_by_loop(session, cell, lambda: _computed(session, cell))


def _computed(session: Session, cell: FeaturizeCell) -> CellResult:
    session.run_once(f"done cells of {cell.split}", lambda: check_done_rows(session, cell))
    computed = compute_rows(session, cell, cell.split, cell.rows.numbers)
    check_same_inputs(session, cell, computed.shown)
    stored, scale = row_format.encode(computed.grads, session.run.plan.spec.featurize.dtype)
    arrays = {"grads": stored, "row_scale": scale, "out_to_loss": computed.out_to_loss}
    digests = contents.write(
        session.run, cell, {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
    )
    return CellResult(digests, computed.facts)
