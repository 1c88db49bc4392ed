"""The audit of a featurize cell, before its receipt is published; and what a failed one revokes.

Some rows of the cell, drawn by its key, are computed again, each alone, by the plain loop; and of
one batch in `BATCHES`, the weighted sum of its grads is checked against one backward pass of
torch's own (`ops.audit`). Both are projected, so that what is compared is what is stored.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from trak_dist.cells import Cell, FeaturizeCell, FisherCell
from trak_dist.checkpoints.featurizer import CheckpointFeaturizer, batch_in, projecting_sink
from trak_dist.checks.dependents import derived_from, runs_sharing_grads
from trak_dist.errors import WrongGradient
from trak_dist.ops import audit
from trak_dist.ops.batches import Batch, rows_of
from trak_dist.ops.model_outputs import own_method
from trak_dist.store.run import Run

ROWS = 2  # of each cell
BATCHES = 64  # of so many one is checked whole: a batch costs a training step
CALLS = 4  # of `TRAKer`: in one of so many a row is computed alone
CLOSE = 1e-3  # of a row, relative: of a million some cancel more than those tried when planning

log = logging.getLogger("trak_dist")


@dataclass
class Audit:
    """Which rows to check, and the results so far.

    `rows` are positions among them, `batch` is the number of the batch that is checked whole, if
    any is.
    """

    rows: frozenset[int]
    batch: int | None
    seed: int
    seen: int = 0
    batches: int = 0
    audited_batches: int = 0
    largest: float = 0.0

    @classmethod
    def sample_for_cell(cls, key: str, rows: int, batch_rows: int) -> Audit:
        """The audit of `rows` rows, in batches of `batch_rows`; the same for the same key."""
        draw = random.Random(key)  # noqa: S311
        chosen = frozenset(draw.sample(range(rows), min(ROWS, rows)))
        batches = -(-rows // batch_rows)
        chance, batch = draw.random(), draw.randrange(batches)
        return cls(chosen, batch if chance < batches / BATCHES else None, draw.randrange(2**31))

    @classmethod
    def sample_for_batch(cls, rows: NDArray[np.int64], *, first: bool) -> Audit:
        """The audit of a streamed batch: a row of the first, and of one in `CALLS`."""
        draw = random.Random(rows.tobytes())  # noqa: S311
        row, pick, chance = (
            draw.randrange(len(rows)),
            draw.randrange(CALLS),
            draw.randrange(BATCHES),
        )
        chosen = frozenset([row] if first or not pick else [])
        return cls(chosen, None if chance else 0, draw.randrange(2**31))

    def check(
        self,
        featurizer: CheckpointFeaturizer,
        batch: Batch,
        grads: Float[Tensor, "batch k"],
        out_to_loss: Float[Tensor, " batch"],
        name: Callable[[int], str],
    ) -> None:
        """Check the next batch, if it was sampled.

        Parameters
        ----------
        name : callable
            Names a row of the batch, for the error.

        Raises
        ------
        WrongGradient
            If a difference is larger than rounding.
        """
        size = len(grads)
        rows = [row - self.seen for row in sorted(self.rows) if 0 <= row - self.seen < size]
        whole = self.batches == self.batch
        self.seen, self.batches = self.seen + size, self.batches + 1
        # Rows that are not finite are refused later; checking each batch here would wait for the
        # device.
        if not (rows or whole) or not grads.isfinite().all():
            return
        batch = batch_in(featurizer.plan.spec.featurize.compute, batch)
        for row in rows:
            self._check_row(featurizer, batch, row, grads, out_to_loss, name)
        if (
            whole
            and featurizer.method == "hooks"
            and own_method(featurizer.model_output, "get_batch_output")
        ):
            self._check_batch(featurizer, batch, grads, name)

    def facts(self) -> dict[str, Any]:
        """For the receipt."""
        return {
            "audited_rows": len(self.rows),
            "audited_batches": self.audited_batches,
            "largest_difference": self.largest,
        }

    def _check_row(
        self,
        featurizer: CheckpointFeaturizer,
        batch: Batch,
        row: int,
        grads: Tensor,
        out_to_loss: Tensor,
        name: Callable[[int], str],
    ) -> None:
        single = torch.zeros_like(grads[:1])
        example = rows_of(batch, slice(row, row + 1))
        featurizer.loop(example, projecting_sink(featurizer.projector, single))
        single /= math.sqrt(featurizer.plan.parameters)
        magnitude = float(grads.norm(dim=1).max())
        tolerance = max(CLOSE, audit.tolerance(featurizer.model))
        if not self._matches(grads[row], single[0], tolerance, magnitude):
            raise _wrong(featurizer, batch, row, name(row))
        q = audit.out_to_loss_alone(featurizer.model, featurizer.model_output, example, [0]).to(
            grads
        )
        if not torch.allclose(q[0], out_to_loss[row], rtol=tolerance, atol=tolerance):
            raise WrongGradient(
                f"{name(row)} has out-to-loss {float(out_to_loss[row]):.6g} in its batch, "
                f"{float(q[0]):.6g} alone",
                next="an example's loss must not depend on the other examples of its batch: fix "
                "the model or its output, then use another run_dir",
            )

    def _check_batch(
        self,
        featurizer: CheckpointFeaturizer,
        batch: Batch,
        grads: Tensor,
        name: Callable[[int], str],
    ) -> None:
        weights = audit.random_weights(len(grads), self.seed)
        params = featurizer.plan.spec.featurize.params
        expected = torch.zeros_like(grads[:1])
        sink = projecting_sink(featurizer.projector, expected)
        audit.weighted_sum_gradient(
            featurizer.model, featurizer.model_output, params, batch, weights, sink
        )
        expected /= math.sqrt(featurizer.plan.parameters)
        self.audited_batches += 1
        found = weights.to(grads) @ grads
        # Where the terms of a sum cancel, rounding is relative to the terms.
        magnitude = float(grads.norm(dim=1).square().sum().sqrt())
        if not self._matches(found, expected[0], audit.tolerance(featurizer.model), magnitude):
            raise WrongGradient(
                f"the grads of a batch, {name(0)} and the others of its batch, do not add up to "
                "those of autograd",
                next=_next(featurizer),
            )

    def _matches(self, found: Tensor, expected: Tensor, tolerance: float, magnitude: float) -> bool:
        """Whether two agree up to rounding; `magnitude` is the size of the terms."""
        error, norm = float((found - expected).norm()), float(expected.norm())
        self.largest = max(self.largest, error / max(norm, 1e-2 * magnitude, 1e-30))
        return error <= tolerance * (norm + 1e-2 * magnitude)


def _wrong(featurizer: CheckpointFeaturizer, batch: Batch, row: int, name: str) -> WrongGradient:
    """The error of a row, with the parameter whose gradient differs most."""
    params, shapes = featurizer.plan.spec.featurize.params, featurizer.shapes
    grads = audit.gradients_of_rows(featurizer.gradient_computer, batch, [row], shapes)[0]
    expected = audit.SingleExampleResults.of(
        featurizer.model, featurizer.model_output, params, batch, [row]
    ).grads
    errors = {n: float((grads[n] - w).norm()) for n, w in expected.items()}
    worst = max(errors, key=lambda n: errors[n])
    return WrongGradient(
        f"{name} has different gradients in its batch, by {featurizer.method}, than alone: {worst} "
        f"differs by {errors[worst]:.1e}, its norm is {float(expected[worst].norm()):.1e}",
        next=_next(featurizer),
    )


def _next(featurizer: CheckpointFeaturizer) -> str:
    if featurizer.method == "loop":
        return "the model gives different gradients each time: check whether it is random"
    return "featurize.gradients=loop with the same run_dir, where there are no scores yet"


# Revoking --------------------------------------------------------------------------------------


def gradient_method(run: Run, model_id: int) -> str:
    """How a checkpoint's gradients are computed: as planned, unless an audit failed."""
    return "loop" if run.receipts.audit_failure(model_id) else run.plan.gradients


