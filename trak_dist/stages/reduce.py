"""reduce, per checkpoint: Gram, kernel, and the target grads preconditioned by it.

Everything is read from the store in a cell's rows at a time, so memory does not grow with n.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from trak_dist import commands
from trak_dist.cells import FeaturizeCell, GramCell, GramPartCell, KernelCell, PreconditionCell
from trak_dist.cells.featurize import cells_with
from trak_dist.cells.gram_part import curvature_cells
from trak_dist.cells.precondition import array_of, target_blocks
from trak_dist.checks import gradient_audit
from trak_dist.coordinates import TRAIN, Rows
from trak_dist.errors import NonFiniteGram, SingularGram
from trak_dist.ops import dual, kernel
from trak_dist.runtime import curvature
from trak_dist.runtime.cell_result import CellResult
from trak_dist.runtime.inputs import check_same_origin, read_grads, require
from trak_dist.runtime.session import Session
from trak_dist.store import contents, parts


def gram_part(session: Session, cell: GramPartCell) -> CellResult:
    """Sum UᵀU over some of a checkpoint's rows.

    Raises
    ------
    MissingInputs, MixedRun
        If their cells are not all done, or were not made from the same things.
    """
    plan, sources = session.run.plan, cell.sources(session.run.plan)
    _revoke_what_failed(session, cell.model_id)
    cells = curvature_cells(plan, cell.model_id)[sources.start : sources.stop]
    check_same_origin(require(session.run, cells, needed_by=cell))
    blocks = curvature.CurvatureRows(session, cell.model_id, plan.proj_dim)
    total = kernel.sum_gram(map(blocks.__getitem__, sources), plan.proj_dim, session.device)
    return CellResult(contents.write(session.run, cell, {"part": total[None].cpu().numpy()}))


def gram(session: Session, cell: GramCell) -> CellResult:
    """Sum a checkpoint's UᵀU, or UUᵀ, then consolidate its receipts.

    Raises
    ------
    MissingInputs, MixedRun
        If its featurize and fisher cells are not all done, or were not made from the same things.
    SingularGram
        If each row's weight is zero.
    """
    plan = session.run.plan
    cells = list(FeaturizeCell.of_split(plan, cell.model_id, TRAIN))
    _revoke_what_failed(session, cell.model_id)
    summed = curvature_cells(plan, cell.model_id)
    receipts = require(session.run, list(dict.fromkeys([*cells, *summed])), needed_by=cell)
    check_same_origin(receipts)
    total = _summed(session, cell)
    if plan.curvature == "output" and not total.diagonal().any():
        raise SingularGram(
            "the weight Q(1 − Q) of every train row is zero: the model is certain of all labels",
            where=cell.id,
            next="reduce.curvature=none",
        )
    digests = contents.write(session.run, cell, {"gram": total.cpu().numpy()})
    if plan.train.streamed:  # several processes may be here at once, and the parts are gone then
        parts.discard(session.run.layout.parts(plan, cell.model_id, TRAIN))
    else:
        session.run.receipts.consolidate(cell.model_id)
    digest = next(iter(receipts.values())).fact("checkpoint_digest", str)
    return CellResult(digests, {"checkpoint_digest": digest})


def _revoke_what_failed(session: Session, model_id: int) -> None:
    """Also what was published since the audit."""
    if session.run.receipts.audit_failure(model_id):
        gradient_audit.revoke_stale_cells(session.run, model_id)


def _summed(session: Session, cell: GramCell) -> Tensor:
    plan = session.run.plan
    if parts := list(GramPartCell.of_checkpoint(plan, cell.model_id)):
        require(session.run, parts, needed_by=cell)
        read = (torch.from_numpy(contents.read(session.run, p, "part")[0]) for p in parts)
        return functools.reduce(Tensor.add_, read)
    blocks = curvature.CurvatureRows(session, cell.model_id, plan.proj_dim)
    if plan.dual:
        return dual.sum_gram(blocks, plan.curvature_rows, session.device)
    return kernel.sum_gram(blocks, plan.proj_dim, session.device)


def factorise(session: Session, cell: KernelCell) -> CellResult:
    """Factorise UᵀU + λI of one checkpoint, or UUᵀ + λI.

    Raises
    ------
    NonFiniteGram
        If the Gram has entries that are not finite.
    SingularGram
        If it is singular to working precision.
    """
    plan = session.run.plan
    source = GramCell(cell.model_id)
    require(session.run, [source], needed_by=cell)
    try:
        result = _factorised(session, cell.model_id)
    except NonFiniteGram as error:
        command = commands.launch(session.run.layout.run_dir, "stage=verify")
        notes = f"{command} tells whether what is stored is what was written"
        raise NonFiniteGram(error.what, where=cell.id, next=notes) from None
    except SingularGram as error:
        raise SingularGram(error.what, where=cell.id, next=error.next) from None
    digests = contents.write(session.run, cell, {"kernel": result.factor.cpu().numpy()})
    return CellResult(
        digests,
        {
            "lambda_absolute": result.lambda_absolute,
            "lambda_from": plan.lambda_from or "settings",
            "scale": result.scale,
            "condition": result.condition,
            "effective_rank": result.effective_rank,
            "effective_dimension": result.effective_dimension,
        },
    )


def _factorised(session: Session, model_id: int) -> kernel.Kernel:
    plan, reduce = session.run.plan, session.run.plan.spec.reduce
    stored = contents.read(session.run, GramCell(model_id), "gram")
    gram = torch.from_numpy(stored).to(session.device)
    factorise = functools.partial(
        dual.factorise if plan.dual else kernel.factorise,
        lambda_reg=reduce.lambda_reg,
        lambda_unit=reduce.lambda_unit,
        kernel_scale=reduce.kernel_scale,
    )
    if plan.dual:
        rows = curvature.CurvatureRows(session, model_id, plan.proj_dim)
        return factorise(gram, rows, dim=plan.proj_dim)
    return factorise(gram, rows=plan.curvature_rows)


def precondition(session: Session, cell: PreconditionCell) -> CellResult:
    """Solve the kernel for the grads of one target set, a target cell's rows at a time.

    Raises
    ------
    MissingInputs, MixedRun
        If the targets' cells are not all done, or were not made from the same things.
    """
    run, plan = session.run, session.run.plan
    opened = curvature.open_kernel(session, KernelCell(cell.model_id), needed_by=cell)
    targets = list(FeaturizeCell.of_split(plan, cell.model_id, cell.targets))
    # One train cell represents all: the gram cell checked that they agree.
    train = next(FeaturizeCell.of_split(plan, cell.model_id, TRAIN))
    check_same_origin(require(run, [train, *targets], needed_by=cell))
    if plan.split(cell.targets).streamed:
        parts.discard(run.layout.parts(plan, cell.model_id, cell.targets))
    dtype = getattr(torch, plan.precondition_dtype)

    def solved(block: Rows) -> NDArray[Any]:
        result = torch.empty(plan.proj_dim, len(block), dtype=dtype)
        sources = cells_with(plan, cell.model_id, cell.targets, block)
        for source, some in sources:
            columns = opened.precondition(some.of(read_grads(session, source), source.rows))
            some.of(result.T, block)[:] = columns.T.cpu()
        return result.numpy()

    blocks = target_blocks(plan, cell.targets)
    each = ((array_of(plan, cell.targets, block), solved(block)) for block in blocks)
    return CellResult(contents.write_each(run, cell, each))
