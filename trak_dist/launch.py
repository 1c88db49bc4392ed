"""The command line: Hydra → config → plan → executor. Wiring only; nothing a job runs lives here.

    python -m trak_dist.launch [-m] [stage=…] [problem=…] [cluster=…] [run_dir=…] [key=value …]

Exit codes: 0 done, 1 cells failed or are damaged (named), 2 a mistake that the user can mend; of a
sweep (`-m`) the worst one.
"""

from __future__ import annotations

import functools
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig
from rich.console import Console

from trak_dist import graph, machine, needs, settings, sweep, telling
from trak_dist.cells import STAGE_CELLS, STAGE_STEPS, STEPS, Cell
from trak_dist.config import ClusterConfig, Config, SlurmConfig
from trak_dist.errors import MissingInputs, StoreError, TrakDistError
from trak_dist.plan import REDUCE_KEYS, SWEEP_KEYS, Plan
from trak_dist.progress import Progress
from trak_dist.store import atomic
from trak_dist.store.jobs import Jobs
from trak_dist.store.run import Run
from trak_dist.sweep import Task

if TYPE_CHECKING:
    from trak_dist.executors.protocol import Executor

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130
out = Console(soft_wrap=True, highlight=False, markup=False)


def main() -> None:
    """Entry point of `python -m trak_dist.launch` and of `trak-dist`."""
    for ends in (signal.SIGINT, signal.SIGTERM):  # both end local workers too, even under nohup
        signal.signal(ends, signal.default_int_handler)
    try:
        arguments = settings.complete_overrides(sys.argv[1:], Path.cwd())
        overrides = settings.overrides_among(arguments)
        given = settings.given_keys(overrides)
        tasks = sweep.parse(arguments)
        if all(a in overrides or a in settings.MULTIRUN for a in arguments):
            for sample in tasks.samples() if tasks else [overrides]:
                settings.check_overrides(sample)
            if tasks:
                tasks.make_directory()
    except TrakDistError as error:
        _tell(error)
        sys.exit(MISTAKE)
    sys.argv[1:] = arguments

    def launched(config: DictConfig) -> None:
        if tasks is None:
            code = _guarded(config, given)
            if code:
                sys.exit(code)
        elif tasks.run(lambda task: _guarded(config, given, task), out) == INTERRUPTED:
            raise KeyboardInterrupt

    start = hydra.main(version_base="1.3", config_path=str(settings.CONF), config_name="config")
    if tasks is None:
        start(launched)()
        return
    try:
        start(launched)()
    except KeyboardInterrupt:
        tasks.code = INTERRUPTED
    print("\n".join(["", *tasks.lines()]))
    if tasks.code:
        sys.exit(tasks.code)


def _guarded(composed: DictConfig, given: frozenset[str], task: Task | None = None) -> int:
    try:
        return _launch(composed, given, task)
    except TrakDistError as error:
        _tell(error)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted; finished cells are kept: the same command goes on", file=sys.stderr)
        return INTERRUPTED


def _tell(error: TrakDistError) -> None:
    print(f"error: {error}", file=sys.stderr)


def _launch(composed: DictConfig, given: frozenset[str], task: Task | None) -> int:
    mapping = settings.to_mapping(composed)
    run_dir = settings.run_dir(mapping["run_dir"])
    with atomic.told(run_dir):
        run = Run.open(run_dir) if Run.exists(run_dir) else None
    if run is None or task:
        sweep.refuse_nested(run_dir)
    kept: list[str] = []
    if run:
        mapping, kept = settings.merge_with_plan(mapping, run.plan.settings, given)
    if task and "store_dim" not in given:
        kept = [text for text in kept if not text.startswith("store_dim=")]
        mapping["store_dim"], why = task.sweep.store_dim(mapping, run.plan if run else None)
        if why:
            out.print(why)
    if kept and mapping["stage"] not in ("status", "cancel"):
        out.print(f"from the plan: {', '.join(kept)}")
    settings.refuse_missing(mapping)
    config = Config.from_mapping({**mapping, "run_dir": str(run_dir)})
    if config.stage in ("status", "verify", "cancel"):
        run = run or Run.open(run_dir)  # raises, and says how to begin
        plan = _wanted(config, run, SWEEP_KEYS if task else ())
        if task:
            run = sweep.member(run, plan)
            task.run_dir = run.layout.run_dir
        return _look(run, config)
    run, workers = _planned(config, run, given, task)
    if config.stage == "plan":
        return DONE
    stages = [s for s in STAGE_CELLS if config.stage in ("all", s)]
    if isinstance(config.cluster, SlurmConfig):
        if task:
            task.state = "submitted"
        return _submit(run, config.cluster, stages, force=config.force)
    executor = _executor(run, config.cluster, workers)
    _refuse_missing_upstream(run, config.stage)
    for stage in stages:
        if not _run_stage(run, stage, config.cluster, executor):
            return FAILED
    telling.tell_what_next(run)
    return DONE


