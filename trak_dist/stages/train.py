"""train: checkpoints made by the problem's own `train_checkpoint`, and the ground truth of them."""

from __future__ import annotations

import copy

import numpy as np
import safetensors.torch
import torch
from torch.utils.data import Subset

from trak_dist.cells import FULL, TRAIN, MarginsCell, Rows, TrainCell
from trak_dist.errors import NonFiniteGradient, ProblemError
from trak_dist.ops import draws
from trak_dist.ops.gradients import outputs
from trak_dist.problem import MapDataset
from trak_dist.stages import checkpoints
from trak_dist.stages.outcome import Outcome
from trak_dist.stages.reduce import require
from trak_dist.stages.session import Session
from trak_dist.store import atomic, contents


def train(session: Session, cell: TrainCell) -> Outcome:
    """Train from `cell.seed` on the rows of `cell.subset` and publish the state dict.

    Raises
    ------
    ProblemError
        If the problem has no `train_checkpoint`.
    CheckpointError
        If what it returned does not fit the problem's model.
    """
    problem = session.problem
    if problem.train_checkpoint is None:
        raise ProblemError(
            "checkpoints are to be trained, but the problem has no train_checkpoint",
            where="problem",
            next="pass train_checkpoint=…; or give paths, and no ground_truth.subsets",
        )
    dataset, seed = _data_and_seed(session, cell)
    state = problem.train_checkpoint(dataset, seed, session.device)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    checkpoints.check_fit(state, problem.model, where=cell.id)
    path = session.run.layout.checkpoint(
        session.run.layout.trained_checkpoint(cell.subset, cell.seed)
    )
    session.run.refuse_if_superseded(cell)
    atomic.write(path, safetensors.torch.save(state))
    return Outcome({"checkpoint": checkpoints.content_digest(state)})


def _data_and_seed(session: Session, cell: TrainCell) -> tuple[MapDataset, int]:
    """The whole train set and the seed as it is; or a subset's rows, and a seed of its own."""
    dataset = session.dataset(TRAIN)
    if cell.subset == FULL:
        return dataset, cell.seed
    plan = session.run.plan
    rows = draws.subset(int(cell.subset), plan.train.rows, plan.ground_truth.alpha)
    subset: Subset[object] = Subset(dataset, rows.tolist())  # type: ignore[arg-type]
    # Unlike any other model's: what subsets share must be their rows alone.
    return subset, draws.stream_key("retrain", cell.subset, cell.seed) & 0x7FFFFFFF


def margins(session: Session, cell: MarginsCell) -> Outcome:
    """Write the model outputs f(z; θ) of a retrained model on one target set.

    Raises
    ------
    MissingInputs
        If the model is not trained yet.
    NonFiniteGradient
        If an output is NaN or infinite.
    """
    run, problem = session.run, session.problem
    require(run, [TrainCell(cell.subset, cell.seed)], needed_by=cell)
    path = run.layout.checkpoint(run.layout.trained_checkpoint(cell.subset, cell.seed))
    state = checkpoints.read_state_dict(path)
    model = copy.deepcopy(problem.model)  # the session's own holds a checkpoint of the ensemble
    checkpoints.check_fit(state, model, where=str(path))
    model.load_state_dict(state)
    model.to(session.device).eval()
    batches = session.batches(cell.targets, Rows(0, run.plan.split(cell.targets).rows))
    with torch.no_grad():
        values = [outputs(model, problem.model_output, session.to_device(b)).cpu() for b in batches]
    found = torch.cat(values).float().numpy()
    if not np.isfinite(found).all():
        raise NonFiniteGradient(
            f"non-finite model output for {int((~np.isfinite(found)).sum())} of {len(found)} "
            f"targets of {cell.targets!r}",
            where=cell.id,
            next="see that training on a share of the rows converges, and that labels are classes",
        )
    return Outcome(contents.write(run, cell, {"margins": found[None]}))
