"""local: worker processes on this machine, through submitit's local executor."""

from __future__ import annotations

import itertools
import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, JobPaths

from trak_dist.errors import TrakDistError
from trak_dist.executors.protocol import CellIds, RunCells
from trak_dist.store import atomic

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
YEAR_MINUTES = 365 * 24 * 60


class LocalExecutor:
    """Distributes tasks over at most `workers` processes; each sees one of the `gpus`, if any.

    Each worker gets one run of neighbouring tasks, so that it loads few checkpoints.
    """

    def __init__(self, *, logs: Path, workers: int, gpus: int, log_variable: str) -> None:
        self._logs, self._workers, self._gpus = logs, workers, gpus
        self._log_variable = log_variable

    def run(self, job: RunCells, tasks: Sequence[CellIds], tick: Callable[[int], None]) -> None:
        """See `Executor`."""
        if not tasks:
            return
        with atomic.write_errors(Path(tempfile.gettempdir())):
            private = tempfile.TemporaryDirectory(prefix="trak_dist-", ignore_cleanup_errors=True)
        with private:
            self._run(job, tasks, tick, Path(private.name))

    def _run(
        self, job: RunCells, tasks: Sequence[CellIds], tick: Callable[[int], None], private: Path
    ) -> None:
        count = min(self._workers, len(tasks))
        bounds = [round(i * len(tasks) / count) for i in range(count + 1)]
        jobs: list[submitit.Job[None]] = []
        try:
            for worker, (start, stop) in enumerate(itertools.pairwise(bounds)):
                cells = [cell for task in tasks[start:stop] for cell in task]
                with atomic.write_errors(self._logs):  # where submitit puts what a worker prints
                    jobs.append(self._submit(job, cells, worker, private))
            while running := sum(not j.done() for j in jobs):
                tick(running)
                time.sleep(POLL_SECONDS)
        except BaseException:
            for j in jobs:
                j.cancel()
            while not all(j.done() for j in jobs):
                time.sleep(POLL_SECONDS)
            raise

    def _submit(
        self, job: RunCells, cells: Sequence[str], worker: int, private: Path
    ) -> submitit.Job[None]:
        logs = self._logs / "local"
        with atomic.write_errors(logs):
            executor = _Local(folder=logs)
        gpus: dict[str, Any] = {}
        if self._gpus:
            gpus = {"gpus_per_node": 1, "visible_gpus": [worker % self._gpus]}
        executor.update_parameters(timeout_min=YEAR_MINUTES, **gpus)
        call = DelayedSubmission(_in_worker, job, cells, logs, self._log_variable)
        return executor.start(call, private)


class _Local(submitit.LocalExecutor):
    """submitit's workers and their logs, but pickles where nobody else can put one."""

    def start(self, call: DelayedSubmission, private: Path) -> submitit.Job[None]:
        """Start a worker that loads `call` from the directory `private`, of this user alone."""
        pickled = private / "call.pkl"
        with atomic.write_errors(pickled):
            call.dump(pickled)
        python = shlex.quote(sys.executable)
        worker: submitit.Job[None] = self._submit_command(
            f"{python} -u -m submitit.core._submit {shlex.quote(str(private))}"
        )
        pickled.rename(JobPaths(private, worker.job_id).submitted_pickle)  # it waits for this
        return worker


def _in_worker(job: RunCells, cells: Sequence[str], logs: Path, log_variable: str) -> None:
    log = JobPaths(logs, submitit.JobEnvironment().job_id).stderr
    os.environ[log_variable] = str(log)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    run_logged(job, cells)


def run_logged(job: RunCells, cells: Sequence[str]) -> None:
    """Run cells; a worker that could not start says why in its log, and the launcher reports it."""
    try:
        job(cells)
    except TrakDistError as error:
        log.error("%s", error)  # noqa: TRY400
