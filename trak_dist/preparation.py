"""From a configuration to a run on disk: its plan made, extended or refused, its arrays there."""

from __future__ import annotations

import errno
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trak_dist import machine, resources, settings, sweep, telling, trust
from trak_dist.cells import FeaturizeCell, MarginsCell, TrainCell
from trak_dist.config import ClusterConfig, Config, Counterfactuals, SlurmConfig
from trak_dist.errors import ConfigError, StoreError
from trak_dist.plan import GRADIENTS_KEY, REDUCE_KEYS, SWEEP_KEYS, Plan
from trak_dist.store import atomic
from trak_dist.store.run import Run
from trak_dist.sweep import Task
from trak_dist.telling import out
from trak_dist.validation import config_from_mapping


def choose_lambda(mapping: dict[str, Any], run: Run | None) -> str:
    """Put the λ that `auto` stands for into `mapping`; why it is that one, if it is asked for."""
    if mapping["reduce"]["lambda_reg"] != "auto":
        return ""
    from trak_dist.planning import lambda_selection as choice

    other = {**mapping, "reduce": {**mapping["reduce"], "lambda_reg": 1.0}}
    config = config_from_mapping(other)  # all else has to be valid
    found = choice.best_lambda(run, config.spec, config.checkpoints.ensemble)
    mapping["reduce"] = {**mapping["reduce"], "lambda_reg": found.lambda_reg}
    out.print(f"auto: {found.why}")
    return found.why


def prepared(
    config: Config,
    base: Run | None,
    given: frozenset[str],
    task: Task | None,
    lambda_from: str,
    *,
    typed: Mapping[str, Any],
) -> tuple[Run, int]:
    """The run, made or extended, and how many workers fit; refuses before it writes.

    The task of a sweep makes or extends a member of `base`, if it is not that run itself. `typed`
    is the problem that the command line alone says, without the plan.
    """
    from trak_dist import planning
    from trak_dist.evaluation import ground_truth as truth
    from trak_dist.store.prepare import prepare

    run, run_dir, plan = base, Path(config.run_dir), None
    if base:
        may = SWEEP_KEYS if task else () if base.layout.member else (*REDUCE_KEYS, GRADIENTS_KEY)
        plan = wanted(config, base, may)
        if task:
            run_dir = sweep.home(base, plan)
            run = Run.open(run_dir) if Run.exists(run_dir) else None
            # A new member shares the models of the ground truth; counterfactuals would be its own.
            fresh = replace(plan, counterfactuals=Counterfactuals())
            plan = run.plan if run else fresh
            plan = replace(plan, lambda_from=lambda_from or plan.lambda_from)
        else:
            planning.refuse_scored(base, plan)
    if "self_influence" in given and plan:
        plan = replace(plan, self_influence=config.self_influence)
    retrains = settings.given_in("ground_truth", given) or settings.given_in(
        "counterfactuals", given
    )
    other_grads = (
        base is not None and plan is not None and plan.spec.featurize != base.plan.spec.featurize
    )
    if plan is None or config.stage != "reduce" or retrains or other_grads:
        plan = _plan_with_problem(config, plan, run or base, given, typed=typed)
    planning.refuse_unknown_ids(plan)
    planning.refuse_rank_deficient(plan)
    if config.stage == "evaluate":
        truth.refuse_without_truth(plan)
    workers = _fit_workers(plan, config.cluster)
    there = resources.disk_bytes(run.plan) if run else 0
    if base and not run:
        there = resources.disk_bytes(base.plan, (TrainCell, MarginsCell))
        if base.plan.projection_id == plan.projection_id:
            there += FeaturizeCell.disk_bytes(plan)
    _refuse_full_disk(run_dir, resources.disk_bytes(plan) - there)
    if run is None:
        run = Run.create(run_dir, plan)
    elif plan != run.plan:
        run = run.extend(plan)
    if task:
        task.run_dir = run_dir
    prepare(run)
    truth.publish_masks(run)
    telling.planned(run)
    return run, workers


