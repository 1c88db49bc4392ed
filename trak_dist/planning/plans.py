"""Make a plan of a problem and a spec, or extend one by what was added to the problem."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import zip_longest

import torch

from trak_dist import datasets
from trak_dist.checkpoints.featurizer import batch_in, model_in
from trak_dist.checks import pinned_model
from trak_dist.configuration.config import Config, Spec
from trak_dist.coordinates import TRAIN
from trak_dist.datasets import apply_limit, check_split
from trak_dist.errors import PlanMismatch
from trak_dist.ops.batches import Batch
from trak_dist.ops.gradients import activation_bytes, select_params
from trak_dist.plan import Plan
from trak_dist.plan_inputs import Source, Split
from trak_dist.planning import gradient_method
from trak_dist.planning.checkpoints import held_names, planned_checkpoints
from trak_dist.planning.curvature import check_fisher_rows, with_curvatures
from trak_dist.planning.dropout import check_dropout, featurized_model
from trak_dist.planning.dry_run import check_labels, first_batch
from trak_dist.planning.splits import planned_split, target_names
from trak_dist.problem import Problem
from trak_dist.runtime.session import built_signature
from trak_dist.source import accept_changes, check_unchanged
from trak_dist.spacing import evenly_spaced

PLANNING_BYTES = 2**30  # of activations that are kept where a run is planned


def make_plan(
    config: Config, problem: Problem, source: Source, *, notify: Callable[[str], None]
) -> Plan:
    """Plan a new run; `notify` gets the reason if gradients are not by hooks.

    Raises
    ------
    DatasetError, CheckpointError, ConfigError
        If a dataset is empty, a checkpoint is missing or unfit, or a target set is unknown.
    """
    spec = config.spec
    shapes = select_params(problem.model, spec.featurize.params)
    parameters = sum(shape.numel() for shape in shapes.values())
    identity = spec.projection.kind == "identity"
    dim = parameters if identity else spec.store_dim
    seeds = config.checkpoints.dropout_seeds
    checkpoints = planned_checkpoints(
        problem,
        config.checkpoints.train,
        source.import_root,
        dropout_seeds=seeds,
        notify=notify,
    )
    # First: a forward pass may leave things in the model.
    unsaved = pinned_model.unsaved_tensors(problem.model, held_names(problem, checkpoints))
    train = planned_split(TRAIN, problem, spec, dim)
    targets = tuple(
        planned_split(n, problem, spec, dim) for n in target_names(problem, config.targets)
    )
    if seeds:
        check_dropout(problem, spec.featurize, seeds, notify=notify)
    model = featurized_model(problem.model, seeds)
    chosen = _select_gradients(
        replace(problem, model=model), spec, (train, *targets), spec.featurize.gradients
    )
    if chosen[1]:
        notify(f"gradients by {chosen[0]}, {chosen[1]}")
    plan = Plan(
        spec=spec,
        source=replace(source, unsaved=unsaved, built=_built_signature(problem, spec, unsaved)),
        parameters=parameters,
        train=train,
        checkpoints=checkpoints,
        targets=targets,
        use=config.checkpoints.ensemble,
        dropout_seeds=seeds,
        self_influence=config.self_influence,
        gradients=chosen[0],
        activations=activation_bytes(
            model_in(spec.featurize.compute, model),
            problem.model_output,
            batch_in(
                spec.featurize.compute, first_batch(problem, problem.dataset(TRAIN), name=TRAIN)
            ),
        ),
    )
    return _with_curvatures(plan, problem)


def extend_plan(
    plan: Plan,
    problem: Problem,
    source: Source,
    *,
    targets: Sequence[str],
    train: int,
    accept_source: bool,
) -> Plan:
    """`plan` with the checkpoints that were added to the problem, and the target sets asked for.

    Parameters
    ----------
    targets : sequence of str
        Target sets asked for; those that are planned stay.
    train : int
        How many checkpoints `stage=train` is to make, if it makes them.
    accept_source : bool
        Whether the user says that an edited file computes the same as the planned one.

    Raises
    ------
    ProblemError, DatasetError, PlanMismatch
        If anything that was planned changed.
    """
    if accept_source:
        plan = replace(plan, source=accept_changes(plan.source, source))
    check_unchanged(plan.spec.problem, plan.source, source)
    what = plan.spec.problem["_target_"]
    pinned_model.check_unsaved(plan.source, problem.model, what=what)
    for split in (plan.train, *plan.targets):
        check_split(problem, split, plan.spec)
    if plan.source.built:
        now = _built_signature(problem, plan.spec, plan.source.unsaved)
        pinned_model.check_built(plan.source, now, what=what)
    known = {s.name for s in plan.targets}
    added = [n for n in target_names(problem, targets) if n not in known] if targets else []
    checkpoints = planned_checkpoints(
        problem,
        train,
        plan.source.import_root,
        dropout_seeds=plan.dropout_seeds,
        notify=lambda _: None,  # it was said when they were planned
    )
    for old, new in zip_longest(plan.checkpoints, checkpoints):
        if old is not None and (new is None or replace(new, digest=old.digest) != old):
            raise PlanMismatch(
                f"checkpoint {old.model_id} was {old.path} when planned, "
                f"{'it is missing' if new is None else f'it is {new.path}'} now",
                where="the problem's checkpoints",
                next="append checkpoints after those that are planned, or use another run_dir",
            )
    splits = tuple(planned_split(n, problem, plan.spec, plan.store_dim) for n in added)
    model = featurized_model(problem.model, plan.dropout_seeds)
    _select_gradients(replace(problem, model=model), plan.spec, splits, plan.gradients)
    joined = (*plan.checkpoints, *checkpoints[len(plan.checkpoints) :])
    plan = replace(plan, checkpoints=joined, targets=(*plan.targets, *splits))
    return plan if plan.spec.reduce.curvature == "none" else _with_curvatures(plan, problem)


def with_gradients(plan: Plan, problem: Problem) -> Plan:
    """`plan` with the gradient method of `featurize.gradients`: all grads are computed again.

    Raises
    ------
    ConfigError
        If they can't be.
    """
    splits = (plan.train, *plan.targets)
    thin = replace(problem, model=featurized_model(problem.model, plan.dropout_seeds))
    method, _ = _select_gradients(thin, plan.spec, splits, plan.spec.featurize.gradients)
    plan = replace(plan, gradients=method)
    return _with_curvatures(plan, problem) if plan.curvature == "fisher" else plan


def _select_gradients(
    problem: Problem, spec: Spec, splits: Sequence[Split], requested: str
) -> tuple[str, str]:
    batches = {n: b for s in splits for n, b in _whole_batches(problem, s, spec).items()}
    params = spec.featurize.params
    return gradient_method.select_gradient_method(
        problem.model, problem.model_output, batches, params=params, requested=requested
    )


def _with_curvatures(plan: Plan, problem: Problem) -> Plan:
    plan = with_curvatures(plan, problem)
    if plan.curvature == "fisher":
        model = featurized_model(problem.model, plan.dropout_seeds)
        batches = _whole_batches(problem, plan.train, plan.spec)
        check_fisher_rows(plan, replace(problem, model=model), batches)
    return plan


def _whole_batches(problem: Problem, split: Split, spec: Spec) -> dict[str, Batch]:
    """Two batches of rows from all over a split, which have each other's in another order.

    As many rows as a worker's batches have, unless their activations are too large to keep here.
    """
    dataset = apply_limit(problem.dataset(split.name), spec.limit)
    held = activation_bytes(
        problem.model.eval(), problem.model_output, first_batch(problem, dataset, name=split.name)
    )
    rows = evenly_spaced(
        split.rows, min(spec.featurize.batch_rows, max(2, PLANNING_BYTES // max(1, held)))
    )
    others = [row if i % 2 else min(row + 1, split.rows - 1) for i, row in enumerate(rows)]
    batches = {}
    for name, some in ((split.name, rows), (f"{split.name}, turned", others[::-1])):
        batches[name] = datasets.batch(problem, dataset, some, name=split.name)
        check_labels(problem, split.name, some, batches[name], spec.featurize)
    return batches


def _built_signature(
    problem: Problem, spec: Spec, unsaved: Collection[str]
) -> dict[str, pinned_model.Numbers]:
    return built_signature(problem, spec, unsaved, torch.device("cpu"))
