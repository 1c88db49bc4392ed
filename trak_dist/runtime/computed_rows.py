"""Projected per-sample gradients of some rows, computed and checked before they are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from trak_dist.cells import FeaturizeCell, FisherCell
from trak_dist.checkpoints.featurizer import CheckpointFeaturizer
from trak_dist.checks import gradient_audit
from trak_dist.checks.input_digests import InputDigests
from trak_dist.errors import NonFiniteGradient, ProblemError, WrongGradient
from trak_dist.listing import first_few
from trak_dist.ops.batches import examples_in
from trak_dist.ops.curvature import uniform_of_rows
from trak_dist.ops.model_outputs import BadLabel
from trak_dist.runtime.cell_result import grads_facts
from trak_dist.runtime.session import Session

T = TypeVar("T")


@dataclass(frozen=True)
class ComputedRows:
    """Grads X / √p (rows, k), out-to-loss Q (rows,), and what the receipt says of them."""

    grads: Float[Tensor, "rows k"]
    out_to_loss: Float[Tensor, " rows"]
    shown: InputDigests
    facts: dict[str, Any]


def compute_rows(
    session: Session,
    cell: FeaturizeCell | FisherCell,
    split: str,
    rows: Sequence[int],
    *,
    draw: int | None = None,
) -> ComputedRows:
    """Compute the grads of rows of a split.

    Parameters
    ----------
    draw : int, optional
        The number of a draw of labels, whose log-likelihood takes the place of the model output.

    Raises
    ------
    NonFiniteGradient
        If a row has NaN or infinite entries.
    WrongGradient
        If the audit fails.
    ProblemError
        If a batch has lost examples, or all gradients are zero.
    """
    plan, spec = session.run.plan, session.run.plan.spec
    featurizer = session.featurizer(cell.model_id)
    featurizer = featurizer if draw is None else featurizer.likelihood
    grads = torch.zeros(len(rows), plan.store_dim, device=session.device)
    out_to_loss = torch.zeros(len(rows), device=session.device)
    checks = gradient_audit.Audit.sample_for_cell(
        cell.key(plan), len(rows), spec.featurize.batch_rows
    )
    shown = InputDigests()
    slower, done = featurizer.slower_batches, 0
    for host_batch in session.batches(split, rows):
        shown.add(host_batch)
        batch, size = session.to_device(host_batch), examples_in(host_batch)
        of_batch = rows[done : done + spec.featurize.batch_rows]
        if size != len(of_batch):
            raise ProblemError(
                f"a batch of {len(of_batch)} examples of {split!r} holds {size}",
                where=cell.id,
                next="collate must keep every example",
            )
        if draw is not None:
            uniform = uniform_of_rows(of_batch, draw, session.device)
            batch = session.featurizer(cell.model_id).draw_labels(batch, uniform)
        at = slice(done, done + size)
        out_to_loss[at] = featurizer.featurize(batch, grads[at])
        checks.check(featurizer, batch, grads[at], out_to_loss[at], _names(split, of_batch))
        done += size
    assert done == len(rows)
    path = plan.checkpoint(cell.model_id).path
    check_finite(
        grads,
        out_to_loss,
        rows=rows,
        split=split,
        what=f"checkpoint {plan.named_model(cell.model_id)} ({path})",
        bad_label=lambda at: _bad_label(session, featurizer, split, rows[at]),
        where=cell.id,
    )
    check_not_all_zero(grads, where=cell.id)
    facts = {
        **grads_facts(plan, featurizer.digest),
        "gradients": featurizer.method,
        **shown.facts(),
        "rows": len(rows),
        "batch_rows": spec.featurize.batch_rows,
        "non_finite_rows": 0,
        "slower_batches": featurizer.slower_batches - slower,
        **checks.facts(),
    }
    return ComputedRows(grads, out_to_loss, shown, facts)


def _bad_label(
    session: Session, featurizer: CheckpointFeaturizer, split: str, row: int
) -> BadLabel | None:
    """The label of a row that is none, if it has one."""
    (batch,) = session.batches(split, [row])
    return featurizer.bad_label(session.to_device(batch))


def _names(split: str, rows: Sequence[int]) -> Callable[[int], str]:
    return lambda at: f"row {rows[at]} of {split!r}"


def or_by_loop(session: Session, cell: FeaturizeCell | FisherCell, compute: Callable[[], T]) -> T:
    """What `compute` gives; after a failed audit by the loop, if `featurize.gradients` allows it.

    All other cells of the checkpoint are computed one by one then, too.

    Raises
    ------
    WrongGradient
        If it does not.
    """
    run = session.run
    try:
        return compute()
    except WrongGradient as error:
        if (
            run.plan.spec.featurize.gradients != "auto"
            or gradient_audit.gradient_method(run, cell.model_id) == "loop"
        ):
            raise WrongGradient(error.what, where=cell.id, next=error.next) from None
        gradient_audit.fall_back_to_loop(run, cell, error)
        session.revoked_cells = True
    return compute()


def check_finite(  # noqa: PLR0913 -- what an error says
    grads: Float[Tensor, "rows k"],
    out_to_loss: Float[Tensor, " rows"],
    *,
    rows: Sequence[int],
    split: str,
    what: str,
    bad_label: Callable[[int], BadLabel | None],
    where: str = "",
) -> None:
    """Raise `NonFiniteGradient` if a gradient or an out-to-loss is not finite, naming the rows.

    Parameters
    ----------
    bad_label : callable
        What is wrong with the label of the row at a place in `rows`, asked if it is not finite.
    """
    bad = ~(grads.isfinite().all(1) & out_to_loss.isfinite())
    if bad.any():
        places = bad.nonzero().flatten().tolist()
        found, none = [rows[at] for at in places], bad_label(places[0])
        label = f"{none.of(found[0], split)}; " if none else ""
        raise NonFiniteGradient(
            f"non-finite gradient or out-to-loss in {len(found)} of {len(rows)} rows of "
            f"{split!r}: {first_few(found)}; {label}{what}",
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
