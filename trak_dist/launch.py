"""The command line: Hydra → config → plan → executor. Wiring only; nothing a job runs lives here.

    python -m trak_dist.launch [-m] [stage=…] [problem=…] [cluster=…] [run_dir=…] [key=value …]

Exit codes: 0 done, 1 cells failed or are damaged (named), 2 a mistake that the user can mend; of a
sweep (`-m`) the worst one.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from trak_dist import commands, graph, machine, preparation, settings, sweep, telling
from trak_dist.cells import STAGE_STEPS, of_run, of_stage
from trak_dist.config import ClusterConfig, Config, SlurmConfig
from trak_dist.errors import ConfigError, MissingInputs, ProblemError, TrakDistError
from trak_dist.plan import SWEEP_KEYS
from trak_dist.progress import Progress
from trak_dist.store import atomic
from trak_dist.store.jobs import Jobs
from trak_dist.store.run import Run
from trak_dist.sweep import Task
from trak_dist.telling import out
from trak_dist.validation import config_from_mapping

if TYPE_CHECKING:
    from trak_dist.executors.protocol import Executor, Job

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130


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
            try:
                code = _guarded(config, given)
            except Exception:  # a mistake of ours, or of the problem's: told whole
                traceback.print_exc(file=sys.stderr)
                code = FAILED
            if code:
                sys.exit(code)
        elif tasks.run(lambda task: _guarded(config, given, task), out) == INTERRUPTED:
            raise KeyboardInterrupt

    start = hydra.main(version_base="1.3", config_path=str(settings.CONF), config_name="config")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # what it raises is told here, not there
    try:
        with settings.told():
            start(launched)()
    except ConfigError as error:
        _tell(error)
        sys.exit(MISTAKE)
    except KeyboardInterrupt:
        if tasks is None:
            raise
        tasks.code = INTERRUPTED
    if tasks is None:
        return
    print("\n".join(["", *tasks.lines()]))
    if tasks.code:
        sys.exit(tasks.code)


def _guarded(composed: DictConfig, given: frozenset[str], task: Task | None = None) -> int:
    try:
        return _launch(composed, given, task)
    except TrakDistError as error:
        _tell(error)
        return MISTAKE
    except SystemExit as error:  # nothing of ours ends so
        mend = "mend the model, its output or the data: they may raise errors, not end the process"
        _tell(ProblemError(f"the problem's code raised SystemExit: {error}", next=mend))
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted; finished cells are kept: the same command goes on", file=sys.stderr)
        return INTERRUPTED


def _tell(error: TrakDistError) -> None:
    print(telling.plain(f"error: {error}"), file=sys.stderr)


def _launch(composed: DictConfig, given: frozenset[str], task: Task | None) -> int:
    mapping = settings.to_mapping(composed)
    run_dir = settings.run_dir(mapping["run_dir"])
    with atomic.told(run_dir):
        run = Run.open(run_dir) if Run.exists(run_dir) else None
    if run is None or task:
        sweep.refuse_nested(run_dir)
    kept: list[str] = []
    typed = mapping["problem"]
    if run:
        mapping, kept = settings.merge_with_plan(mapping, run.plan.settings, given)
    if task and "store_dim" not in given:
        kept = [text for text in kept if not text.startswith("store_dim=")]
        mapping["store_dim"], why = task.sweep.store_dim(mapping, run.plan if run else None)
        if why:
            out.print(why)
    if kept and mapping["stage"] not in ("status", "cancel"):
        out.print(telling.plain(f"from the plan: {', '.join(kept)}"))
    settings.refuse_missing(mapping)
    mapping["run_dir"] = str(run_dir)
    chosen = preparation.choose_lambda(mapping, run)
    config = config_from_mapping(mapping)
    if config.stage in ("status", "verify", "cancel"):
        run = run or Run.open(run_dir)  # raises, and says how to begin
        plan = preparation.wanted(config, run, SWEEP_KEYS if task else ())
        if task:
            run = sweep.member(run, plan)
            task.run_dir = run.layout.run_dir
        return _look(run, config)
    run, workers = preparation.prepared(config, run, given, task, chosen, typed=typed)
    if config.stage == "plan":
        return DONE
    stages = [s for s in STAGE_STEPS if config.stage in ("all", s)]
    if isinstance(config.cluster, SlurmConfig):
        if task:
            task.state = "submitted"
        return _submit(run, config.cluster, stages, force=config.force)
    executor = _executor(run, config.cluster, workers)
    _refuse_missing_upstream(run, config.stage)
    job = _job(run, config.cluster)
    for stage in stages:
        if not _run_stage(run, stage, config.cluster, executor, job):
            return FAILED
    telling.tell_what_next(run)
    return DONE


def _look(run: Run, config: Config) -> int:
    if config.stage == "cancel":
        from trak_dist.status.queue import cancel

        ids = cancel(Jobs(run))
        out.print(f"cancelled: {', '.join(ids) or 'nothing, no job of this run is in the queue'}")
        return DONE
    if config.stage == "verify":
        return DONE if telling.verify(run, repair=config.repair) else FAILED
    found = telling.watch(run) if config.watch else telling.status(run)
    return FAILED if found.failed else DONE


def _submit(run: Run, cluster: SlurmConfig, stages: Sequence[str], *, force: bool) -> int:
    from trak_dist import planning
    from trak_dist.executors import slurm

    rate = functools.partial(planning.trial_rate, run.plan)
    if cluster.dry_run:
        foreseen, scripts = slurm.dry_run(run, cluster, stages, rate=rate)
        telling.submitted(run, foreseen)
        for number, script in enumerate(scripts, 1):
            print(f"\n# <{number}> {'-' * 70}\n{script}")
        return DONE
    telling.submitted(run, slurm.submit(run, cluster, stages, rate=rate, force=force))
    return DONE


# Run ----------------------------------------------------------------------------------------


def _executor(run: Run, cluster: ClusterConfig, workers: int) -> Executor:
    if cluster.kind == "debug":
        from trak_dist.executors.debug import DebugExecutor

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        return DebugExecutor()
    from trak_dist.executors.local import LocalExecutor

    return LocalExecutor(
        logs=run.layout.logs,
        workers=workers,
        gpus=preparation.gpus(cluster),
        log_variable=machine.LOG_VARIABLE,
    )


def _refuse_missing_upstream(run: Run, stage: str) -> None:
    if stage == "all":
        return
    done = run.receipts.done(of_run(run.plan))
    own = set(of_stage(run.plan, stage))
    needed = graph.upstream(run.plan, own, done) - own
    for upstream, steps in STAGE_STEPS.items():
        wanted = [c for c in needed if c.step in steps]
        missing = sum(c not in done for c in wanted)
        if missing:
            raise MissingInputs(
                f"stage={stage} needs {upstream}, of which {missing} of {len(wanted)} cells are "
                "missing",
                where=str(run.layout.run_dir),
                next=commands.launch(run.layout.run_dir, f"stage={upstream}"),
            )


def _job(run: Run, cluster: ClusterConfig) -> Job:
    """What runs cells: in this process, by one session for all stages."""
    from trak_dist import worker
    from trak_dist.runtime.session import Sessions

    return functools.partial(
        worker.run_cells,
        str(run.layout.run_dir),
        run.plan.fingerprint,
        cluster.device,
        sessions=Sessions(),
    )


def _run_stage(run: Run, stage: str, cluster: ClusterConfig, executor: Executor, job: Job) -> bool:
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
            distrusted = run.receipts.all_distrusted()
            executor.run(job, [tuple(c.id for c in t) for t in tasks if t], progress.tick)
        if run.receipts.all_distrusted() != distrusted:  # cells were taken back, of other tasks too
            return _run_stage(run, stage, cluster, executor, job)
        if not telling.all_done(run, stage, waiting):
            return False
    return True


if __name__ == "__main__":
    main()