def fall_back_to_loop(run: Run, cell: FeaturizeCell | FisherCell, error: WrongGradient) -> None:
    """Compute all gradients of a checkpoint one by one from now on.

    What was computed in another way is revoked, with everything derived from it.
    """
    name = run.plan.named_model(cell.model_id)
    log.warning("checkpoint %s is computed one by one, by loop: %s", name, error.what)
    run.receipts.record_audit_failure(cell.model_id, why=f"{cell.id}: {error.what}")
    revoke_stale_cells(run, cell.model_id)


def revoke_stale_cells(run: Run, model_id: int) -> None:
    """Make cells of a distrusted checkpoint missing that were not computed by the loop.

    What was derived from a cell is revoked before it: the next call after a kill finds the rest.
    """
    why = run.receipts.audit_failure(model_id)
    stale = [(other, _not_by_loop(other, model_id)) for other in runs_sharing_grads(run)]
    for other, cells in stale:
        for cell in reversed(derived_from(other, cells)):
            other.receipts.revoke(cell, why=why)
    for other, cells in stale:
        for cell in cells:
            other.receipts.revoke(cell, why=why)


def _not_by_loop(run: Run, model_id: int) -> list[Cell]:
    """The done cells with gradients of a checkpoint that the loop did not compute."""
    plan = run.plan
    done = run.receipts.done(
        [
            *(c for s in plan.splits for c in FeaturizeCell.of_split(plan, model_id, s.name)),
            *FisherCell.of_checkpoint(plan, model_id),
        ]
    )
    return [c for c, receipt in done.items() if receipt.fact("gradients", str) != "loop"]
