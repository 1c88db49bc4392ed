"""TRAKer: TRAK's own interface, on the store of a run. No Hydra, no Slurm.

`save_dir` is a run directory. Any number of processes may feed any rows of any checkpoint into it
at once, without a coordinator: what each computes is a part of its own, gathered into the run's
chunks when features or scores are finalized (`ingest.streamed_rows`). Kernels and scores are the
cells that `python -m trak_dist.launch` runs, by the same worker; either goes on with what the other
made.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trak_dist import trust, worker
from trak_dist.cells import Cell, FeaturizeCell, GramCell, KernelCell, PreconditionCell, ScoreCell
from trak_dist.checkpoints import digests as checkpoints
from trak_dist.checkpoints import state_dicts
from trak_dist.checkpoints.featurizer import Loaded
from trak_dist.checks.gradient_audit import Audit
from trak_dist.compat import FunctionalGradientComputer
from trak_dist.config import Spec
from trak_dist.coordinates import TRAIN
from trak_dist.datasets import as_batch
from trak_dist.errors import CellsFailed, ConfigError, ModelIDException, SingularGram
from trak_dist.ingest import streamed_plan as feeding
from trak_dist.ingest import streamed_rows as fed
from trak_dist.ingest.streamed_checkpoint import FedCheckpoint
from trak_dist.ops import model_outputs
from trak_dist.ops.batches import examples_in, rows_of
from trak_dist.ops.gradients import select_params
from trak_dist.plan import Plan
from trak_dist.planning import gradient_method as coverage
from trak_dist.runtime.session import Sessions, open_device
from trak_dist.source import model_digest
from trak_dist.stages.featurize import refuse_all_zero, refuse_unusable
from trak_dist.store import contents
from trak_dist.store.prepare import prepare_checkpoint, prepare_scores
from trak_dist.store.results import Results
from trak_dist.store.run import Run

ATTEMPTS = 10  # at scores, while other processes change the plan

log = logging.getLogger("trak_dist")


class TRAKer:
    """Scores of train examples for targets, by TRAK's own calls.

    Parameters
    ----------
    model : torch.nn.Module
        The architecture; its weights are replaced by each checkpoint's.
    task : str or model output
        `image_classification`, `iterative_image_classification`, `text_classification`, or an
        object with `get_output` and `get_out_to_loss_grad`.
    train_set_size : int
        n, the number of train rows.
    save_dir : path
        The run directory. What is there is gone on with; grads are never overwritten.
    device : str or torch.device, optional
        Where gradients and kernels are computed; a GPU if there is one.
    gradient_computer : type
        `FunctionalGradientComputer` or `IterativeGradientComputer`.
    projector : NoOpProjector or BasicProjector, optional
        Left out: a sparse projection to `proj_dim`.
    proj_dim, projector_seed : int, optional
        k ≥ 1, and the seed of the projection; 2048 and 0 for a new run.
    use_half_precision : bool, optional
        Store grads as float16 rows with a scale each, as a new run does, or as float32.
    grad_wrt : iterable of str, optional
        The parameters whose gradients are used; all that require gradients for a new run.
    lambda_reg : float, optional
        λ of (XᵀX + λI)⁻¹, in TRAK's units: its dense projections are larger by √k. 0 for a new run.
    load_from_save_dir, proj_max_batch_size
        Taken, and without effect: nothing here depends on them.
    saver, score_computer
        Must be left out.

    Those of them that are left out come from the run, where there is one already; those that are
    given must agree with it, but for `lambda_reg`.

    Raises
    ------
    ConfigError, PlanMismatch
        If arguments are not valid, or not those of the run in `save_dir`.
    """

    def __init__(  # noqa: PLR0913, PLR0917
        self,
        model: nn.Module,
        task: str | model_outputs.ModelOutput,
        train_set_size: int,
        save_dir: str | Path = "./trak_results",
        load_from_save_dir: bool = True,  # noqa: ARG002
        device: str | torch.device | None = None,
        gradient_computer: type[Any] = FunctionalGradientComputer,
        projector: Any = None,
        saver: None = None,
        score_computer: None = None,
        proj_dim: int | None = None,
        logging_level: int = logging.INFO,
        use_half_precision: bool | None = None,
        proj_max_batch_size: int = 32,  # noqa: ARG002
        projector_seed: int | None = None,
        grad_wrt: Iterable[str] | None = None,
        lambda_reg: float | None = None,
    ) -> None:
        log.setLevel(logging_level)
        self.device = open_device("auto" if device is None else str(device))
        self.model = state_dicts.unwrapped(model).to(self.device)
        self.task = feeding.model_output(task, gradient_computer)
        self._model_digest = model_digest(self.model, self.task if isinstance(task, str) else task)
        self.save_dir = Path(save_dir).absolute()
        self.train_set_size = feeding.whole_number("train_set_size", train_set_size, least=1)
        self._wanted = feeding.Wanted(
            gradient_computer=gradient_computer,
            projector=projector,
            unsupported={"saver": saver, "score_computer": score_computer},
            proj_dim=proj_dim,
            use_half_precision=use_half_precision,
            projector_seed=projector_seed,
            grad_wrt=None if grad_wrt is None else sorted(set(grad_wrt)),
            lambda_reg=None if lambda_reg is None else float(lambda_reg),
        )
        self._sessions = Sessions()
        self._run = self._opened() if Run.exists(self.save_dir) else None
        self._loaded: FedCheckpoint | None = None
        self._experiment = ""
        self._next = {TRAIN: 0}

    # Features -------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint: Mapping[str, Tensor] | str | Path, model_id: int) -> None:
        """Take the weights of a checkpoint: a state dict, or the path of one.

        Raises
        ------
        CheckpointError
            If it does not fit the model, or other weights were featurized under this `model_id`.
        """
        model_id = feeding.whole_number("model_id", model_id, least=0)
        before, self._loaded = self._loaded, None
        loaded = FedCheckpoint(self.model, checkpoint, model_id, before)
        if self._run:
            self._register(self._run, loaded)
        self._loaded = loaded
        self._next = {TRAIN: 0}

    def featurize(
        self,
        batch: Any,
        inds: Any = None,
        num_samples: int | None = None,
    ) -> None:
        """Compute and keep the grads and out-to-loss of a batch of train examples.

        Rows that are there already, from whatever process, are not computed again.

        Parameters
        ----------
        batch : sequence or mapping of tensors
            The arguments of the model output, examples first.
        inds : (batch,) whole numbers
            Their rows in the train set; or
        num_samples : int
            how many there are: the rows that follow those of the last call.

        Raises
        ------
        ConfigError
            If rows and batch do not fit each other.
        NonFiniteGradient
            If a gradient is not finite; nothing of the batch is kept then.
        """
        self._feed(TRAIN, as_batch(batch), inds, num_samples)

    def finalize_features(
        self, model_ids: Iterable[int] | None = None, del_grads: bool = False
    ) -> None:
        """Gather the rows of checkpoints, and make their kernels.

        Raises
        ------
        ModelIDException
            If a checkpoint is unknown, or rows of it are missing.
        SingularGram
            Told by `CellsFailed`, if λ is too small.
        """
        run = self._reopened()
        ids = self._known(run, model_ids)
        for model_id in ids:
            fed.refuse_missing(run, model_id, TRAIN)
            prepare_checkpoint(run, model_id)
        self._complete(run, [c for m in ids for c in _kernel_cells(run.plan, m)])
        if del_grads:
            log.warning("del_grads: the grads are kept, since scores are computed from them")
        self._next = {TRAIN: 0}

    # Scores ---------------------------------------------------------------------------------

    def start_scoring_checkpoint(
        self,
        exp_name: str,
        checkpoint: Mapping[str, Tensor] | str | Path,
        model_id: int,
        num_targets: int,
    ) -> None:
        """Take the weights of a featurized checkpoint, for a set of targets.

        Raises
        ------
        ModelIDException
            If the checkpoint was never featurized.
        ConfigError
            If `exp_name` can't be a name, or has another number of targets.
        """
        self._experiment = ""
        num_targets = feeding.whole_number("num_targets", num_targets, least=1)
        self._known(self._reopened(), [model_id])
        self.load_checkpoint(checkpoint, model_id)
        assert self._run
        self._run = feeding.extended(
            self._run, lambda plan: feeding.with_targets(plan, exp_name, num_targets)
        )
        prepare_checkpoint(self._run, model_id)
        self._experiment = exp_name
        self._next[exp_name] = 0

    def score(
        self,
        batch: Any,
        inds: Any = None,
        num_samples: int | None = None,
    ) -> None:
        """Compute and keep the grads of a batch of targets; see `featurize`."""
        if not self._experiment:
            raise ConfigError(
                "no experiment was begun", where="score", next="start_scoring_checkpoint first"
            )
        self._feed(self._experiment, as_batch(batch), inds, num_samples)

    def finalize_scores(
        self, exp_name: str, model_ids: Iterable[int] | None = None, allow_skip: bool = False
    ) -> NDArray[np.float32]:
        """The scores (n_train, n_targets) float32 of the ensemble; positive ones are helpful.

        They are also the array `store.zarr/scores/<exp_name>` in `save_dir`.

        Parameters
        ----------
        model_ids : iterable of int, optional
            The ensemble; all checkpoints where left out.
        allow_skip : bool
            Leave out, with a warning, checkpoints of which train rows or targets are missing.

        Raises
        ------
        ConfigError
            If there is no such experiment.
        ModelIDException
            If a checkpoint is unknown; if rows or targets of one are missing, naming them.
        """
        run = self._reopened()
        if exp_name not in (split.name for split in run.plan.targets):
            raise ConfigError(
                f"there is no experiment {exp_name!r}: "
                f"{', '.join(s.name for s in run.plan.targets) or 'none was begun'}",
                where="exp_name",
                next="start_scoring_checkpoint and score first",
            )
        chosen = []
        for model_id in self._known(run, model_ids):
            try:
                for split in (TRAIN, exp_name):
                    fed.refuse_missing(run, model_id, split)
                chosen.append(model_id)
            except ModelIDException as error:
                if not allow_skip:
                    raise
                log.warning("skipped: %s", error.what)
        if not chosen:
            raise ModelIDException(
                f"no checkpoint has all rows and targets of {exp_name!r}", where="finalize_scores"
            )
        for again in reversed(range(ATTEMPTS)):
            run = self._reopened()
            run = feeding.extended(run, lambda plan: feeding.with_ensemble(plan, chosen))
            try:
                self._score(run, exp_name)
                break
            except CellsFailed:  # because another process brought a checkpoint or a λ meanwhile?
                if not again or Run.open(self.save_dir).plan == run.plan:
                    raise
        self._run, self._next = run, {TRAIN: 0}
        self.scores = Results(run).scores(exp_name)
        return self.scores

    def _score(self, run: Run, exp_name: str) -> None:
        prepare_scores(run, [exp_name])
        cells: list[Cell] = []
        for model_id in run.plan.model_ids:
            prepare_checkpoint(run, model_id)
            cells += _kernel_cells(run.plan, model_id)
            cells += FeaturizeCell.of_split(run.plan, model_id, exp_name)
            cells.append(PreconditionCell(model_id, exp_name))
        self._complete(run, [*cells, *ScoreCell.of_targets(run.plan, exp_name)])

    # ----------------------------------------------------------------------------------------

    def _feed(self, split: str, batch: tuple[Any, ...], inds: Any, num_samples: int | None) -> None:
        loaded = self._loaded
        if loaded is None:
            raise ModelIDException("no checkpoint is loaded", next="load_checkpoint first")
        size = examples_in(batch)
        first = self._next.get(split, 0)
        rows = _rows(inds, num_samples, first=first)
        if not size and not len(rows):
            return
        loaded.make_ready()
        run = self._run or self._register(self._created(loaded, batch, rows), loaded)
        feeding.refuse_rows(rows, size, run.plan.split(split))
        feed = loaded.feeds.get(split)
        if feed is None:
            feed = loaded.feeds[split] = fed.Feed(run, loaded.model_id, split, loaded.digest)
        inputs = fed.row_digests(batch, size)
        left = ~feed.done()[rows]
        feed.refuse_others(rows[~left], inputs[~left])
        if left.any():
            keep = torch.from_numpy(np.flatnonzero(left))
            batch = pytree.tree_map_only(Tensor, lambda t: t[keep.to(t.device)], batch)
            in_plan = loaded.in_plan(run.plan, self.task)
            checks = Audit.of_call(rows[left], first=not feed.begun)
            grads, q = self._grads(run.plan, in_plan, batch, rows[left], split, checks)
            loaded.note_weights()
            if not feed.begun and len(grads) > 1:  # a single one may have none
                refuse_all_zero(grads)
            feed.write(rows[left], grads, q, inputs[left])
        if num_samples is not None:
            self._next[split] = first + num_samples

    def _grads(
        self,
        plan: Plan,
        loaded: Loaded,
        batch: Any,
        rows: NDArray[np.int64],
        split: str,
        checks: Audit | None,
    ) -> tuple[Tensor, Tensor]:
        """X / √p and Q of a batch, all of them finite."""
        batch = pytree.tree_map_only(Tensor, lambda t: t.to(self.device), batch)
        grads = torch.zeros(examples_in(batch), plan.store_dim, device=self.device)
        what = f"checkpoint {loaded.model_id}"
        with worker.own_numerics(self.device):
            q = loaded.featurize(batch, grads)
            refuse_unusable(grads, q, rows=rows.tolist(), split=split, what=what)
            if checks:
                checks.check(loaded, batch, grads, q, lambda at: f"row {rows[at]} of {split!r}")
        return grads, q

    def _created(
        self, loaded: FedCheckpoint, batch: tuple[Any, ...], rows: NDArray[np.int64]
    ) -> Run:
        """The run, made with what the first batch shows; or the one that another process made.

        Two examples are computed before it is: a mistake in the batch makes no run.
        """
        if not Run.exists(self.save_dir):
            whole = pytree.tree_map_only(Tensor, lambda t: t.to(self.device), batch)
            turned = rows_of(whole, list(reversed(range(max(1, examples_in(batch) - 1)))))
            spec = self._wanted.spec()
            with worker.own_numerics(self.device):
                way, why = coverage.choose(
                    self.model,
                    self.task,
                    {TRAIN: whole, f"{TRAIN}, turned": turned},
                    params=spec.featurize.params,
                    asked=spec.featurize.gradients,
                )
            plan = feeding.new_plan(
                spec,
                rows=self.train_set_size,
                parameters=self._parameters(spec),
                model=self._model_digest,
                gradients=way,
            )
            probe = Loaded(plan, loaded.model_id, loaded.digest, self.model, self.task)
            first = rows_of(batch, slice(2))
            self._grads(plan, probe, first, rows[:2], TRAIN, None)
            loaded.note_weights()
            if why:
                log.warning("gradients by %s, %s", way, why)
            feeding.created(self.save_dir, plan)
        return self._opened()

    def _opened(self) -> Run:
        run = Run.open(self.save_dir)
        parameters = self._parameters(run.plan.spec)
        self._wanted.refuse_other(run, self.train_set_size, parameters, self._model_digest)
        return run

    def _reopened(self) -> Run:
        """The run as it is now, with our λ; whatever else other processes added meanwhile."""
        if not Run.exists(self.save_dir):
            raise ModelIDException(
                "nothing was featurized",
                where=str(self.save_dir),
                next="load_checkpoint and featurize first",
            )
        self._run = feeding.extended(self._opened(), self._wanted.with_lambda)
        return self._run

    def _register(self, run: Run, loaded: FedCheckpoint) -> Run:
        run = feeding.extended(
            run, lambda plan: feeding.with_checkpoint(plan, loaded.model_id, loaded.path)
        )
        checkpoints.refuse_other_weights(run, loaded.model_id, loaded.digest, publish=True)
        for other in checkpoints.twins(run, loaded.model_id, loaded.digest):
            log.warning("model_ids %d and %d have the same weights", other, loaded.model_id)
        prepare_checkpoint(run, loaded.model_id)
        self._run = run
        return run

    def _known(self, run: Run, model_ids: Iterable[int] | None) -> list[int]:
        there = [c.model_id for c in run.plan.checkpoints]
        asked = there if model_ids is None else list(dict.fromkeys(model_ids))
        unknown = [m for m in asked if m not in there]
        if unknown or not asked:
            raise ModelIDException(
                f"model_id {unknown[0]} was never featurized; there are {there}"
                if unknown
                else "no checkpoint was featurized",
                where=str(self.save_dir),
                next="load_checkpoint and featurize first",
            )
        return sorted(asked)

    def _complete(self, run: Run, cells: Sequence[Cell]) -> None:
        """Have the worker run what is not done; several processes may."""
        done = run.receipts.done(cells)
        left = [c.split for c in cells if isinstance(c, FeaturizeCell) and c not in done]
        if not all(
            run.plan.split(name).streamed for name in left
        ):  # a problem's, of the launcher's run
            trust.refuse_foreign(run.plan, run.layout.run_dir)
        with worker.own_numerics(self.device):
            worker.run_cells(
                str(run.layout.run_dir),
                run.plan.fingerprint,
                str(self.device),
                [cell.id for cell in cells],
                sessions=self._sessions,
            )
        done = run.receipts.done(cells)
        missing = [cell for cell in cells if cell not in done]
        failures = run.receipts.failures(missing)
        if failures:
            cell, failure = next(iter(failures.items()))
            singular = failure.error_class == SingularGram.__name__
            raise CellsFailed(
                f"{cell.id}: {failure.error}",
                next=_larger_lambda(run, cell.model_id)
                if isinstance(cell, KernelCell) and singular
                else "",
            )
        if missing:
            raise CellsFailed(
                f"{len(missing)} cells are not done",
                where=missing[0].id,
                next="the same call again",
            )

    def _parameters(self, spec: Spec) -> int:
        return sum(s.numel() for s in select_params(self.model, spec.featurize.params).values())


def _rows(inds: Any, num_samples: int | None, *, first: int) -> NDArray[np.int64]:
    if (inds is None) == (num_samples is None):
        raise ConfigError(
            "exactly one of inds and num_samples is to be given",
            where="featurize, score",
            next="inds: the batch's rows; num_samples: how many there are, in order",
        )
    if num_samples is not None:
        num_samples = feeding.whole_number("num_samples", num_samples, least=0)
        return np.arange(first, first + num_samples)
    rows = np.asarray(inds.cpu() if isinstance(inds, Tensor) else inds).reshape(-1)
    if rows.size and rows.dtype.kind not in "iu":
        raise ConfigError(
            f"inds of dtype {rows.dtype} are not whole numbers",
            where="featurize, score",
            next="inds: the batch's rows in the train set, or among the targets",
        )
    return rows.astype(np.int64)


def _larger_lambda(run: Run, model_id: int) -> str:
    diagonal = float(contents.read(run, GramCell(model_id), "gram").diagonal().mean())
    tried = diagonal * feeding.units_of_lambda(run.plan.spec)
    return f"here TRAKer(lambda_reg={tried:.2g}): the mean of XᵀX's diagonal, in TRAK's units"


def _kernel_cells(plan: Plan, model_id: int) -> list[Cell]:
    return [
        *FeaturizeCell.of_split(plan, model_id, TRAIN),
        GramCell(model_id),
        KernelCell(model_id),
    ]
