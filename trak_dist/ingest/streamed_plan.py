"""The plan of a run with streamed rows: checkpoints and target sets are added as they come."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from trak_dist.configuration.config import Spec
from trak_dist.coordinates import TRAIN, check_name
from trak_dist.errors import ConfigError, PlanMismatch
from trak_dist.plan import Plan
from trak_dist.plan_inputs import Checkpoint, Source, Split, Streamed, planned_cell_rows
from trak_dist.store.run import Run


def new_plan(
    spec: Spec,
    *,
    rows: int,
    parameters: int,
    model: str,
    gradients: str,
    curvatures: tuple[str, ...] = (),
) -> Plan:
    """A plan without checkpoints and target sets, for a train split whose rows are streamed."""
    dim = parameters if spec.projection.kind == "identity" else spec.store_dim
    return Plan(
        spec=spec,
        source=Source(file="", model=model, import_root=""),
        parameters=parameters,
        train=Split(TRAIN, rows, planned_cell_rows(rows, spec, dim), Streamed()),
        checkpoints=(),
        targets=(),
        gradients=gradients,
        curvatures=curvatures,
    )


def with_checkpoint(plan: Plan, model_id: int, path: str | None) -> Plan:
    """`plan` with a checkpoint, in order of `model_id`; the ensemble is all of them again.

    Raises
    ------
    ConfigError
        If it is the plan of a problem, which provides its own checkpoints, or has dropout masks.
    """
    if plan.dropout_seeds:
        raise ConfigError(
            "the models of this run have dropout masks (checkpoints.dropout_seeds="
            f"{plan.dropout_seeds}), which are not made here",
            where="save_dir",
            next="launch the run for more targets or checkpoints, or use another save_dir",
        )
    if any(c.model_id == model_id for c in plan.checkpoints):
        return plan
    if plan.has_problem:
        raise ConfigError(
            f"model_id {model_id} is not of this run, whose problem provides its checkpoints: "
            f"{[c.model_id for c in plan.checkpoints]}",
            where="model_id",
            next="launch the run with that checkpoint in its problem, or use another save_dir",
        )
    joined = [*plan.checkpoints, Checkpoint(model_id, path, trained=False)]
    return replace(plan, checkpoints=tuple(sorted(joined, key=lambda c: c.model_id)), use=())


def with_ensemble(plan: Plan, model_ids: Sequence[int]) -> Plan:
    """`plan` with these checkpoints as the ensemble."""
    all_of_them = len(model_ids) == len(plan.checkpoints)
    return replace(plan, use=() if all_of_them else tuple(model_ids))


def with_targets(plan: Plan, name: str, rows: int) -> Plan:
    """`plan` with a target set.

    Raises
    ------
    ConfigError
        If it is there with another number of targets, or the name can't be one.
    """
    check_name(name, what="the experiment")
    if name == TRAIN:
        raise ConfigError(
            f"an experiment can't be called {TRAIN!r}", where="exp_name", next="another name"
        )
    existing = next((s for s in plan.targets if s.name == name), None)
    if existing and existing.rows != rows:
        raise ConfigError(
            f"experiment {name!r} has {existing.rows} targets, not {rows}",
            where="num_targets",
            next=f"num_targets={existing.rows}, or another exp_name",
        )
    if existing:
        return plan
    split = Split(name, rows, planned_cell_rows(rows, plan.spec, plan.store_dim), Streamed())
    return replace(plan, targets=(*plan.targets, split))


def create_run(run_dir: Path, plan: Plan) -> None:
    """Publish the plan of a new run, unless another process was first."""
    with contextlib.suppress(PlanMismatch):
        Run.create(run_dir, plan)


def extend_run(run: Run, change: Callable[[Plan], Plan]) -> Run:
    """`run` with its plan changed, also if other processes change it at the same time."""
    while True:
        run = Run.open(run.layout.run_dir)
        plan = change(run.plan)
        if plan == run.plan:
            return run
        with contextlib.suppress(PlanMismatch):  # another process was first: extend its plan
            return run.extend(plan)