def _look(run: Run, config: Config) -> int:
    if config.stage == "cancel":
        from trak_dist.stages.queue import cancel

        ids = cancel(Jobs(run))
        out.print(f"cancelled: {', '.join(ids) or 'nothing, no job of this run is in the queue'}")
        return DONE
    if config.stage == "verify":
        return DONE if telling.verify(run, repair=config.repair) else FAILED
    found = telling.watch(run, out) if config.watch else telling.status(run)
    return FAILED if found.failed else DONE


def _submit(run: Run, cluster: SlurmConfig, stages: Sequence[str], *, force: bool) -> int:
    from trak_dist.executors import slurm
    from trak_dist.stages import planning

    rate = functools.partial(planning.trial_rate, run.plan)
    if cluster.dry_run:
        foreseen, scripts = slurm.dry_run(run, cluster, stages, rate=rate)
        telling.submitted(run, foreseen)
        for number, script in enumerate(scripts, 1):
            print(f"\n# <{number}> {'-' * 70}\n{script}")
        return DONE
    telling.submitted(run, slurm.submit(run, cluster, stages, rate=rate, force=force))
    return DONE


# Plan ---------------------------------------------------------------------------------------


def _planned(
    config: Config, base: Run | None, given: frozenset[str], task: Task | None
) -> tuple[Run, int]:
    """The run, made or extended, and how many workers fit; refuses before it writes.

    The task of a sweep makes or extends a member of `base`, if it is not that run itself.
    """
    from trak_dist.stages import planning, truth
    from trak_dist.store.prepare import prepare

    run, run_dir, plan = base, Path(config.run_dir), None
    if base:
        may = SWEEP_KEYS if task else () if base.layout.member else REDUCE_KEYS
        plan = _wanted(config, base, may)
        if task:
            run_dir = sweep.home(base, plan)
            run = Run.open(run_dir) if Run.exists(run_dir) else None
            plan = run.plan if run else plan
        else:
            planning.refuse_scored(base, plan)
    if plan is None or config.stage != "reduce" or settings.given_in("ground_truth", given):
        plan = _plan_with_problem(config, plan, run or base, given)
    planning.refuse_unknown_ids(plan)
    planning.refuse_rank_deficient(plan)
    if config.stage == "evaluate":
        truth.refuse_without_truth(plan)
    workers = _fit_workers(plan, config.cluster)
    there = needs.store_bytes(run.plan) if run else 0
    if base and not run:
        same_grads = base.plan.projection_id == plan.projection_id
        there = needs.truth_bytes(base.plan) + (needs.grads_bytes(plan) if same_grads else 0)
    _refuse_full_disk(run_dir, needs.store_bytes(plan) - there)
    if run is None:
        run = Run.create(run_dir, plan)
    elif plan != run.plan:
        run = run.extend(plan)
    if task:
        task.run_dir = run_dir
    prepare(run)
    truth.publish_masks(run)
    cells = sum(1 for stage in STAGE_CELLS for _ in plan.cells(stage))
    out.print(
        f"plan: {plan.train.rows} train rows, {len(plan.model_ids)} checkpoints, "
        f"{', '.join(f'{s.name} {s.rows}' for s in plan.targets)} targets, p {plan.parameters:,}, "
        f"gradients by {plan.gradients}, {plan.spec.projection.kind} to {plan.proj_dim}, "
        f"{cells} cells, {needs.store_bytes(plan) / 2**20:,.0f} MiB, in {run.layout.run_dir}"
    )
    return run, workers


def _wanted(config: Config, run: Run, may: tuple[str, ...]) -> Plan:
    """The plan of `run` with the settings that are asked for, if they differ only where they may.

    Parameters
    ----------
    may : tuple of str
        How the keys begin that may differ.
    """
    wanted = {**asdict(config.spec), "checkpoints": {"use": config.checkpoints.ensemble}}
    where = str(run.layout.run_dir)
    settings.refuse_other_settings(run.plan.settings, wanted, where=where, may=may)
    plan = run.plan.with_settings(config.spec, config.checkpoints.ensemble)
    if config.checkpoints.allow_missing:
        from trak_dist.stages import planning

        plan, asked = planning.without_missing(run, plan), plan
        if plan.model_ids != asked.model_ids:
            left_out = [i for i in asked.model_ids if i not in plan.model_ids]
            out.print(
                f"not featurized, left out of the ensemble: {left_out}; it is {list(plan.use)}"
            )
    return plan


