"""status: what is done, from receipts, and what is queued. Loads neither torch nor zarr."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trak_dist import graph, slurm
from trak_dist.cells import STAGE_STEPS, Cell, of_stage
from trak_dist.errors import SlurmError
from trak_dist.status.queue import Queue, read_queue
from trak_dist.store.jobs import CONTINUATION, JobRecords
from trak_dist.store.record import Failure, Receipt
from trak_dist.store.run import Run

SHOWN = 10  # kinds of failures, and vanished tasks, that are shown in full
LOG_BYTES, LOG_LINES = 4096, 4  # of the end of a log
# By falling urgency: a mark of the grid that stands for several cells shows the first that applies.
MARKS = {"failed": "!", "missing": "·", "queued": "-", "running": ">", "done": "█"}


@dataclass(frozen=True)
class StageStatus:
    """The cells of one stage, each in one of these states."""

    cells: tuple[Cell, ...]
    done: dict[Cell, Receipt]
    failed: dict[Cell, Failure]
    running: frozenset[Cell]
    queued: frozenset[Cell]

    @property
    def missing(self) -> list[Cell]:
        """Cells that are not done, not queued, and did not fail."""
        known = {*self.done, *self.failed, *self.running, *self.queued}
        return [c for c in self.cells if c not in known]

    def state(self, cell: Cell) -> str:
        """One of `MARKS`."""
        for name in ("done", "running", "queued", "failed"):
            if cell in getattr(self, name):
                return name
        return "missing"


@dataclass(frozen=True)
class VanishedTask:
    """A task that started and vanished: neither done, nor failed, nor in the queue.

    `worker` says whether its worker began, or it ended in the batch script before; `state` what
    Slurm's accounting says of it, and `end` the last lines of its log, both of the first `SHOWN`.
    A continuation job `submits` its cells, and runs none.
    """

    cells: tuple[Cell, ...]
    worker: bool
    host: str
    log: Path | None
    state: str = ""
    end: tuple[str, ...] = ()
    submits: bool = False

    @property
    def job_id(self) -> str:
        """Of array 12 task 3: `12_3`; the log is named by it."""
        return "_".join(self.log.name.split("_")[:2]) if self.log else ""


@dataclass(frozen=True)
class Status:
    """The state of a run, wholly read: to show it takes no further look at disk or queue.

    `note` says what could not be asked, `vanished` are tasks, newest first, `audit_failures` says
    of checkpoints why their gradients are computed one by one, `members` are those of its sweeps.
    """

    run: Run
    stages: dict[str, StageStatus]
    queue: Queue
    note: str
    vanished: tuple[VanishedTask, ...]
    audit_failures: Mapping[int, str]
    members: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every cell of the plan is done."""
        return all(len(s.cells) == len(s.done) for s in self.stages.values())

    @property
    def failed(self) -> bool:
        """Whether a cell failed, or its task vanished, and no task is about to run it again."""
        return any(s.failed for s in self.stages.values()) or bool(self.vanished)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to wait for."""
        return self.complete or not (self.queue.tasks or self.note)

    def json_line(self) -> str:
        """The machine-readable last line of `stage=status`."""
        counts = {
            name: {
                "done": len(s.done),
                "total": len(s.cells),
                "failed": len(s.failed),
                "running": len(s.running),
                "queued": len(s.queued),
            }
            for name, s in self.stages.items()
        }
        return json.dumps({"stage": counts, "complete": self.complete})


def read_status(run: Run, *, previous: Status | None = None) -> Status:
    """Read receipts, records and logs of `run`; ask Slurm where jobs were ever submitted.

    Parameters
    ----------
    previous : Status, optional
        Of the look before this one, while watching: tasks that had vanished are not read again.
    """
    jobs, note, queue = JobRecords(run), "", Queue()
    if jobs.numbers():
        try:
            queue = read_queue(jobs)
        except SlurmError as error:
            note = f"what is running or queued is unknown: {' '.join(error.what.split())}"
    stages = {}
    for name in STAGE_STEPS:
        cells = tuple(of_stage(run.plan, name))
        done = run.receipts.done(cells)
        unfinished = {c for c in cells if c not in done}
        running = unfinished & queue.running
        queued = unfinished & queue.waiting - running
        idle = unfinished - running - queued
        failed = run.receipts.failures(c for c in cells if c in idle)
        stages[name] = StageStatus(cells, done, failed, frozenset(running), frozenset(queued))
    # Where the queue does not answer, they may run.
    vanished = [] if note else _lost(jobs, stages, queue)
    audit_failures = {i: why for i in run.plan.model_ids if (why := run.receipts.audit_failure(i))}
    return Status(
        run=run,
        stages=stages,
        queue=queue,
        note=note,
        vanished=(
            *_described(vanished[:SHOWN], previous.vanished[:SHOWN] if previous else ()),
            *vanished[SHOWN:],
        ),
        audit_failures=audit_failures,
        members=tuple(run.layout.members()),
    )


def _lost(jobs: JobRecords, stages: Mapping[str, StageStatus], queue: Queue) -> list[VanishedTask]:
    """The last tasks that started on missing cells, or were to submit them, newest first."""
    missing = {c for s in stages.values() for c in s.missing}
    failed = {c for s in stages.values() for c in s.failed}
    found = []
    records = list(jobs.readable(jobs.numbers())) if missing else []
    for number, job in records:
        logs = jobs.run.layout.task_logs(number)
        attempt = jobs.attempt(str(number), 0) if job.step == CONTINUATION else None
        if attempt and attempt.fruitless and job not in [j for _, j in queue.tasks]:
            taken = {c for _, j in records if j.launch == job.launch for c in j.all_cells}
            left = (c for name in job.stages for c in stages[name].missing)
            cells = tuple(c for c in left if c in missing and c not in taken)
            missing.difference_update(cells)
            if cells:
                host, log = str(attempt.job.get("host", "?")), logs.get((0, 0))
                found.append(VanishedTask(cells, True, host, log, submits=True))
        places = itertools.product(range(len(job.tasks)), range(job.processes))
        for index, process in places:
            made = graph.share(job.cells(index), process, job.processes)
            cells = tuple(c for c in made if c in missing)
            attempt = jobs.attempt(str(number), index, process) if cells else None
            log = logs.get((index, process)) if cells else None
            if attempt or log:
                missing.difference_update(cells)
                if any(c in failed for c in made):
                    continue  # its other cells were skipped because of that failure
                host = str(attempt.job.get("host", "?")) if attempt else "?"
                found.append(VanishedTask(cells, attempt is not None, host, log))
    return found


def _described(
    vanished: Sequence[VanishedTask], described: Sequence[VanishedTask]
) -> list[VanishedTask]:
    """With what Slurm and the logs say, asked of those only that are not yet `described`."""
    known = {replace(task, state="", end=()): task for task in described}
    states = slurm.states([t.job_id for t in vanished if t.job_id and t not in known])
    return [
        known.get(t) or replace(t, state=states.get(t.job_id, ""), end=_end(t.log))
        for t in vanished
    ]


def _end(log: Path | None) -> tuple[str, ...]:
    if log is None:
        return ()
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_BYTES))
        return tuple(file.read().decode(errors="replace").splitlines()[-LOG_LINES:])
