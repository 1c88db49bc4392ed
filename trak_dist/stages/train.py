"""train: checkpoints made by the problem's own `train_checkpoint`, and the ground truth of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Subset

from trak_dist.cells import MarginsCell, TrainCell
from trak_dist.checkpoints import digests, state_dicts
from trak_dist.coordinates import FULL, TRAIN
from trak_dist.errors import NonFiniteGradient, ProblemError
from trak_dist.ops import draws
from trak_dist.ops.gradients import outputs
from trak_dist.runtime.cell_result import CellResult
from trak_dist.runtime.inputs import require
from trak_dist.runtime.session import Session
from trak_dist.store import atomic, contents

SEEDS = 0x7FFFFFFF  # a bit mask: what torch and numpy both take


def train(session: Session, cell: TrainCell) -> CellResult:
    """Train from `cell.seed` on the rows of `cell.subset` and publish the state dict.

    Raises
    ------
    ProblemError
        If the problem has no `train_checkpoint`.
    CheckpointError
        If what it returned does not fit the problem's model.
    """
    run, rows, seed = session.run, None, cell.seed
    if cell.subset != FULL:
        rows = draws.subset(int(cell.subset), run.plan.train.rows, run.plan.ground_truth.alpha)
        # Unlike any other model's: what subsets share must be their rows alone.
        seed = draws.stream_key("retrain", cell.subset, cell.seed) & SEEDS
    state = fit(session, rows, seed, where=cell.id)
    path = run.layout.file(cell, "checkpoint")
    run.check_not_superseded(cell)
    atomic.write(path, safetensors.torch.save(state))
    return CellResult({"checkpoint": digests.content_digest(state)})


def margins(session: Session, cell: MarginsCell) -> CellResult:
    """Write the model outputs f(z; θ) of a retrained model on one target set.

    Raises
    ------
    MissingInputs
        If the model is not trained yet.
    NonFiniteGradient
        If an output is NaN or infinite.
    """
    run = session.run
    trained = TrainCell(cell.subset, cell.seed)
    require(run, [trained], needed_by=cell)
    path = run.layout.file(trained, "checkpoint")
    model = session.problem.model
    state = state_dicts.fit_state_dict(state_dicts.read(path), model, where=str(path)).state
    hint = "ground_truth.seeds or .subsets of what is finished evaluates without this model"
    found = outputs_of(session, state, cell.targets, where=cell.id, hint=hint)
    return CellResult(contents.write(run, cell, {"margins": found[None]}))


def fit(
    session: Session, rows: Int64[Tensor, " rows"] | None, seed: int, *, where: str
) -> dict[str, Tensor]:
    """The state dict of a model trained on some rows of the train set (`None`: on all).

    Raises
    ------
    ProblemError, CheckpointError
        As `train` does.
    """
    problem, dataset = session.problem, session.dataset(TRAIN)
    if problem.train_checkpoint is None:
        raise ProblemError(
            "models are to be trained, but the problem has no train_checkpoint",
            where="problem",
            next="pass train_checkpoint=…; or give paths, and no ground_truth.subsets",
        )
    if rows is not None:
        dataset = Subset(dataset, rows.tolist())  # type: ignore[arg-type]
    state = problem.train_checkpoint(dataset, seed, session.device)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    return state_dicts.fit_state_dict(state, problem.model, where=where).state


def outputs_of(
    session: Session, state: Mapping[str, Tensor], targets: str, *, where: str, hint: str
) -> NDArray[np.float32]:
    """The model outputs f(z; θ) of one state dict on one target set (targets,).

    Raises
    ------
    NonFiniteGradient
        If an output is NaN or infinite.
    """
    problem = session.problem
    model = copy.deepcopy(problem.model)  # the session's own holds a checkpoint of the ensemble
    model.load_state_dict(state, strict=False)  # it fits: what it lacks is frozen, or tied
    model.to(session.device).eval()
    batches = session.batches(targets, range(session.run.plan.split(targets).rows))
    with torch.no_grad():
        values = [outputs(model, problem.model_output, session.to_device(b)).cpu() for b in batches]
    found: NDArray[np.float32] = torch.cat(values).float().numpy()
    if not np.isfinite(found).all():
        raise NonFiniteGradient(
            f"non-finite model output for {int((~np.isfinite(found)).sum())} of {len(found)} "
            f"targets of {targets!r}",
            where=where,
            next="see that training on a share of the rows converges, and that labels are classes; "
            f"{hint}",
        )
    return found
