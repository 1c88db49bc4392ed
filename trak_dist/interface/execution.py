"""Execute a prepared run on its cluster: debug and local to the end, Slurm by submitting it."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from trak_dist import graph, in_process, machine
from trak_dist.cells import STAGE_STEPS, Cell, of_run, of_stage
from trak_dist.configuration.config import ClusterConfig, Config, SlurmConfig
from trak_dist.errors import CellsFailed, MissingInputs
from trak_dist.interface.cost import Cost, estimate
from trak_dist.interface.preparation import Prepared, gpus
from trak_dist.interface.progress import Counter, OnProgress, Progress
from trak_dist.status.state import Status, read_status
from trak_dist.store.record import Failure
from trak_dist.store.run import Run

if TYPE_CHECKING:
    from trak_dist.executors.protocol import Executor, RunCells
    from trak_dist.executors.submission import SubmissionResult

QUEUE_SECONDS = 15.0  # between two looks at Slurm's queue


@dataclass(frozen=True)
class Submission:
    """What was submitted to Slurm: the `result`, and of a dry run their batch `scripts`."""

    result: SubmissionResult
    scripts: tuple[str, ...] = ()

    @property
    def job_ids(self) -> tuple[str, ...]:
        """Of the arrays submitted, and of the job that submits what had no room."""
        ids = [line.job_id for line in self.result.jobs]
        return tuple(i for i in (*ids, self.result.continuation_job) if i)

    @property
    def pending(self) -> int:
        """How many cells are in the queue, or are still to be submitted."""
        submitted = sum(line.cells for line in self.result.jobs)
        return submitted + self.result.already_queued + self.result.deferred_cells


@dataclass(frozen=True)
class Outcome:
    """How an execution ended.

    Parameters
    ----------
    run_dir : Path
        The run.
    stage : str
        The last stage that ran: where cells failed, the first that is not complete.
    cells : int
        How many cells its last step had to run.
    failed : mapping of cells to failures
        The cells that failed: `failure.error`, `failure.traceback`, `failure.job`.
    not_run : tuple of cells
        Those that are not done, and left no error: their worker was killed, or lacked inputs.
    pending : int
        How many cells Slurm has still to run.
    submission : Submission, optional
        What was submitted to Slurm.
    """

    run_dir: Path
    stage: str
    cells: int = 0
    failed: Mapping[Cell, Failure] = field(default_factory=dict)
    not_run: tuple[Cell, ...] = ()
    pending: int = 0
    submission: Submission | None = None

    @property
    def complete(self) -> bool:
        """Whether all cells are done."""
        return not (self.failed or self.not_run or self.pending)

    def raise_for_failures(self) -> None:
        """Raise `CellsFailed`, with the first error, if cells are not done and none is queued."""
        again = "the same call again after fixing the cause: finished cells are kept"
        for cell, failure in self.failed.items():
            where = str(failure.job.get("log") or cell.id)
            count = len(self.failed) + len(self.not_run)
            more = f" ({count} of {self.cells} cells are not done)" if count > 1 else ""
            raise CellsFailed(f"{cell.id}{more}: {failure.error}", where=where, next=again)
        if self.not_run:
            what = f"{len(self.not_run)} of {self.cells} cells are not done, {self.not_run[0].id}"
            raise CellsFailed(f"{what} first", where=str(self.run_dir), next=again)


def stages_of(config: Config) -> list[str]:
    """The stages that an execution runs."""
    return [stage for stage in STAGE_STEPS if config.stage in ("all", stage)]


def execute(
    prepared: Prepared, *, on_progress: OnProgress | None = None, wait: bool = False
) -> Outcome:
    """Run the stages that were asked for, of `plan` none; finished cells are not run again.

    Parameters
    ----------
    wait : bool
        On Slurm, until nothing of the run is in the queue.

    Raises
    ------
    MissingInputs
        If a single stage was asked for, and those before it are not complete.
    SlurmError
        If Slurm is not there or refuses a job.
    """
    run, config = prepared.run, prepared.config
    stages = stages_of(config)
    outcome = Outcome(run.layout.run_dir, config.stage)
    if not stages:
        return outcome
    if isinstance(config.cluster, SlurmConfig):
        outcome = _submit(run, config, config.cluster)
        return _waited(prepared, outcome, on_progress) if wait else outcome
    _check_upstream(run, config.stage)
    execution = _Execution(run, config.cluster, prepared.workers, on_progress)
    with execution.numerics():
        for stage in stages:
            outcome = execution.run_stage(stage)
            if not outcome.complete:
                break
    return outcome


def cost_of(prepared: Prepared) -> Cost:
    """An estimate of what the cells that are missing will cost; of `plan` those of all stages."""
    from trak_dist import planning

    run, config = prepared.run, prepared.config
    return estimate(
        run.plan,
        stages_of(config) or list(STAGE_STEPS),
        config.cluster,
        done=run.receipts.done(of_run(run.plan)),
        trial=functools.partial(planning.trial_rate, run.plan),
        workers=prepared.workers,
        gpus=0 if isinstance(config.cluster, SlurmConfig) else gpus(config.cluster),
    )


@dataclass(frozen=True)
class _Execution:
    """Stages run one after another, on this machine."""

    run: Run
    cluster: ClusterConfig
    workers: int
    on_progress: OnProgress | None

    def numerics(self) -> AbstractContextManager[None]:
        """Cells in this process leave its threads, flags and random numbers as they were."""
        if self.cluster.kind != "debug":
            return nullcontext()
        from trak_dist import worker
        from trak_dist.runtime.session import open_device

        return worker.cell_numerics(open_device(self.cluster.device))

    def run_stage(self, stage: str) -> Outcome:
        run = self.run
        made = (graph.tasks(run.plan, step) for step in STAGE_STEPS[stage])
        steps = [tasks for tasks in made if tasks]
        outcome = Outcome(run.layout.run_dir, stage)
        for number, step in enumerate(steps, 1):
            done = run.receipts.done([cell for task in step for cell in task])
            tasks = [tuple(cell for cell in task if cell not in done) for task in step]
            waiting = [cell for task in tasks for cell in task]
            if not waiting:
                continue
            failed_before = run.receipts.failed_audits()
            label = stage if len(steps) == 1 else f"{stage} {number}/{len(steps)}"
            with Counter(run, waiting, step=label, report=self.on_progress) as counter:
                ids = [tuple(cell.id for cell in task) for task in tasks if task]
                self._executor().run(self._job, ids, counter.tick)
            if run.receipts.failed_audits() != failed_before:
                return self.run_stage(stage)  # cells were revoked, of other tasks too
            outcome = outcome_of(run, stage, waiting)
            if not outcome.complete:
                break
        return outcome

    @cached_property
    def _job(self) -> RunCells:
        """What runs cells: in this process, by one session for all stages."""
        from trak_dist import worker
        from trak_dist.runtime.session import Sessions

        return functools.partial(
            worker.run_cells,
            str(self.run.layout.run_dir),
            self.run.plan.fingerprint,
            self.cluster.device,
            sessions=Sessions(),
        )

    def _executor(self) -> Executor:
        if self.cluster.kind == "debug":
            from trak_dist.executors.debug import DebugExecutor

            return DebugExecutor()
        from trak_dist.executors.local import LocalExecutor

        return LocalExecutor(
            logs=self.run.layout.logs,
            workers=self.workers,
            gpus=gpus(self.cluster),
            log_variable=machine.LOG_VARIABLE,
        )


def outcome_of(run: Run, stage: str, cells: Sequence[Cell]) -> Outcome:
    """What became of cells that are not at work any more."""
    done = run.receipts.done(cells)
    missing = [cell for cell in cells if cell not in done]
    failed = run.receipts.failures(missing)
    silent = tuple(cell for cell in missing if cell not in failed)
    return Outcome(run.layout.run_dir, stage, len(cells), failed, silent)


def _check_upstream(run: Run, stage: str) -> None:
    if stage == "all":
        return
    done = run.progress().done
    own = set(of_stage(run.plan, stage))
    needed = graph.upstream(run.plan, own, done) - own
    for upstream, steps in STAGE_STEPS.items():
        requested = [c for c in needed if c.step in steps]
        missing = sum(c not in done for c in requested)
        if missing:
            raise MissingInputs(
                f"stage={stage} needs {upstream}, of which {missing} of {len(requested)} cells are "
                "missing",
                where=str(run.layout.run_dir),
                next=in_process.command(run.layout.run_dir, run.plan, f"stage={upstream}"),
            )


# Slurm --------------------------------------------------------------------------------------


def _submit(run: Run, config: Config, cluster: SlurmConfig) -> Outcome:
    from trak_dist import planning
    from trak_dist.executors import slurm

    stages = stages_of(config)
    rate = functools.partial(planning.trial_rate, run.plan)
    if cluster.dry_run:
        result, scripts = slurm.dry_run(run, cluster, stages, rate=rate)
        submission = Submission(result, tuple(scripts))
    else:
        result = slurm.submit(run, cluster, stages, rate=rate, force=config.force)
        submission = Submission(result)
    return Outcome(
        run.layout.run_dir,
        config.stage,
        not_run=tuple(submission.result.blocked),
        pending=submission.pending,
        submission=submission,
    )


def _waited(prepared: Prepared, outcome: Outcome, on_progress: OnProgress | None) -> Outcome:
    """`outcome`, once the queue has no task of the run."""
    run, started = prepared.run, time.monotonic()
    report = on_progress or (lambda _: None)
    status: Status | None = None
    while not (status := read_status(run, previous=status)).idle:
        for progress in _progress(status, time.monotonic() - started):
            report(progress)
        time.sleep(QUEUE_SECONDS)
    cells = [cell for stage in stages_of(prepared.config) for cell in of_stage(run.plan, stage)]
    return replace(outcome_of(run, outcome.stage, cells), submission=outcome.submission)


def _progress(status: Status, seconds: float) -> Iterator[Progress]:
    for name, stage in status.stages.items():
        if len(stage.done) < len(stage.cells):
            yield Progress(
                step=name,
                done=len(stage.done),
                failed=len(stage.failed),
                running=len(stage.running),
                total=len(stage.cells),
                rows_per_second=stage.rows_per_second or None,
                seconds=seconds,
            )
