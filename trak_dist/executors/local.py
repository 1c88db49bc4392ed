"""local: worker processes on this machine, through submitit's local executor."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import submitit

from trak_dist.errors import TrakDistError
from trak_dist.executors.protocol import Job, Task
from trak_dist.store import atomic

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
YEAR_MINUTES = 365 * 24 * 60


class LocalExecutor:
    """Deals tasks to at most `workers` processes, each of which sees one of the `gpus`, if any.

    Each worker gets one run of neighbouring tasks, so that it loads few checkpoints.
    """

    def __init__(self, *, logs: Path, workers: int, gpus: int, log_variable: str) -> None:
        self._logs, self._workers, self._gpus = logs, workers, gpus
        self._log_variable = log_variable

    def run(self, job: Job, tasks: Sequence[Task], tick: Callable[[], None]) -> None:
        """See `Executor`."""
        if not tasks:
            return
        count = min(self._workers, len(tasks))
        bounds = [round(i * len(tasks) / count) for i in range(count + 1)]
        jobs: list[submitit.Job[None]] = []
        try:
            for worker, (start, stop) in enumerate(itertools.pairwise(bounds)):
                cells = [cell for task in tasks[start:stop] for cell in task]
                with atomic.told(self._logs):  # where submitit puts what it hands over
                    jobs.append(self._submit(job, cells, worker))
            while not all(j.done() for j in jobs):
                tick()
                time.sleep(POLL_SECONDS)
        except BaseException:
            for j in jobs:
                j.cancel()
            while not all(j.done() for j in jobs):
                time.sleep(POLL_SECONDS)
            raise

    def _submit(self, job: Job, cells: Sequence[str], worker: int) -> submitit.Job[None]:
        executor = submitit.LocalExecutor(folder=self._logs / "local")
        gpus: dict[str, Any] = {}
        if self._gpus:
            gpus = {"gpus_per_node": 1, "visible_gpus": [worker % self._gpus]}
        executor.update_parameters(timeout_min=YEAR_MINUTES, **gpus)
        return executor.submit(_in_worker, job, cells, self._log_variable)


def _in_worker(job: Job, cells: Sequence[str], log_variable: str) -> None:
    os.environ[log_variable] = str(submitit.JobEnvironment().paths.stderr)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    work(job, cells)


def work(job: Job, cells: Sequence[str]) -> None:
    """Run cells; that a worker could not even begin is in its log, and told by the launcher."""
    try:
        job(cells)
    except TrakDistError as error:
        log.error("%s", error)  # noqa: TRY400
