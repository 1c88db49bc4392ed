"""train: make one checkpoint with the problem's own `train_checkpoint`."""

from __future__ import annotations

import safetensors.torch

from trak_dist.cells import TRAIN, TrainCell
from trak_dist.errors import ProblemError
from trak_dist.stages import checkpoints
from trak_dist.stages.outcome import Outcome
from trak_dist.stages.session import Session
from trak_dist.store import atomic


def train(session: Session, cell: TrainCell) -> Outcome:
    """Train from `cell.seed` and publish the state dict.

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
            "the problem gives a number of checkpoints, but no train_checkpoint to make them",
            where="problem",
            next="pass train_checkpoint=…, or the checkpoints' paths",
        )
    state = problem.train_checkpoint(session.dataset(TRAIN), cell.seed, session.device)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    checkpoints.check_fit(state, problem.model, where=cell.id)
    path = session.run.layout.checkpoint(
        session.run.layout.trained_checkpoint(cell.subset, cell.seed)
    )
    session.run.refuse_if_superseded(cell)
    atomic.write(path, safetensors.torch.save(state))
    return Outcome({"checkpoint": checkpoints.content_digest(state)})
