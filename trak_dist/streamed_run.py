"""The run that a `TRAKer` streams rows into: created by the first batch, extended later.

Other processes may stream into it, and change its plan, at the same time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trak_dist import trust, worker
from trak_dist.cells import (
    Cell,
    FeaturizeCell,
    FisherCell,
    GramCell,
    KernelCell,
    PreconditionCell,
    ScoreCell,
)
from trak_dist.checkpoints import digests
from trak_dist.checkpoints.featurizer import CheckpointFeaturizer
from trak_dist.checks.gradient_audit import Audit
from trak_dist.configuration.config import Spec
from trak_dist.coordinates import TRAIN
from trak_dist.errors import CellsFailed, ModelIDException, SingularGram
from trak_dist.ingest import arguments, streamed_plan, streamed_rows
from trak_dist.ingest.streamed_checkpoint import StreamedCheckpoint
from trak_dist.interface.execution import outcome_of
from trak_dist.ops import curvature
from trak_dist.ops.batches import examples_in, rows_of
from trak_dist.ops.gradients import select_params
from trak_dist.ops.model_outputs import ModelOutput
from trak_dist.plan import Plan
from trak_dist.planning import gradient_method
from trak_dist.runtime.computed_rows import check_finite, check_not_all_zero
from trak_dist.runtime.session import Sessions
from trak_dist.store import contents
from trak_dist.store.prepare import prepare_checkpoint, prepare_scores
from trak_dist.store.run import Run

log = logging.getLogger("trak_dist")


class StreamedRun:
    """A run by its directory, and what a process streams into it with.

    Parameters
    ----------
    run_dir : Path
        The run directory.
    model, output, model_digest
        The model on `device`, its output, and what both print.
    requested : TRAKerArguments
        The arguments of the `TRAKer` that determine the run.
    rows : int
        The number of train rows.

    Raises
    ------
    ConfigError
        If the model output does not offer the curvature that is asked for.
    PlanMismatch
        If the run that is there belongs to other arguments.
    """

    def __init__(  # noqa: PLR0913
        self,
        run_dir: Path,
        *,
        model: nn.Module,
        output: ModelOutput,
        model_digest: str,
        device: torch.device,
        requested: arguments.TRAKerArguments,
        rows: int,
    ) -> None:
        self.run_dir, self._device = run_dir, device
        self._model, self._output, self._model_digest = model, output, model_digest
        self._arguments, self._rows, self._sessions = requested, rows, Sessions()
        self._curvatures = tuple(c for c in curvature.offered(output) if c != "fisher")
        requested.check_curvature(self._curvatures)
        self._loss_checked = False
        self.run = self._open() if Run.exists(run_dir) else None  # as last seen

    def refreshed(self) -> Run:
        """The current run with this object's λ, and whatever other processes added to it.

        Raises
        ------
        ModelIDException
            If there is none.
        """
        if not Run.exists(self.run_dir):
            raise ModelIDException(
                "nothing was featurized",
                where=str(self.run_dir),
                next="load_checkpoint and featurize first",
            )
        self.run = streamed_plan.extend_run(self._open(), self._with_reduce)
        return self.run

    def _with_reduce(self, plan: Plan) -> Plan:
        plan = self._arguments.with_reduce(plan)
        known = plan.curvatures or plan.curvature == "none"
        return plan if known else replace(plan, curvatures=self._curvatures)

    def extended(self, change: Callable[[Plan], Plan]) -> Run:
        """The run with its plan changed, also if other processes change it at the same time."""
        self.run = streamed_plan.extend_run(self.run or self._open(), change)
        return self.run

    def with_checkpoint(self, loaded: StreamedCheckpoint) -> Run:
        """The run with a checkpoint in its plan, and arrays for its rows.

        Raises
        ------
        CheckpointError
            If other weights were featurized under its `model_id`.
        """
        run = streamed_plan.extend_run(
            self.run or self._open(),
            lambda plan: streamed_plan.with_checkpoint(plan, loaded.model_id, loaded.path),
        )
        digests.check_weights(run, loaded.model_id, loaded.digest, publish=True)
        for other in digests.ids_by_weights(run).get(loaded.digest, ()):
            if other != loaded.model_id:
                log.warning("model_ids %d and %d have the same weights", other, loaded.model_id)
        prepare_checkpoint(run, loaded.model_id)
        self.run = run  # only now: without a run, the next batch checks the weights again
        return run

    def stream(
        self,
        loaded: StreamedCheckpoint,
        split: str,
        batch: tuple[Any, ...],
        rows: NDArray[np.int64],
    ) -> None:
        """Compute and keep the grads and Q of those rows of a batch that are not there yet.

        Raises
        ------
        ConfigError
            If rows and batch do not fit each other, or other examples are there for these rows.
        """
        loaded.make_ready()
        run, size = self.run or self._create(loaded, batch, rows), examples_in(batch)
        arguments.check_rows(rows, size, run.plan.split(split))
        feed = loaded.streams.get(split)
        if feed is None:
            feed = streamed_rows.RowStream(run, loaded.model_id, split, loaded.digest)
            loaded.streams[split] = feed
        inputs = streamed_rows.row_digests(batch, size)
        left = ~feed.done()[rows]
        feed.check_same_examples(rows[~left], inputs[~left])
        if not left.any():
            return
        if run.plan.curvature == "output" and not self._loss_checked:
            curvature.check_logistic(self._model, self._output, rows_of(batch, slice(2)))
            self._loss_checked = True
        keep = torch.from_numpy(np.flatnonzero(left))
        batch = pytree.tree_map_only(Tensor, lambda t: t[keep.to(t.device)], batch)
        in_plan = loaded.featurizer(run.plan, self._output)
        checks = Audit.sample_for_batch(rows[left], first=not feed.has_written)
        grads, q = self._grads(run.plan, in_plan, batch, rows[left], split, checks)
        loaded.note_weights()
        if not feed.has_written and len(grads) > 1:  # a single row may have a zero gradient
            check_not_all_zero(grads)
        feed.write(rows[left], grads, q, inputs[left])

    def _create(
        self, loaded: StreamedCheckpoint, batch: tuple[Any, ...], rows: NDArray[np.int64]
    ) -> Run:
        """The run, created from the first batch; or the one that another process created.

        Two examples are computed first, so that a mistake in the batch creates no run.
        """
        if not Run.exists(self.run_dir):
            plan, why = self._plan(batch)
            probe = CheckpointFeaturizer(
                plan, loaded.model_id, loaded.digest, self._model, self._output
            )
            self._grads(plan, probe, rows_of(batch, slice(2)), rows[:2], TRAIN, None)
            loaded.note_weights()
            if why:
                log.warning("gradients by %s, %s", plan.gradients, why)
            streamed_plan.create_run(self.run_dir, plan)
        return self.with_checkpoint(loaded)

    def _grads(
        self,
        plan: Plan,
        loaded: CheckpointFeaturizer,
        batch: Any,
        rows: NDArray[np.int64],
        split: str,
        checks: Audit | None,
    ) -> tuple[Tensor, Tensor]:
        """X / √p (batch, k) float32 and Q (batch,) of a batch, all of them finite."""
        batch = pytree.tree_map_only(Tensor, lambda t: t.to(self._device), batch)
        grads = torch.zeros(examples_in(batch), plan.store_dim, device=self._device)
        what = f"checkpoint {loaded.model_id}"
        with worker.cell_numerics(self._device):
            q = loaded.featurize(batch, grads)
            check_finite(
                grads,
                q,
                rows=rows.tolist(),
                split=split,
                what=what,
                bad_label=lambda at: loaded.bad_label(rows_of(batch, slice(at, at + 1))),
            )
            if checks:
                checks.check(loaded, batch, grads, q, lambda at: f"row {rows[at]} of {split!r}")
        return grads, q

    def known(self, run: Run, model_ids: Iterable[int] | None) -> list[int]:
        """Those of the checkpoints that are asked for, all where None is, in order.

        Raises
        ------
        ModelIDException
            If one is not of the run.
        """
        existing = [c.model_id for c in run.plan.checkpoints]
        requested = existing if model_ids is None else list(dict.fromkeys(model_ids))
        unknown = [m for m in requested if m not in existing]
        if unknown or not requested:
            raise ModelIDException(
                f"model_id {unknown[0]} was never featurized; there are {existing}"
                if unknown
                else "no checkpoint was featurized",
                where=str(self.run_dir),
                next="load_checkpoint and featurize first",
            )
        return sorted(requested)

    def make_kernels(self, run: Run, model_ids: Sequence[int]) -> None:
        """Gather the train rows of checkpoints, and make their kernels."""
        self._complete(run, [c for m in model_ids for c in _kernel_cells(run.plan, m)])

    def make_scores(self, run: Run, targets: str) -> None:
        """Make the scores of a target set, and all that they need."""
        prepare_scores(run, [targets])
        cells: list[Cell] = []
        for model_id in run.plan.model_ids:
            prepare_checkpoint(run, model_id)
            cells += _kernel_cells(run.plan, model_id)
            cells += FeaturizeCell.of_split(run.plan, model_id, targets)
            cells.append(PreconditionCell(model_id, targets))
        self._complete(run, [*cells, *ScoreCell.of_targets(run.plan, targets)])

    def _open(self) -> Run:
        run = Run.open(self.run_dir)
        parameters = self._parameters(run.plan.spec)
        self._arguments.check_matches(run, self._rows, parameters, self._model_digest)
        return run

    def _plan(self, batch: tuple[Any, ...]) -> tuple[Plan, str]:
        """A plan by what the first batch shows, and why gradients are not by hooks."""
        whole = pytree.tree_map_only(Tensor, lambda t: t.to(self._device), batch)
        turned = rows_of(whole, list(reversed(range(max(1, examples_in(batch) - 1)))))
        spec = self._arguments.spec()
        with worker.cell_numerics(self._device):
            method, why = gradient_method.select_gradient_method(
                self._model,
                self._output,
                {TRAIN: whole, f"{TRAIN}, turned": turned},
                params=spec.featurize.params,
                requested=spec.featurize.gradients,
            )
        plan = streamed_plan.new_plan(
            spec,
            rows=self._rows,
            parameters=self._parameters(spec),
            model=self._model_digest,
            gradients=method,
            curvatures=self._curvatures,
        )
        return plan, why

    def _complete(self, run: Run, cells: Sequence[Cell]) -> None:
        """Run the cells that are not done; several processes may do so at once."""
        done = run.receipts.done(cells)
        if any(_needs_problem(run.plan, c) for c in cells if c not in done):
            trust.check_trusted(run.plan, run.layout.run_dir)
        ids, run_dir = [cell.id for cell in cells], str(run.layout.run_dir)
        with worker.cell_numerics(self._device):
            worker.run_cells(
                run_dir, run.plan.fingerprint, str(self._device), ids, sessions=self._sessions
            )
        outcome = outcome_of(run, "score", cells)
        for cell, failure in outcome.failed.items():
            singular = failure.error_class == SingularGram.__name__
            raise CellsFailed(
                f"{cell.id}: {failure.error}",
                next=_larger_lambda(run, cell.model_id)
                if isinstance(cell, KernelCell) and singular
                else "",
            )
        if outcome.not_run:
            raise CellsFailed(
                f"{len(outcome.not_run)} cells are not done",
                where=outcome.not_run[0].id,
                next="the same call again",
            )

    def _parameters(self, spec: Spec) -> int:
        return sum(s.numel() for s in select_params(self._model, spec.featurize.params).values())


def _larger_lambda(run: Run, model_id: int) -> str:
    trace = float(contents.read(run, GramCell(model_id), "gram").trace())
    proposed = trace / run.plan.proj_dim * arguments.lambda_unit_factor(run.plan.spec)
    return f"here TRAKer(lambda_reg={proposed:.2g}): the mean of XᵀX's diagonal, in TRAK's units"


def _kernel_cells(plan: Plan, model_id: int) -> list[Cell]:
    grads = FeaturizeCell.of_split(plan, model_id, TRAIN)
    drawn = FisherCell.of_checkpoint(plan, model_id)
    return [*grads, *drawn, GramCell(model_id), KernelCell(model_id)]


def _needs_problem(plan: Plan, cell: Cell) -> bool:
    """Whether it is a cell of the launcher's run, which computes gradients of a problem."""
    if isinstance(cell, FeaturizeCell):
        return not plan.split(cell.split).streamed
    return isinstance(cell, FisherCell)
