"""TRAKer: TRAK's own interface, on the store of a run. No Hydra, no Slurm.

`save_dir` is a run directory. Any number of processes may stream any rows of any checkpoint into it
at once, without a coordinator: what each computes is a part of its own, gathered into the run's
chunks when features or scores are finalized (`ingest.streamed_rows`). Kernels and scores are the
cells that `python -m trak_dist.launch` runs, by the same worker; either resumes from what the other
made.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trak_dist.checkpoints import state_dicts
from trak_dist.compat import FunctionalGradientComputer
from trak_dist.coordinates import TRAIN
from trak_dist.datasets import as_batch
from trak_dist.errors import CellsFailed, ConfigError, ModelIDException
from trak_dist.ingest import arguments, streamed_plan, streamed_rows
from trak_dist.ingest.streamed_checkpoint import StreamedCheckpoint
from trak_dist.ops import model_outputs
from trak_dist.ops.batches import examples_in
from trak_dist.runtime.session import open_device
from trak_dist.source import model_digest
from trak_dist.store.prepare import prepare_checkpoint
from trak_dist.store.results import Results
from trak_dist.store.run import Run
from trak_dist.streamed_run import StreamedRun

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
        object with `get_output` and `get_out_to_loss_grad`; for CLIP `trak_dist.CLIP(contrast=…)`.
    train_set_size : int
        n, the number of train rows.
    save_dir : path
        The run directory. What is there is resumed; grads are never overwritten.
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
    curvature : str, optional
        `none` for TRAK's kernel (XᵀX + λI)⁻¹, as a new run has it; `output` for
        (XᵀWX + λI)⁻¹ with each row weighted by Q(1 − Q), for classification.
    load_from_save_dir, proj_max_batch_size
        Taken, and without effect: nothing here depends on them.
    saver, score_computer
        Must be left out.

    Arguments that are left out come from the run, if there is one; the others must agree with it,
    except `lambda_reg` and `curvature`.

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
        curvature: str | None = None,
    ) -> None:
        log.setLevel(logging_level)
        self.device = open_device("auto" if device is None else str(device))
        self.model = state_dicts.unwrapped(model).to(self.device)
        self.task = arguments.model_output(task, gradient_computer)
        self.save_dir = Path(save_dir).absolute()
        self.train_set_size = arguments.check_whole_number(
            "train_set_size", train_set_size, minimum=1
        )
        requested = arguments.TRAKerArguments(
            gradient_computer=gradient_computer,
            projector=projector,
            unsupported={"saver": saver, "score_computer": score_computer},
            proj_dim=proj_dim,
            use_half_precision=use_half_precision,
            projector_seed=projector_seed,
            grad_wrt=None if grad_wrt is None else sorted(set(grad_wrt)),
            lambda_reg=None if lambda_reg is None else float(lambda_reg),
            curvature=curvature,
        )
        self._streamed = StreamedRun(
            self.save_dir,
            model=self.model,
            output=self.task,
            model_digest=model_digest(self.model, self.task if isinstance(task, str) else task),
            device=self.device,
            requested=requested,
            rows=self.train_set_size,
        )
        self._checkpoint: StreamedCheckpoint | None = None
        self._experiment = ""
        self._next_row = {TRAIN: 0}

    # Features -------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint: Mapping[str, Tensor] | str | Path, model_id: int) -> None:
        """Load the weights of a checkpoint: a state dict, or the path of one.

        Raises
        ------
        CheckpointError
            If it does not fit the model, or other weights were featurized under this `model_id`.
        """
        model_id = arguments.check_whole_number("model_id", model_id, minimum=0)
        before, self._checkpoint = self._checkpoint, None
        loaded = StreamedCheckpoint(self.model, checkpoint, model_id, before)
        if self._streamed.run:
            self._streamed.with_checkpoint(loaded)
        self._checkpoint = loaded
        self._next_row = {TRAIN: 0}

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
        self._ingest(TRAIN, as_batch(batch), inds, num_samples)

    def finalize_features(
        self, model_ids: Iterable[int] | None = None, del_grads: bool = False
    ) -> None:
        """Gather the rows of checkpoints, and make their kernels.

        Raises
        ------
        ModelIDException
            If a checkpoint is unknown, or rows of it are missing.
        CellsFailed
            If a kernel can't be made, with the error: a `SingularGram` where λ is too small.
        """
        run = self._streamed.refreshed()
        ids = self._streamed.known(run, model_ids)
        for model_id in ids:
            streamed_rows.check_rows_present(run, model_id, TRAIN)
            prepare_checkpoint(run, model_id)
        self._streamed.make_kernels(run, ids)
        if del_grads:
            log.warning("del_grads: the grads are kept, since scores are computed from them")
        self._next_row = {TRAIN: 0}

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
        num_targets = arguments.check_whole_number("num_targets", num_targets, minimum=1)
        self._streamed.known(self._streamed.refreshed(), [model_id])
        self.load_checkpoint(checkpoint, model_id)
        run = self._streamed.extended(
            lambda plan: streamed_plan.with_targets(plan, exp_name, num_targets)
        )
        prepare_checkpoint(run, model_id)
        self._experiment = exp_name
        self._next_row[exp_name] = 0

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
        self._ingest(self._experiment, as_batch(batch), inds, num_samples)

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
        run = self._streamed.refreshed()
        if exp_name not in (split.name for split in run.plan.targets):
            raise ConfigError(
                f"there is no experiment {exp_name!r}: "
                f"{', '.join(s.name for s in run.plan.targets) or 'none was begun'}",
                where="exp_name",
                next="start_scoring_checkpoint and score first",
            )
        chosen = streamed_rows.complete(
            run, self._streamed.known(run, model_ids), (TRAIN, exp_name), allow_skip=allow_skip
        )
        for again in reversed(range(ATTEMPTS)):
            self._streamed.refreshed()
            run = self._streamed.extended(lambda plan: streamed_plan.with_ensemble(plan, chosen))
            try:
                self._streamed.make_scores(run, exp_name)
                break
            # because another process added a checkpoint or changed λ meanwhile?
            except CellsFailed:
                if not again or Run.open(self.save_dir).plan == run.plan:
                    raise
        self._next_row = {TRAIN: 0}
        self.scores = Results(run).scores(exp_name)
        return self.scores

    def _ingest(
        self, split: str, batch: tuple[Any, ...], inds: Any, num_samples: int | None
    ) -> None:
        loaded = self._checkpoint
        if loaded is None:
            raise ModelIDException("no checkpoint is loaded", next="load_checkpoint first")
        size, first = examples_in(batch), self._next_row.get(split, 0)
        rows = arguments.rows_of_call(inds, num_samples, first=first)
        if not size and not len(rows):
            return
        self._streamed.stream(loaded, split, batch, rows)
        if num_samples is not None:
            self._next_row[split] = first + num_samples
