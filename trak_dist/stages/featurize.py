"""featurize: one cell's projected per-sample gradients, from examples to one chunk of grads."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trak_dist.cells import FeaturizeCell
from trak_dist.checks import gradient_audit
from trak_dist.checks.input_digests import InputDigests
from trak_dist.errors import NonFiniteGradient, ProblemError, WrongGradient
from trak_dist.ingest import streamed_rows
from trak_dist.listing import first_few
from trak_dist.ops import rows as row_format
from trak_dist.ops.batches import examples_in
from trak_dist.runtime.cell_result import CellResult, grads_facts
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
    run, spec = session.run, session.run.plan.spec
    if run.plan.split(cell.split).streamed:
        return streamed_rows.gather_parts(run, cell)
    try:
        return _computed(session, cell)
    except WrongGradient as error:
        if (
            spec.featurize.gradients != "auto"
            or gradient_audit.gradient_method(run, cell.model_id) == "loop"
        ):
            raise WrongGradient(error.what, where=cell.id, next=error.next) from None
        gradient_audit.fall_back_to_loop(run, cell, error)
        session.revoked_cells = True
    return _computed(session, cell)


def _computed(session: Session, cell: FeaturizeCell) -> CellResult:
    plan, spec = session.run.plan, session.run.plan.spec
    featurizer = session.featurizer(cell.model_id)
    session.run_once(f"done cells of {cell.split}", lambda: check_done_rows(session, cell))
    grads = torch.zeros(len(cell.rows), plan.store_dim, device=session.device)
    out_to_loss = torch.zeros(len(cell.rows), device=session.device)
    checks = gradient_audit.Audit.sample_for_cell(
        cell.key(plan), len(cell.rows), spec.featurize.batch_rows
    )
    shown = InputDigests()
    slower, done = featurizer.slower_batches, 0
    for host_batch in session.batches(cell.split, cell.rows):
        shown.add(host_batch)
        batch = session.to_device(host_batch)
        size = examples_in(batch)
        expected_size = min(spec.featurize.batch_rows, len(cell.rows) - done)
        if size != expected_size:
            raise ProblemError(
                f"a batch of {expected_size} examples of {cell.split!r} holds {size}",
                where=cell.id,
                next="collate must keep every example",
            )
        rows, first = slice(done, done + size), cell.rows.start + done
        out_to_loss[rows] = featurizer.featurize(batch, grads[rows])
        name = functools.partial(_named, cell.split, first)
        checks.check(featurizer, batch, grads[rows], out_to_loss[rows], name)
        done += size
    assert done == len(cell.rows)
    path = plan.checkpoint(cell.model_id).path
    check_finite(
        grads,
        out_to_loss,
        rows=range(cell.rows.start, cell.rows.stop),
        split=cell.split,
        what=f"checkpoint {plan.named_model(cell.model_id)} ({path})",
        where=cell.id,
    )
    check_not_all_zero(grads, where=cell.id)
    check_same_inputs(session, cell, shown)
    stored, scale = row_format.encode(grads, spec.featurize.dtype)
    arrays = {"grads": stored, "row_scale": scale, "out_to_loss": out_to_loss}
    digests = contents.write(
        session.run, cell, {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
    )
    return CellResult(
        digests,
        {
            **grads_facts(plan, featurizer.digest),
            "gradients": featurizer.method,
            **shown.facts(),
            "rows": len(cell.rows),
            "batch_rows": spec.featurize.batch_rows,
            "non_finite_rows": 0,
            "slower_batches": featurizer.slower_batches - slower,
            **checks.facts(),
        },
    )


def _named(split: str, first: int, row: int) -> str:
    return f"row {first + row} of {split!r}"


def check_finite(
    grads: Float[Tensor, "rows k"],
    out_to_loss: Float[Tensor, " rows"],
    *,
    rows: Sequence[int],
    split: str,
    what: str,
    where: str = "",
) -> None:
    """Raise `NonFiniteGradient` if a gradient or an out-to-loss is not finite, naming the rows."""
    bad = ~(grads.isfinite().all(1) & out_to_loss.isfinite())
    if bad.any():
        found = [rows[at] for at in bad.nonzero().flatten().tolist()]
        raise NonFiniteGradient(
            f"non-finite gradient or out-to-loss in {len(found)} of {len(rows)} rows of "
            f"{split!r}: {first_few(found)}; {what}",
            where=where,
            next="look there for NaN, and for labels that are no class, then run it again",
        )


def check_not_all_zero(grads: Float[Tensor, "rows k"], *, where: str = "") -> None:
    """Raise `ProblemError` if all gradients are zero."""
    if not grads.any():
        raise ProblemError(
            f"all gradients of the {len(grads)} rows are zero",
            where=where,
            next="the model output must depend on the weights that it is given: "
            "functional_call(model, (weights, buffers), inputs)",
        )