def _plan_with_problem(
    config: Config, plan: Plan | None, run: Run | None, given: frozenset[str]
) -> Plan:
    from trak_dist import problem as problems
    from trak_dist.stages import planning, truth

    import_root = plan.source.import_root if plan else str(Path.cwd())
    problem, source = problems.build(config.spec.problem, import_root=import_root)
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
    if config.stage != "report":
        planning.check_checkpoints(plan, problem, run)
    asked = settings.given_in("ground_truth", given)
    if asked:
        plan = truth.with_ground_truth(plan, problem, config.ground_truth, asked, tell=out.print)
    return plan


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
        )


# Run ----------------------------------------------------------------------------------------


def _fit_workers(plan: Plan, cluster: ClusterConfig | SlurmConfig) -> int:
    if isinstance(cluster, SlurmConfig):
        memory = int(cluster.memory_gb * 2**30) or sys.maxsize
        return machine.fit_workers(wanted=1, needed=needs.memory(plan), memory=memory)
    threads = max(plan.spec.featurize.threads, plan.spec.reduce.threads)
    return machine.fit_workers(
        wanted=cluster.workers or _gpus(cluster) or max(1, machine.cores() // threads),
        needed=needs.memory(plan),
        memory=int(cluster.memory_gb * 2**30) or machine.memory_bytes(),
    )


def _gpus(cluster: ClusterConfig) -> int:
    import torch

    from trak_dist.stages.session import open_device

    return torch.cuda.device_count() if open_device(cluster.device).type == "cuda" else 0


def _executor(run: Run, cluster: ClusterConfig, workers: int) -> Executor:
    if cluster.kind == "debug":
        from trak_dist.executors.debug import DebugExecutor

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        return DebugExecutor()
    from trak_dist.executors.local import LocalExecutor

    return LocalExecutor(
        logs=run.layout.logs,
        workers=workers,
        gpus=_gpus(cluster),
        log_variable=machine.LOG_VARIABLE,
    )


def _refuse_missing_upstream(run: Run, stage: str) -> None:
    if stage == "all":
        return
    every = [c for step in STEPS for c in graph.cells(run.plan, step)]
    done = run.receipts.done(every)
    own = list(run.plan.cells(stage))
    needed, asking = set[Cell](), own
    while asking:  # what is missing needs others in its turn
        new = {c for cell in asking for c in graph.needs(run.plan, cell, done)} - needed
        needed |= new
        asking = [c for c in new if c not in done]
    needed.difference_update(own)
    for upstream, kinds in STAGE_CELLS.items():
        wanted = [c for c in needed if isinstance(c, kinds)]
        missing = sum(c not in done for c in wanted)
        if missing:
            raise MissingInputs(
                f"stage={stage} needs {upstream}, of which {missing} of {len(wanted)} cells are "
                "missing",
                where=str(run.layout.run_dir),
                next=f"python -m trak_dist.launch stage={upstream} run_dir={run.layout.run_dir}",
            )


def _run_stage(run: Run, stage: str, cluster: ClusterConfig, executor: Executor) -> bool:
    from trak_dist import worker

    job = functools.partial(
        worker.run_cells, str(run.layout.run_dir), run.plan.fingerprint, cluster.device
    )
    phases = [graph.tasks(run.plan, step) for step in STAGE_STEPS[stage]]
    if stage == "train" and not any(phases):
        out.print(f"{stage}: nothing to do, the problem brings its checkpoints")
    for number, phase in enumerate(phases, 1):
        done = run.receipts.done([c for task in phase for c in task])
        tasks = [tuple(c for c in task if c not in done) for task in phase]
        waiting = [c for task in tasks for c in task]
        if not waiting:
            continue
        label = stage if len(phases) == 1 else f"{stage} {number}/{len(phases)}"
        live = out.is_terminal and cluster.kind != "debug"
        with Progress(run, waiting, label=label, console=out, live=live) as progress:
            executor.run(job, [tuple(c.id for c in t) for t in tasks if t], progress.tick)
        if not telling.all_done(run, stage, waiting):
            return False
    return True


if __name__ == "__main__":
    main()
