"""planning: from a problem and a spec to a plan, or from a plan to one with more in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trak_dist import problem as problems
from trak_dist.cells import TRAIN, ScoreCell, check_name
from trak_dist.config import Spec
from trak_dist.errors import CheckpointError, ConfigError, DatasetError, PlanMismatch
from trak_dist.ops.gradients import select_params
from trak_dist.plan import Checkpoint, Plan, Source, Split, cell_rows
from trak_dist.problem import Problem
from trak_dist.stages.checkpoints import check_fit, read_state_dict
from trak_dist.stages.session import check_split, limited, probe
from trak_dist.store.layout import Layout
from trak_dist.store.run import Run


def make_plan(spec: Spec, problem: Problem, source: Source, targets: Sequence[str]) -> Plan:
    """Plan a new run.

    Raises
    ------
    DatasetError, CheckpointError, ConfigError
        If a dataset is empty, a checkpoint is missing or unfit, or a target set is unknown.
    """
    shapes = select_params(problem.model, spec.featurize.params)
    parameters = sum(shape.numel() for shape in shapes.values())
    identity = spec.projection.kind == "identity"
    dim = parameters if identity else spec.store_dim
    return Plan(
        spec=spec,
        source=source,
        parameters=parameters,
        train=_split(TRAIN, problem, spec, dim),
        checkpoints=_checkpoints(problem),
        targets=tuple(_split(n, problem, spec, dim) for n in _target_names(problem, targets)),
    )


def extend_plan(plan: Plan, problem: Problem, source: Source, targets: Sequence[str]) -> Plan:
    """`plan` with the checkpoints that were added to the problem, and the target sets asked for.

    Raises
    ------
    ProblemError, DatasetError, PlanMismatch
        If anything that was planned changed.
    """
    problems.refuse_changed_source(plan.spec.problem, plan.source, source)
    for split in (plan.train, *plan.targets):
        check_split(problem, split, plan.spec.limit)
    known = {s.name for s in plan.targets}
    wanted = () if tuple(targets) == ("all",) else _target_names(problem, targets)
    added = [n for n in wanted if n not in known]
    checkpoints = _checkpoints(problem)
    if checkpoints[: len(plan.checkpoints)] != plan.checkpoints:
        pairs = zip(plan.checkpoints, (*checkpoints, *[None] * len(plan.checkpoints)), strict=False)
        old, new = next((a, b) for a, b in pairs if a != b)
        raise PlanMismatch(
            f"checkpoint {old.model_id} was {old.path} when planned, "
            f"{'it is missing' if new is None else f'it is {new.path}'} now",
            where="the problem's checkpoints",
            next="append checkpoints after those that are planned, or use another run_dir",
        )
    splits = tuple(_split(n, problem, plan.spec, plan.store_dim) for n in added)
    return replace(plan, checkpoints=checkpoints, targets=(*plan.targets, *splits))


def with_reduce(run: Run, spec: Spec) -> Plan:
    """The plan of `run` with another `proj_dim` or `reduce`, if nothing was scored with its own.

    Raises
    ------
    PlanMismatch
        If scores are there that it would replace.
    """
    if run.receipts.done(run.plan.cells_of(ScoreCell)):
        raise PlanMismatch(
            "the run has scores made with another proj_dim or reduce",
            where=str(run.layout.plan),
            next="use another run_dir: the scores that are there are kept",
        )
    return replace(run.plan, spec=spec)


def check_checkpoints(plan: Plan, problem: Problem) -> None:
    """Read every checkpoint that is not ours to train, before anything is queued.

    Raises
    ------
    CheckpointError
        If one is missing, unreadable or unfit.
    """
    for checkpoint in plan.checkpoints:
        path = Path(checkpoint.path)
        if not checkpoint.trained:
            check_fit(read_state_dict(path), problem.model, where=str(path))


def _split(name: str, problem: Problem, spec: Spec, dim: int) -> Split:
    dataset = limited(problem.dataset(name), spec.limit)
    if len(dataset) == 0:
        raise DatasetError(
            f"the dataset {name!r} is empty", where="problem", next="see that its files are found"
        )
    featurize = spec.featurize
    row_bytes = dim * (2 if featurize.dtype == "float16" else 4)
    rows = featurize.cell_rows or cell_rows(
        len(dataset), row_bytes=row_bytes, batch_rows=featurize.batch_rows
    )
    return Split(name, len(dataset), rows, probe(problem, dataset))


def _checkpoints(problem: Problem) -> tuple[Checkpoint, ...]:
    given = problem.checkpoints
    if isinstance(given, int):
        made = tuple(Checkpoint(i, Layout.trained_checkpoint(i), True) for i in range(given))
    else:
        made = tuple(Checkpoint(i, str(Path(p).absolute()), False) for i, p in enumerate(given))
    if not made:
        raise CheckpointError(
            "no checkpoint found: the problem gives none",
            where="problem",
            next="see that the paths that the problem looks for exist",
        )
    return made


def _target_names(problem: Problem, targets: Sequence[str]) -> list[str]:
    names = list(problem.targets) if tuple(targets) == ("all",) else list(targets)
    for name in names:
        check_name(name, what="the target set")
        if name in (TRAIN, "all") or name not in problem.targets:
            raise ConfigError(
                f"the problem has no target set {name!r}",
                where="targets",
                next=f"targets=all, or of {', '.join(problem.targets)}",
            )
    if not names:
        raise ConfigError("the problem has no target sets", where="problem", next="give it some")
    return names
