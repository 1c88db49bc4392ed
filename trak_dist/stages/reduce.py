"""reduce, per checkpoint: Gram, kernel, and the target grads preconditioned by it.

Everything is read from the store in a cell's rows at a time, so memory does not grow with n.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trak_dist import commands
from trak_dist.cells import Cell, FeaturizeCell, GramCell, KernelCell, PreconditionCell
from trak_dist.coordinates import TRAIN, Rows
from trak_dist.errors import MissingInputs, MixedRun, SingularGram
from trak_dist.ops import kernel, projection
from trak_dist.ops import rows as row_format
from trak_dist.stages import audit
from trak_dist.stages.outcome import Outcome
from trak_dist.stages.session import Session
from trak_dist.store import contents, parts
from trak_dist.store.receipts import Receipt
from trak_dist.store.run import Run

SHARED_FACTS = (
    "checkpoint_digest",
    "projector",
    "projector_seed",
    "projector_dim",
    "projector_version",
    "dtype",
    "gradients",
)


def gram(session: Session, cell: GramCell) -> Outcome:
    """Sum XᵀX over a checkpoint's train rows, then consolidate its receipts.

    Raises
    ------
    MissingInputs, MixedRun
        If its featurize cells are not all done, or were not made from the same things.
    """
    plan = session.run.plan
    cells = list(FeaturizeCell.of_split(plan, cell.model_id, TRAIN))
    if session.run.receipts.distrusted(cell.model_id):  # what was published meanwhile too
        audit.take_back(session.run, cell.model_id)
    receipts = require(session.run, cells, needed_by=cell)
    refuse_mixed(receipts)
    blocks = (read_grads(session, source) for source in cells)
    total = kernel.sum_gram(blocks, plan.proj_dim, session.device)
    digests = contents.write(session.run, cell, {"gram": total.cpu().numpy()})
    if plan.train.fed:  # several processes may be here at once, and the parts are gone then
        parts.discard(session.run.layout.parts(plan, cell.model_id, TRAIN))
    else:
        session.run.receipts.consolidate(cell.model_id)
    digest = next(iter(receipts.values())).fact("checkpoint_digest", str)
    return Outcome(digests, {"checkpoint_digest": digest})


def factorise(session: Session, cell: KernelCell) -> Outcome:
    """Factorise XᵀX + λI of one checkpoint.

    Raises
    ------
    SingularGram
        If it is singular to working precision.
    """
    plan = session.run.plan
    source = GramCell(cell.model_id)
    require(session.run, [source], needed_by=cell)
    reduce = plan.spec.reduce
    try:
        result = kernel.factorise(
            torch.from_numpy(contents.read(session.run, source, "gram")).to(session.device),
            rows=plan.train.rows,
            lambda_reg=reduce.lambda_reg,
            lambda_unit=reduce.lambda_unit,
            kernel_scale=reduce.kernel_scale,
        )
    except SingularGram as error:
        raise SingularGram(error.what, where=cell.id, next=error.next) from None
    digests = contents.write(session.run, cell, {"kernel": result.factor.cpu().numpy()})
    return Outcome(
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


def precondition(session: Session, cell: PreconditionCell) -> Outcome:
    """Solve the kernel for the grads of one target set, a target cell's rows at a time."""
    run, plan = session.run, session.run.plan
    source = KernelCell(cell.model_id)
    (receipt,) = require(run, [source], needed_by=cell).values()
    targets = list(FeaturizeCell.of_split(plan, cell.model_id, cell.targets))
    # One train cell stands for all: the gram cell saw to it that they agree.
    train = next(FeaturizeCell.of_split(plan, cell.model_id, TRAIN))
    refuse_mixed(require(run, [train, *targets], needed_by=cell))
    factor = torch.from_numpy(contents.read(run, source, "kernel")).to(session.device)
    if plan.split(cell.targets).fed:
        parts.discard(run.layout.parts(plan, cell.model_id, cell.targets))
    dtype = getattr(torch, plan.precondition_dtype)
    result = torch.empty(plan.proj_dim, plan.split(cell.targets).rows, dtype=dtype)
    for target in targets:
        solved = kernel.precondition(
            factor, receipt.fact("scale", (int, float)), read_grads(session, target)
        )
        result[:, target.rows.start : target.rows.stop] = solved.cpu()
    return Outcome(contents.write(run, cell, {"precond": result.numpy()}))


def read_grads(session: Session, cell: FeaturizeCell) -> Float[Tensor, "rows k"]:
    """The grads of a featurize cell, decoded and folded to `proj_dim`, on the device."""
    stored, scale = (
        torch.from_numpy(contents.read(session.run, cell, name)).to(session.device)
        for name in ("grads", "row_scale")
    )
    return projection.fold(row_format.decode(stored, scale), session.run.plan.proj_dim)


def require(run: Run, cells: Sequence[Cell], *, needed_by: Cell) -> dict[Cell, Receipt]:
    """The receipts of `cells`.

    Raises
    ------
    MissingInputs
        Naming those that are not done.
    """
    done = run.receipts.done(cells)
    missing = [c.id for c in cells if c not in done]
    if missing:
        raise MissingInputs(
            f"{len(missing)} of the cells that {needed_by.id} needs are not done: "
            f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}",
            where=needed_by.id,
            next=commands.launch(run.layout.run_dir),
        )
    return done


def refuse_mixed(receipts: dict[Cell, Receipt]) -> None:
    """Raise `MixedRun` naming the cells of one checkpoint that were not made alike."""
    mend = "mend the cause, then start a new run_dir: these cells can't be reduced together"
    for fact in SHARED_FACTS:
        values = [(cell, r.facts.get(fact)) for cell, r in receipts.items()]
        _refuse_unequal(fact, values, next=mend)


def refuse_other_rows(run: Run, receipts: dict[Cell, Receipt]) -> None:
    """Raise `MixedRun` naming cells whose input rows differ between checkpoints."""
    by_rows: dict[tuple[str, Rows], list[tuple[Cell, object]]] = {}
    for cell, receipt in receipts.items():
        assert isinstance(cell, FeaturizeCell)
        values = by_rows.setdefault((cell.split, cell.rows), [])
        values.append((cell, receipt.facts.get("inputs_digest")))
    command = f"python -m trak_dist.launch stage=verify repair=true run_dir={run.layout.run_dir}"
    back = f"mend the cause; {command} takes all that disagree back, to be computed again"
    for values in by_rows.values():
        _refuse_unequal("inputs_digest", values, next=back)


def _refuse_unequal(fact: str, values: Sequence[tuple[Cell, object]], *, next: str) -> None:
    by_value: dict[object, list[str]] = {}
    for cell, value in values:
        by_value.setdefault(value, []).append(cell.id)
    if len(by_value) > 1:
        groups: Iterator[str] = (
            f"{value!r} in {', '.join(cells[:3])}{', …' if len(cells) > 3 else ''}"
            for value, cells in by_value.items()
        )
        hint = (
            " (random augmentation? data that changed? a loader that shuffles?)"
            if fact == "inputs_digest"
            else ""
        )
        raise MixedRun(
            f"cells that belong together disagree on {fact}{hint}: {'; '.join(groups)}",
            where=min(by_value.values(), key=len)[0],
            next=next,
        )
