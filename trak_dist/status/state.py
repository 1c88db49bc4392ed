"""status: what is done, from receipts, and what is queued. Loads neither torch nor zarr."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trak_dist import graph, slurm
from trak_dist.cell_map import CellMap, Chosen, Kinds
from trak_dist.cells import STAGE_STEPS, STEPS, Cell
from trak_dist.errors import SlurmError
from trak_dist.status.queue import Queue, cells_of, read_queue
from trak_dist.store.jobs import CONTINUATION, JobRecords
from trak_dist.store.progress import with_failure
from trak_dist.store.record import Failure
from trak_dist.store.run import Run

SHOWN = 10  # kinds of failures, and vanished tasks, that are shown in full
LOG_BYTES, LOG_LINES = 4096, 4  # of the end of a log
# By falling urgency: a mark of the grid that stands for several cells shows the first that applies.
MARKS = {"failed": "!", "missing": "·", "queued": "-", "running": ">", "done": "█"}
FAILED, MISSING, QUEUED, RUNNING, DONE = STATES = range(1, 1 + len(MARKS))


@dataclass(frozen=True)
class StageStatus:
    """The cells of one stage by their state, one of `STATES`; missing ones did not fail.

    `rows_per_second` is that of one worker (0 where none was measured), `audit_summary` what the
    audits of its cells found.
    """

    states: CellMap
    kinds: Kinds
    failed: Mapping[Cell, Failure]
    rows_per_second: float
    audit_summary: str

    @property
    def cells(self) -> Chosen:
        """All of them."""
        return self.states.where(*STATES, kinds=self.kinds)

    @property
    def done(self) -> Chosen:
        """Those with a receipt of this plan."""
        return self.states.where(DONE, kinds=self.kinds)

    @property
    def running(self) -> Chosen:
        """Those of tasks that have begun."""
        return self.states.where(RUNNING, kinds=self.kinds)

    @property
    def queued(self) -> Chosen:
        """Those of tasks that have not."""
        return self.states.where(QUEUED, kinds=self.kinds)

    @property
    def missing(self) -> Chosen:
        """Those that are not done, not queued, and did not fail."""
        return self.states.where(MISSING, kinds=self.kinds)


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
    progress, states = run.progress(), CellMap(run.plan, fill=MISSING)
    for task, job in sorted(queue.tasks, key=lambda queued: queued[0].has_started):
        states.mark(cells_of(task, job), RUNNING if task.has_started else QUEUED)
    states.mark(progress.done, DONE)
    recorded = with_failure(run.layout, run.plan)
    failed = run.receipts.failures(cell for cell in recorded if states[cell] == MISSING)
    states.mark(failed, FAILED)
    stages = {}
    for name, steps in STAGE_STEPS.items():
        kinds = tuple(kind for step in steps for kind in STEPS[step])
        stages[name] = StageStatus(
            states,
            kinds,
            {cell: failure for cell, failure in failed.items() if type(cell) in kinds},
            progress.rows_per_second(kinds),
            progress.audit_summary(kinds),
        )
    # Where the queue does not answer, they may run.
    vanished = [] if note else _lost(jobs, states, queue)
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


def _lost(jobs: JobRecords, states: CellMap, queue: Queue) -> list[VanishedTask]:
    """The last tasks that started on missing cells, or were to submit them, newest first."""
    plan, found = jobs.run.plan, list[VanishedTask]()
    missing = CellMap(plan)
    for own, numbers in zip(missing.arrays, states.arrays, strict=True):
        own[:] = numbers == MISSING
    records = list(jobs.readable(jobs.numbers())) if missing else []
    for number, job in records:
        logs = jobs.run.layout.task_logs(number)
        attempt = jobs.attempt(str(number), 0) if job.step == CONTINUATION else None
        if attempt and attempt.fruitless and job not in [j for _, j in queue.tasks]:
            taken = CellMap.of(plan, *(j.all_cells for _, j in records if j.launch == job.launch))
            steps = [step for name in job.stages for step in STAGE_STEPS[name]]
            cells = tuple(c for c in missing if c.step in steps and c not in taken)
            missing.mark(cells, 0)
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
                missing.mark(cells, 0)
                if any(states[c] == FAILED for c in made):
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
