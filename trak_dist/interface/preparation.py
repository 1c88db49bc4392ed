"""From an invocation to a run on disk: its plan made, extended or refused, its arrays there."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trak_dist import machine, resources, trust
from trak_dist.cells import STAGE_STEPS, runs_problem
from trak_dist.configuration.config import (
    ClusterConfig,
    Config,
    Counterfactuals,
    GroundTruth,
    SlurmConfig,
)
from trak_dist.configuration.dotted import differences
from trak_dist.errors import ConfigError, PlanMismatch, StoreError
from trak_dist.interface import members
from trak_dist.interface.invocation import Invocation
from trak_dist.plan import GRADIENTS_KEY, REDUCE_KEYS, SWEEP_KEYS, Plan
from trak_dist.store import atomic
from trak_dist.store.run import Run

Note = Callable[[str], None]
LAMBDA_KEY = "reduce.lambda_reg"


@dataclass(frozen=True)
class Resolved:
    """An invocation merged with the plan of the run that is there, if one is.

    `lambda_from` says how λ was chosen, where the user left that open; `sweep_dims` are the
    dimensions of the sweep that it is one combination of, None outside of a sweep.
    """

    invocation: Invocation
    config: Config
    base: Run | None
    lambda_from: str | None
    sweep_dims: Sequence[int] | None

    @property
    def changeable(self) -> tuple[str, ...]:
        """How the keys begin that may differ from those of the run."""
        if self.sweep_dims is not None:
            return SWEEP_KEYS
        member = self.base is not None and self.base.layout.member
        return () if member else (*REDUCE_KEYS, GRADIENTS_KEY)


@dataclass(frozen=True)
class Prepared:
    """A run whose plan and arrays are on disk, and how many workers fit."""

    run: Run
    config: Config
    workers: int


def resolve(invocation: Invocation, note: Note, *, sweep_dims: Sequence[int] | None) -> Resolved:
    """Merge with the plan of the run that is there.

    Raises
    ------
    ConfigError
        If settings are not valid.
    EvaluationError
        If λ is to be chosen, and there is nothing to choose it from.
    """
    run_dir = invocation.run_dir
    with atomic.write_errors(run_dir):
        base = Run.open(run_dir) if Run.exists(run_dir) else None
    if base is None or sweep_dims is not None:
        members.check_not_nested(run_dir)
    plan = base.plan if base else None
    if sweep_dims is not None and not invocation.names("store_dim"):
        dim, why = members.store_dim(invocation.values(plan), sweep_dims, plan)
        invocation = invocation.with_explicit("store_dim", dim)
        if why:
            note(why)
    from_plan = invocation.from_plan(plan) if plan else []
    if from_plan and invocation.values(plan).get("stage") not in ("status", "cancel"):
        note(f"from the plan: {', '.join(from_plan)}")
    invocation, lambda_from = _with_chosen_lambda(invocation, base, note)
    return Resolved(invocation, invocation.merged(plan), base, lambda_from, sweep_dims)


def open_existing(resolved: Resolved, note: Note) -> Run:
    """The run, or the member of its sweep, that an invocation is about; nothing is planned.

    Raises
    ------
    PlanMismatch, ConfigError
        If there is none, or it has other settings.
    """
    base = resolved.base or Run.open(Path(resolved.config.run_dir))  # raises, says how to begin
    changeable = SWEEP_KEYS if resolved.sweep_dims is not None else ()
    plan = _with_settings(resolved.config, base, changeable, note)
    return members.open_member(base, plan) if resolved.sweep_dims is not None else base


def prepare_run(resolved: Resolved, note: Note) -> Prepared:
    """The run, created or extended, and how many workers fit; all checks precede the first write.

    A combination of a sweep makes or extends a member, if it is not the run itself.
    """
    from trak_dist import planning
    from trak_dist.evaluation import ground_truth as truth
    from trak_dist.store.prepare import prepare

    config, base = resolved.config, resolved.base
    run, plan = base, None
    run_dir = Path(config.run_dir)
    if base:
        plan = _with_settings(config, base, resolved.changeable, note)
        planning.check_curvature(plan)  # before it names a member
        if resolved.sweep_dims is not None:
            run_dir = members.directory(base, plan)
            run = Run.open(run_dir) if Run.exists(run_dir) else None
            # A new member shares the models of the ground truth; counterfactuals would be its own.
            fresh = replace(plan, counterfactuals=Counterfactuals())
            plan = run.plan if run else fresh
            plan = replace(plan, lambda_from=resolved.lambda_from or plan.lambda_from)
        else:
            planning.check_no_scores(base, plan)
    plan = _extended(resolved, run or base, plan, note)
    planning.check_ensemble(plan)
    planning.check_full_rank(plan)
    if config.stage == "evaluate":
        truth.check_has_ground_truth(plan)
    workers = _fit_workers(plan, config.cluster)
    if isinstance(config.cluster, SlurmConfig):
        from trak_dist.interface.time_limit import check_time  # loads submitit

        stages = [stage for stage in STAGE_STEPS if config.stage in ("all", "plan", stage)]
        trial = functools.partial(planning.trial_rate, plan)
        check_time(plan, run, stages, config.cluster, trial)
    existing = resources.disk_bytes(run.plan) if run else 0
    if base and not run:
        existing = resources.shared_bytes(plan, base.plan)
    _check_disk(run_dir, resources.disk_bytes(plan) - existing)
    if run is None:
        run = Run.create(run_dir, plan)
    elif plan != run.plan:
        run = run.extend(plan)
    prepare(run)
    truth.publish_masks(run)
    return Prepared(run, config, workers)


def gpus(cluster: ClusterConfig) -> int:
    """GPUs that local workers may use."""
    import torch

    from trak_dist.runtime.session import open_device

    return torch.cuda.device_count() if open_device(cluster.device).type == "cuda" else 0


def _with_chosen_lambda(
    invocation: Invocation, base: Run | None, note: Note
) -> tuple[Invocation, str | None]:
    """With the λ that `auto` selects, and the reason."""
    plan = base.plan if base else None
    if invocation.values(plan).get(LAMBDA_KEY) != "auto":
        return invocation, None
    from trak_dist.planning import lambda_selection

    other = invocation.with_explicit(LAMBDA_KEY, 1.0).merged(plan)  # all else has to be valid
    found = lambda_selection.select_lambda(base, other.spec, other.checkpoints.ensemble)
    note(f"auto: {found.why}")
    return invocation.with_explicit(LAMBDA_KEY, found.lambda_reg), found.why


def _with_settings(config: Config, run: Run, changeable: tuple[str, ...], note: Note) -> Plan:
    """The plan of `run` with the settings asked for, which differ only where they may."""
    requested = {**asdict(config.spec), "checkpoints": config.checkpoints.planned}
    where = str(run.layout.run_dir)
    found = differences(run.plan.settings, requested)
    if not all(key.startswith(changeable) for key in found):
        listed = "\n".join(
            f"  {k}: {old!r} in the plan, {new!r} now" for k, (old, new) in found.items()
        )
        as_member = all(key.startswith(SWEEP_KEYS) for key in found)
        raise PlanMismatch(
            f"the run directory belongs to another spec:\n{listed}",
            where=where,
            next="leave these settings out to resume this run, "
            + ("add -m to compute with these too, " if as_member else "")
            + "or use another run_dir",
        )
    plan = run.plan.with_settings(config.spec, config.checkpoints.ensemble)
    if config.checkpoints.allow_missing:
        from trak_dist import planning

        plan, whole = planning.without_missing(run, plan), plan
        if plan.model_ids != whole.model_ids:
            left_out = [i for i in whole.model_ids if i not in plan.model_ids]
            note(f"not featurized, left out of the ensemble: {left_out}; it is {list(plan.use)}")
    return plan


def _extended(resolved: Resolved, run: Run | None, plan: Plan | None, note: Note) -> Plan:
    """The plan with all that is asked for; made or extended with the problem, where that is needed.

    `run` is the one whose plan it extends, or the base of a new member.
    """
    invocation, config, base = resolved.invocation, resolved.config, resolved.base
    if plan and invocation.names("self_influence"):
        plan = replace(plan, self_influence=config.self_influence)
    retrains = invocation.names_in("ground_truth") or invocation.names_in("counterfactuals")
    other_grads = plan and base and plan.spec.featurize != base.plan.spec.featurize
    needed = config.stage not in STAGE_STEPS or runs_problem(STAGE_STEPS[config.stage])
    unknown = plan and not plan.curvatures and plan.spec.reduce.curvature != "none"
    if plan and not (needed or retrains or other_grads or unknown):
        return plan
    return _with_problem(resolved, run, plan, note)


def _with_problem(resolved: Resolved, run: Run | None, plan: Plan | None, note: Note) -> Plan:
    from trak_dist import building, planning
    from trak_dist import problem as problems

    invocation, config = resolved.invocation, resolved.config
    spec = plan.spec.problem if plan else config.spec.problem
    import_root = plan.source.import_root if plan else str(Path.cwd())
    recorded = plan is None or config.trust or config.accept_source
    if plan and run and not recorded and not trust.is_planned_here(invocation.problem, plan):
        trust.check_trusted(plan, run.layout.run_dir)
    elif why := trust.record_trust(spec, import_root):
        note(why)
    if plan and not plan.has_problem:
        _check_needs_no_problem(invocation, config, plan.rows_from)
        return plan
    before = machine.resident_bytes()
    problem, source = building.build(spec, import_root=import_root)
    problem = problems.with_random_policy(problem, config.spec.featurize.random)
    known = plan.targets if plan else ()
    if plan is None:
        for found in problems.notes(problem):
            note(found)
        plan = planning.make_plan(config, problem, source, notify=note)
        plan = replace(plan, problem_bytes=max(1, machine.resident_bytes() - before))
    else:
        trained = sum(c.trained for c in plan.checkpoints)
        more = invocation.names("checkpoints.train")
        plan = planning.extend_plan(
            plan,
            problem,
            source,
            targets=config.targets if invocation.names("targets") else (),
            train=config.checkpoints.train if more else trained,
            accept_source=config.accept_source,
        )
        for found in problems.notes(problem) if len(plan.targets) > len(known) else ():
            note(found)
    if run and run.plan.spec.featurize != plan.spec.featurize:
        plan = planning.with_gradients(plan, problem)
    if config.stage != "report":
        plan = planning.check_checkpoints(plan, problem, run, note)
    if requested := invocation.names_in("ground_truth"):
        plan = planning.with_ground_truth(
            plan, problem, config.ground_truth, requested, others=_ground_truths(run), notify=note
        )
    plan = replace(plan, mislabelled=problems.mislabelled_digest(problem))
    if requested := invocation.names_in("counterfactuals"):
        plan = planning.with_counterfactuals(plan, problem, config.counterfactuals, requested)
    return plan


def _ground_truths(run: Run | None) -> list[GroundTruth]:
    """Those of a run and the members of its sweep, which share the models."""
    if run is None:
        return []
    return [Run.open(run_dir).plan.ground_truth for run_dir in run.layout.run_dirs()]


def _check_needs_no_problem(invocation: Invocation, config: Config, rows_from: str) -> None:
    sections = ("ground_truth", "counterfactuals", "targets", "checkpoints.train")
    requested = [key for key in sorted(invocation.explicit) if key.startswith(sections)]
    if requested:
        raise ConfigError(
            f"{', '.join(requested)}: this run has no problem to take it from",
            where=config.run_dir,
            next=f"the rows of this run come from {rows_from}: add checkpoints and targets there",
        )


def _check_disk(run_dir: Path, needed: int) -> None:
    with atomic.write_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        free = atomic.free_bytes(run_dir.absolute())
    if free < needed:
        raise StoreError(
            f"no disk space: the run needs {needed / 2**20:,.0f} MiB, "
            f"{free / 2**20:,.0f} MiB are free",
            where=str(run_dir),
            next="free some space, use another run_dir, or a smaller proj_dim",
            errno=errno.ENOSPC,
        )


def _fit_workers(plan: Plan, cluster: ClusterConfig | SlurmConfig) -> int:
    memory = int(cluster.memory_gb * 2**30)
    if isinstance(cluster, SlurmConfig):
        requested, memory = 1, memory or sys.maxsize
    else:
        threads = max(plan.spec.featurize.threads, plan.spec.reduce.threads)
        requested = cluster.workers or gpus(cluster) or max(1, machine.cores() // threads)
        memory = memory or machine.memory_bytes()
    return resources.fit_workers(plan, requested=requested, memory=memory)
