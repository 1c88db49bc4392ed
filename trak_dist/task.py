"""One task of a Slurm job: its cells, signals, attempts and exit code.

    python -m trak_dist.task RUN_DIR JOB      task $SLURM_ARRAY_TASK_ID of the run's submitted JOB
    python -m trak_dist.task RUN_DIR STEP     its share of a step's cells, in an array of your own

Exit codes: 0 its cells are done, 1 a cell failed or lacks its inputs, 85 requeue it.
The batch script does the requeueing: it is outside of any container, and no part of the step that
Slurm kills when it requeues.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trak_dist import graph, machine, trust
from trak_dist.cells import STEPS, Cell, runs_problem
from trak_dist.configuration.config import DEVICES, SlurmConfig
from trak_dist.configuration.validation import cluster_from_mapping
from trak_dist.errors import ConfigError, PlanMismatch, StoreError, TrakDistError, WorkerLost
from trak_dist.store.jobs import CONTINUATION, JobRecord, JobRecords
from trak_dist.store.record import Failure
from trak_dist.store.run import Run

log = logging.getLogger(__name__)

DONE, FAILED, REQUEUE = 0, 1, 85
# NFS clients believe a directory's listing for up to 60 s (acdirmax), a file's absence too.
PAUSE_SECONDS, PAUSES = 5.0, 18
DEFAULT_GRACE_SECONDS = 30.0  # where no setting says how long before the end the notice comes


@dataclass(frozen=True)
class Assignment:
    """The cells of one process; its attempts are counted under `name`, `index` and `process`."""

    name: str
    index: int
    fingerprint: str
    cells: tuple[Cell, ...]
    device: str
    grace_seconds: float
    max_attempts: int
    process: int = 0


class TerminationNotice:
    """The notice that Slurm is about to end this task.

    The running cell has `grace_seconds` seconds from then; if it is not finished, the process
    exits, which costs that cell's work and nothing else. It uses a wake-up file and a thread, since
    Python's own handlers wait while the main thread runs C code.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self.grace_seconds = DEFAULT_GRACE_SECONDS
        receiver, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        signal.signal(signal.SIGUSR2, lambda *_: None)
        # Slurm sends it at the start of a grace period too; cells that finish before SIGKILL are
        # kept.
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup.fileno())
        threading.Thread(target=self._wait, args=(receiver,), daemon=True).start()

    def __call__(self) -> bool:
        """Whether the notice came."""
        return self._event.is_set()

    def _wait(self, receiver: socket.socket) -> None:
        while receiver.recv(1)[0] != signal.SIGUSR2:
            pass
        log.warning(
            "Slurm announced the end; the running cell has %.0f s to finish", self.grace_seconds
        )
        self._event.set()
        time.sleep(self.grace_seconds)
        log.warning("the running cell is abandoned, and the task requeued")
        logging.shutdown()
        os._exit(REQUEUE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one task; see the module."""
    termination_notice = TerminationNotice()  # before anything slow is imported
    parser = argparse.ArgumentParser(prog="python -m trak_dist.task", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("what", help=f"number of a submitted job, or one of {', '.join(STEPS)}")
    parser.add_argument("--trust", action="store_true", help="run a problem that others planned")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--max-attempts", type=int, default=SlurmConfig().max_attempts)
    options = parser.parse_args(arguments)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    retry_delays = (PAUSE_SECONDS,) * PAUSES
    try:
        if options.what.isdecimal():
            jobs, job = _submitted_job(options.run_dir, int(options.what), retry_delays)
            if job.step == CONTINUATION:
                return _continue_submission(jobs, job, options.what)
            task = _submitted_assignment(job, options.what)
        else:
            jobs = JobRecords(Run.open(options.run_dir))
            task = _array_share(jobs.run, options)
            if not options.trust and runs_problem([options.what]):
                trust.check_trusted(jobs.run.plan, jobs.run.layout.run_dir)
        termination_notice.grace_seconds = task.grace_seconds
        return _run(jobs, task, termination_notice, retry_delays)
    except TrakDistError as error:
        log.error("%s", error)  # noqa: TRY400
        return FAILED


def _submitted_job(
    run_dir: Path, number: int, retry_delays: Sequence[float]
) -> tuple[JobRecords, JobRecord]:
    """A submitted job, and its run with the plan that it is for, or a later one.

    What is not there yet, or is another plan, is looked at again after each of `retry_delays`.
    """
    waited, delays = 0.0, iter(retry_delays)
    while True:
        try:
            jobs = JobRecords(Run.open(run_dir))
            job = jobs.read(number)
            jobs.check_plan(job)
        except (StoreError, PlanMismatch) as error:
            delay = next(delays, None)
            if delay is None:
                again = f"after retrying for {waited:.0f} s, " if waited else ""
                raise type(error)(
                    again + error.what, where=error.where, next=error.next, errno=error.errno
                ) from None
            time.sleep(delay)
            waited += delay
        else:
            return jobs, job


def _submitted_assignment(job: JobRecord, name: str) -> Assignment:
    index = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    if index >= len(job.tasks):
        raise ConfigError(f"job {name} has {len(job.tasks)} tasks, there is no task {index}")
    settings, process = cluster_from_mapping(job.cluster), machine.step_process()
    return Assignment(
        name=name,
        index=index,
        fingerprint=job.fingerprint,
        cells=graph.share(job.cells(index), process.number, process.count),
        device=job.device,
        grace_seconds=settings.signal_delay / 2,
        max_attempts=settings.max_attempts,
        process=process.number,
    )


def _array_share(run: Run, options: argparse.Namespace) -> Assignment:
    """A contiguous share of all cells, so that it does not depend on what other tasks did."""
    if options.what not in STEPS:
        raise ConfigError(f"{options.what!r} is not a step", next=f"one of {', '.join(STEPS)}")
    get = os.environ.get
    index = int(get("SLURM_ARRAY_TASK_ID", "0")) - int(get("SLURM_ARRAY_TASK_MIN", "0"))
    count = int(get("SLURM_ARRAY_TASK_COUNT", "1"))
    last = int(get("SLURM_ARRAY_TASK_MAX", "0")) - int(get("SLURM_ARRAY_TASK_MIN", "0"))
    if last != count - 1:
        raise ConfigError(
            f"the array has {count} tasks among {last + 1} indices: some shares would be missing",
            next="sbatch --array=0-19 …, without gaps",
        )
    tasks, process = graph.tasks(run.plan, options.what), machine.step_process()
    share = tasks[index * len(tasks) // count : (index + 1) * len(tasks) // count]
    cells = tuple(cell for task in share for cell in task)
    return Assignment(
        name=f"sbatch-{get('SLURM_ARRAY_JOB_ID') or get('SLURM_JOB_ID', 'none')}-{options.what}",
        index=index,
        fingerprint=run.plan.fingerprint,
        cells=graph.share(cells, process.number, process.count),
        device=options.device,
        grace_seconds=DEFAULT_GRACE_SECONDS,
        max_attempts=options.max_attempts,
        process=process.number,
    )


def _run(
    jobs: JobRecords,
    task: Assignment,
    termination_notice: Callable[[], bool],
    retry_delays: Sequence[float],
) -> int:
    run = jobs.run
    done = run.receipts.done(task.cells)
    remaining = [c for c in task.cells if c not in done]
    if not remaining:
        log.info("all %d cells were done before", len(task.cells))
        return DONE
    by = {**machine.process(), "started": time.time()}
    attempt = jobs.begin(task.name, task.index, task.process, done=len(done), by=by)
    log.info("attempt %d: %d of %d cells to do", attempt.number, len(remaining), len(task.cells))
    if attempt.fruitless > task.max_attempts:
        _give_up(run, remaining[0], attempt.fruitless - 1)
        return FAILED

    from trak_dist import worker  # loads torch
    from trak_dist.runtime import session

    cells, process = [c.id for c in task.cells], machine.step_process()
    run_dir = str(run.layout.run_dir)
    device = session.own_gpu(task.device, process.local) if process.count > 1 else task.device
    if worker.run_cells(run_dir, task.fingerprint, device, cells, termination_notice, retry_delays):
        return DONE
    return REQUEUE if termination_notice() else FAILED


def _give_up(run: Run, cell: Cell, attempts: int) -> None:
    error = WorkerLost(
        f"{attempts} attempts in a row ended silently before they finished a cell",
        where=cell.id,
        next="see the log's end; memory (cluster.memory_gb), time (cluster.time), or smaller cells "
        "(featurize.cell_rows, in a new run) may help",
    )
    log.error("%s", error)
    key = cell.key(run.plan)
    failure = Failure(
        cell=cell.id,
        key=key,
        error=str(error),
        error_class=type(error).__name__,
        traceback="",
        expected=True,
        job={**machine.process(), "attempt": attempts},
    )
    run.receipts.fail(cell, failure)


def _continue_submission(jobs: JobRecords, job: JobRecord, name: str) -> int:
    """Submit the rest; an attempt that waits for room until Slurm ends it counts for nothing."""
    from trak_dist import console
    from trak_dist.executors import slurm

    if machine.step_process().number:
        return DONE  # the first one does it
    attempt = jobs.begin_submitting(name, by={**machine.process(), "started": time.time()})
    if attempt.fruitless > cluster_from_mapping(job.cluster).max_attempts:
        raise WorkerLost(
            f"{attempt.fruitless - 1} attempts in a row to submit the rest ended silently",
            where=f"job {name}",
            next="see the log's end, then run the launch command again",
        )
    with _interrupted_by(signal.SIGTERM, signal.SIGUSR2):
        try:
            done = slurm.continue_submission(jobs, job)
        except KeyboardInterrupt:
            jobs.end_submitting(name, attempt)
            return REQUEUE
    jobs.end_submitting(name, attempt)
    console.submitted(jobs.run, done)
    return FAILED if done.blocked else DONE


@contextlib.contextmanager
def _interrupted_by(*signals: signal.Signals) -> Iterator[None]:
    before = [signal.signal(number, signal.default_int_handler) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
