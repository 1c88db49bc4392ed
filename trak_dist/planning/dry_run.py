"""What is computed of the first examples, before anything is planned or queued."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from trak_dist import building, datasets
from trak_dist import problem as problems
from trak_dist.checkpoints.featurizer import (
    batch_in,
    make_checkpoint_projector,
    make_gradient_computer,
    model_in,
    projecting_sink,
)
from trak_dist.configuration.config import FeaturizeConfig
from trak_dist.coordinates import TRAIN
from trak_dist.errors import DatasetError, ProblemError, TrakDistError
from trak_dist.ops.batches import Batch, examples_in
from trak_dist.ops.gradients import LoopGradients
from trak_dist.ops.model_outputs import bad_label, prepared
from trak_dist.ops.model_state import ModelStateGuard
from trak_dist.plan import Plan, cached_on_plan
from trak_dist.problem import MapDataset, Problem, user_code_errors

TRIAL_SECONDS, TRIAL_BYTES = 0.2, 2**30  # what a trial takes at most, and a batch of it holds


def first_batch(problem: Problem, dataset: MapDataset, *, name: str) -> tuple[Any, ...]:
    """The first examples, as many as it takes to see that each is kept apart: two.

    Raises
    ------
    UnreadableRow
        If they can't be read, or put into one batch.
    """
    return datasets.batch(problem, dataset, range(min(2, len(dataset))), name=name)


def dry_run(problem: Problem, name: str, dataset: MapDataset, spec: FeaturizeConfig) -> None:
    """Compute the first examples' gradients and out-to-loss, before anything is planned.

    Raises
    ------
    ProblemError
        If that fails, with what the user's code said.
    UnreadableRow
        If they can't be read, or the first can't be shown.
    """
    batch, examples = first_batch(problem, dataset, name=name), min(2, len(dataset))
    model = model_in(spec.compute, problem.model.eval())
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    try:
        batch = batch_in(spec.compute, batch)
        LoopGradients(model, problem.model_output, spec.params)(batch, lambda *_: None)
        ready = prepared(problem.model_output, model)
        with torch.no_grad():
            q = ready.get_out_to_loss_grad(model, weights, buffers, batch)
    except TrakDistError as error:
        where = ", ".join(filter(None, (error.where, f"the first examples of {name!r}")))
        raise type(error)(error.what, where=where, next=error.next) from error
    except Exception as error:  # user code may raise anything
        text = " ".join(str(error).split())
        raise ProblemError(
            f"the model output can't be computed on the first examples of {name!r}: "
            f"{type(error).__name__}: {text[:500]}",
            where=f"{type(problem.model_output).__qualname__}, {type(model).__qualname__}",
            next="see docs/your-problem.md on what a batch holds and what a model output gives",
        ) from error
    if q.numel() != examples:
        raise ProblemError(
            f"get_out_to_loss_grad gave {tuple(q.shape)} for {examples} examples of {name!r}",
            where=type(problem.model_output).__qualname__,
            next="it must give one value for each example: no mean over the batch",
        )
    datasets.render_row(problem, name, 0)


def check_labels(
    problem: Problem, name: str, rows: Sequence[int], batch: Batch, spec: FeaturizeConfig
) -> None:
    """Raise `DatasetError` if a label of these rows is none that the model can have."""
    model = model_in(spec.compute, problem.model.eval())
    with user_code_errors(f"computing examples of {name!r}"), ModelStateGuard(model).preserve():
        found = bad_label(problem.model_output, model, batch_in(spec.compute, batch))
    if found:
        raise DatasetError(
            found.of(rows[found.at], name),
            where="problem",
            next="correct the label, leave the row out, or give the model that it is for",
        )


@cached_on_plan
def trial_rate(plan: Plan) -> float:
    """Rows per second of grads on this CPU, of a batch that takes a while or is a worker's own.

    The first pass of a batch, which also allocates and draws, is not counted.
    """
    problem = building.rebuild(plan.spec.problem, plan.source)
    problem = problems.with_random_policy(problem, plan.spec.featurize.random)
    featurize, dataset = plan.spec.featurize, problem.dataset(TRAIN)
    project = make_checkpoint_projector(plan, 0, problem.model)
    model = model_in(featurize.compute, problem.model.eval())
    compute = make_gradient_computer(plan, plan.gradients, model, problem.model_output, project)
    most = TRIAL_BYTES // (plan.activations + 8 * plan.parameters)
    most = max(2, min(featurize.batch_rows, plan.train.rows, most))
    rows, threads = min(2, plan.train.rows), torch.get_num_threads()
    torch.set_num_threads(featurize.threads)
    try:
        while True:
            rows_of = range(min(rows, plan.train.rows))
            batch = batch_in(
                featurize.compute, datasets.batch(problem, dataset, rows_of, name=TRAIN)
            )
            size, seconds = examples_in(batch), 0.0
            for _ in range(2):
                started = time.perf_counter()
                compute(batch, projecting_sink(project, torch.zeros(size, plan.store_dim)))
                seconds = time.perf_counter() - started
            if seconds > TRIAL_SECONDS or rows == most:
                return size / seconds
            rows = min(4 * rows, most)
    finally:
        torch.set_num_threads(threads)