def wanted(config: Config, run: Run, may: tuple[str, ...]) -> Plan:
    """The plan of `run` with the settings that are asked for, if they differ only where they may.

    Parameters
    ----------
    may : tuple of str
        How the keys begin that may differ.
    """
    asked = {**asdict(config.spec), "checkpoints": {"use": config.checkpoints.ensemble}}
    where = str(run.layout.run_dir)
    settings.refuse_other_settings(run.plan.settings, asked, where=where, may=may)
    plan = run.plan.with_settings(config.spec, config.checkpoints.ensemble)
    if config.checkpoints.allow_missing:
        from trak_dist import planning

        plan, whole = planning.without_missing(run, plan), plan
        if plan.model_ids != whole.model_ids:
            left_out = [i for i in whole.model_ids if i not in plan.model_ids]
            out.print(
                f"not featurized, left out of the ensemble: {left_out}; it is {list(plan.use)}"
            )
    return plan


def _plan_with_problem(
    config: Config,
    plan: Plan | None,
    run: Run | None,
    given: frozenset[str],
    *,
    typed: Mapping[str, Any],
) -> Plan:
    from trak_dist import planning
    from trak_dist import problem as problems
    from trak_dist.planning import ground_truth as truth
    from trak_dist.planning.counterfactuals import with_counterfactuals

    spec = plan.spec.problem if plan else config.spec.problem
    import_root = plan.source.import_root if plan else str(Path.cwd())
    said = plan is None or config.trust or config.accept_source
    if plan and run and not said and not trust.planned_here(typed, plan):
        trust.refuse_foreign(plan, run.layout.run_dir)
    elif note := trust.give_word(spec, import_root):
        out.print(note)
    if plan and not plan.has_problem:
        _refuse_what_takes_a_problem(config, given)
        return plan
    problem, source = problems.build(spec, import_root=import_root)
    problem = problems.drawing(problem, config.spec.featurize.random)
    if plan is None:
        plan = planning.make_plan(config, problem, source, tell=out.print)
    else:
        trained = sum(c.trained for c in plan.checkpoints)
        plan = planning.extend_plan(
            plan,
            problem,
            source,
            targets=config.targets if "targets" in given else (),
            train=config.checkpoints.train if "checkpoints.train" in given else trained,
            accept_source=config.accept_source,
        )
    if run and run.plan.spec.featurize != plan.spec.featurize:
        plan = planning.with_gradients(plan, problem)
    if config.stage != "report":
        plan = planning.check_checkpoints(plan, problem, run, out.print)
    if asked := settings.given_in("ground_truth", given):
        layout = run.layout if run else None
        homes = (
            [layout.base, *(layout.sweeps / name for name in layout.members())] if layout else []
        )
        others = [Run.open(home).plan.ground_truth for home in homes]
        plan = truth.with_ground_truth(
            plan, problem, config.ground_truth, asked, others=others, tell=out.print
        )
    plan = replace(plan, mislabelled=problems.flags_digest(problem))
    if asked := settings.given_in("counterfactuals", given):
        plan = with_counterfactuals(plan, problem, config.counterfactuals, asked)
    return plan


def _refuse_what_takes_a_problem(config: Config, given: frozenset[str]) -> None:
    sections = ("ground_truth", "counterfactuals", "targets", "checkpoints.train")
    asked = [key for key in sorted(given) if key.startswith(sections)]
    if asked:
        raise ConfigError(
            f"{', '.join(asked)}: there is no problem here to take it from",
            where=config.run_dir,
            next="the run is fed by TRAKer: more checkpoints and targets come from there",
        )


def _refuse_full_disk(run_dir: Path, needed: int) -> None:
    with atomic.told(run_dir):
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
        wanted, memory = 1, memory or sys.maxsize
    else:
        threads = max(plan.spec.featurize.threads, plan.spec.reduce.threads)
        wanted = cluster.workers or gpus(cluster) or max(1, machine.cores() // threads)
        memory = memory or machine.memory_bytes()
    return resources.fit_workers(plan, wanted=wanted, memory=memory)


def gpus(cluster: ClusterConfig) -> int:
    """GPUs that local workers may use."""
    import torch

    from trak_dist.runtime.session import open_device

    return torch.cuda.device_count() if open_device(cluster.device).type == "cuda" else 0
