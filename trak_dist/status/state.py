"""status: what is done, from receipts; the queue decorates it. Loads neither torch nor zarr."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trak_dist import slurm
from trak_dist.cells import STAGE_STEPS, Cell, FeaturizeCell, of_stage
from trak_dist.errors import SlurmError
from trak_dist.plan import Split
from trak_dist.status.queue import Queue, read_queue
from trak_dist.store.jobs import Jobs
from trak_dist.store.receipts import Failure, Receipt, audited, rows_per_second
from trak_dist.store.run import Run

GRID_COLUMNS = 40
TAIL_LINES = 12
SHOWN = 10  # kinds of failures, lost tasks
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
        """Cells that are not done, that nobody is about to make, and that did not fail."""
        known = {*self.done, *self.failed, *self.running, *self.queued}
        return [c for c in self.cells if c not in known]

    def state(self, cell: Cell) -> str:
        """One of `MARKS`."""
        for name in ("done", "running", "queued", "failed"):
            if cell in getattr(self, name):
                return name
        return "missing"


@dataclass(frozen=True)
class Lost:
    """A task that began, and ended without a word: neither done, nor failed, nor in the queue.

    `worker` says whether its worker began, or it ended in the batch script before.
    """

    cells: tuple[Cell, ...]
    worker: bool
    host: str
    log: Path | None

    @property
    def job_id(self) -> str:
        """Of array 12 task 3: `12_3`; the log is named by it."""
        return "_".join(self.log.name.split("_")[:2]) if self.log else ""


@dataclass(frozen=True)
class Status:
    """The state of a run; `note` says what could not be asked."""

    run: Run
    stages: dict[str, StageStatus]
    queue: Queue
    note: str

    @property
    def complete(self) -> bool:
        """Whether every cell of the plan is done."""
        return all(len(s.cells) == len(s.done) for s in self.stages.values())

    @property
    def failed(self) -> bool:
        """Whether a cell failed, or its task was lost, and nobody is about to make it again."""
        return any(s.failed for s in self.stages.values()) or bool(self.lost)

    @cached_property
    def lost(self) -> list[Lost]:
        """The last tasks that were to make the missing cells, if they began, newest first.

        None where the queue did not answer, since they may run.
        """
        missing = set() if self.note else {c for s in self.stages.values() for c in s.missing}
        failed = {c for s in self.stages.values() for c in s.failed}
        jobs, layout, found = Jobs(self.run), self.run.layout, []
        for number, job in jobs.readable(jobs.numbers()) if missing else ():
            logs = layout.task_logs(number)
            for index in range(len(job.tasks)):
                made = job.cells(index)
                cells = tuple(c for c in made if c in missing)
                attempt = jobs.attempt(str(number), index) if cells else None
                log = logs.get(index) if cells else None
                if attempt or log:
                    missing.difference_update(cells)
                    if any(c in failed for c in made):
                        continue  # what it left out, it left out for that
                    host = str(attempt.job.get("host", "?")) if attempt else "?"
                    found.append(Lost(cells, attempt is not None, host, log))
        return found

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


def read_status(run: Run) -> Status:
    """Read the receipts of `run`, and ask the queue where jobs were ever submitted."""
    jobs, note, queue = Jobs(run), "", Queue()
    if jobs.numbers():
        try:
            queue = read_queue(jobs)
        except SlurmError as error:
            note = f"what is running or queued is not known: {' '.join(error.what.split())}"
    stages = {}
    for name in STAGE_STEPS:
        cells = tuple(of_stage(run.plan, name))
        done = run.receipts.done(cells)
        left = {c for c in cells if c not in done}
        running = left & queue.running
        queued = left & queue.waiting - running
        idle = left - running - queued
        failed = run.receipts.failures(c for c in cells if c in idle)
        stages[name] = StageStatus(cells, done, failed, frozenset(running), frozenset(queued))
    return Status(run, stages, queue, note)


def lines(status: Status) -> list[str]:
    """The report for people: stages, the checkpoint × shard grid, what went wrong."""
    run = status.run
    out = [f"run    {run.layout.run_dir}", f"plan   {run.plan.fingerprint}"]
    layout = run.layout
    members = layout.members()
    if layout.member:
        out += [f"sweep  a member of the run {layout.base}"]
    elif members:
        more = ", …" if len(members) > SHOWN else ""
        named = ", ".join(members[:SHOWN]) + more
        out += [f"sweep  {len(members)} members in {layout.sweeps}: {named}"]
    out += [f"note   {status.note}"] if status.note else []
    heads = ("done", "total", "running", "queued", "failed", "missing", "rows/s", "left")
    out += ["", f"{'stage':<10}" + "".join(f"{head:>9}" for head in heads)]
    for name, stage in status.stages.items():
        counts = (stage.done, stage.cells, stage.running, stage.queued, stage.failed, stage.missing)
        rate = rows_per_second(stage.done.values())
        shown = [
            *(str(len(c)) for c in counts),
            f"{rate:,.0f}" if rate else "",
            _left(status, stage, rate),
        ]
        out.append((f"{name:<10}" + "".join(f"{text:>9}" for text in shown)).rstrip())
    return [
        *out,
        "",
        *_audits(status),
        *_grid(status),
        *_waiting(status),
        *_failures(status),
        *_lost(status),
    ]


def _audits(status: Status) -> Iterator[str]:
    told = audited(status.stages["featurize"].done.values())
    if told:
        yield f"audit  {told}"
    for model_id in status.run.plan.model_ids:
        if why := status.run.receipts.distrusted(model_id):
            yield f"audit  checkpoint {model_id} by loop, since {why}"


def _left(status: Status, stage: StageStatus, rate: float) -> str:
    """Time until what is running and queued is done, if as many tasks go on as run now."""
    cells = {*stage.running, *stage.queued}
    rows = sum(len(c.rows) for c in cells if isinstance(c, FeaturizeCell))
    workers = status.queue.workers(cells)
    if not rate or not rows or not workers:
        return ""
    seconds = rows / rate / workers
    return f"{seconds / 60:,.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _grid(status: Status) -> Iterator[str]:
    plan, stage = status.run.plan, status.stages["featurize"]
    splits = (plan.train, *plan.targets)
    widths = {
        s.name: max(len(s.name), min(GRID_COLUMNS, -(-s.rows // s.cell_rows))) for s in splits
    }
    legend = "  ".join(f"{mark} {name}" for name, mark in reversed(MARKS.items()))
    yield "checkpoint  " + "  ".join(f"{s.name:<{widths[s.name]}}" for s in splits) + f"   {legend}"
    for model_id in plan.model_ids:
        rows = (f"{_marks(stage, model_id, s, status.run):<{widths[s.name]}}" for s in splits)
        yield f"{model_id:<12}" + "  ".join(rows).rstrip()


def _marks(stage: StageStatus, model_id: int, split: Split, run: Run) -> str:
    states = [stage.state(c) for c in FeaturizeCell.of_split(run.plan, model_id, split.name)]
    columns = min(GRID_COLUMNS, len(states))
    parts = (
        states[i * len(states) // columns : (i + 1) * len(states) // columns]
        for i in range(columns)
    )
    return "".join(next(mark for name, mark in MARKS.items() if name in part) for part in parts)


def _waiting(status: Status) -> Iterator[str]:
    reasons: dict[str, int] = {}
    for task, _ in status.queue.tasks:
        if not task.runs:
            reasons[task.reason] = reasons.get(task.reason, 0) + 1
    if reasons:
        told = ", ".join(f"{count} for {reason}" for reason, count in sorted(reasons.items()))
        yield ""
        yield f"tasks waiting in the queue: {told}"


def by_error(failures: Mapping[Cell, Failure]) -> list[list[Cell]]:
    """Failed cells, those with the same error together, in the order of `failures`."""
    alike: dict[str, list[Cell]] = {}
    for cell, failure in failures.items():
        alike.setdefault(failure.error.split("\n")[0], []).append(cell)
    return list(alike.values())


def _failures(status: Status) -> Iterator[str]:
    failures = {c: f for s in status.stages.values() for c, f in s.failed.items()}
    alike = by_error(failures)
    for cells in alike[:SHOWN]:
        failure = failures[cells[0]]
        yield ""
        more = _and(cells[1:], "cells, with the same error")
        yield f"failed {cells[0].id}{more} {_by(failure.job)}"
        yield _indent(failure.error)
        if not failure.expected:
            yield _indent("\n".join(failure.traceback.splitlines()[-TAIL_LINES:]))
    others = sum(map(len, alike[SHOWN:]))
    if others:
        yield ""
        yield f"failed with other errors: {others} cells"


def _lost(status: Status) -> Iterator[str]:
    shown = status.lost[:SHOWN]
    states = slurm.states([task.job_id for task in shown if task.job_id])
    for task in shown:
        job = {"host": task.host, "job_id": task.job_id, "log": task.log}
        ended = "without a word" if task.worker else "before its worker began"
        said = f"; Slurm says {states[task.job_id]}" if task.job_id in states else ""
        yield ""
        yield f"lost   {task.cells[0].id}{_and(task.cells[1:], 'cells')} {_by(job)}"
        yield f"  the task ended {ended}{said}"
        yield from (_indent(line) for line in _tail(task.log))
    if len(status.lost) > SHOWN:
        yield ""
        yield f"lost as well: {len(status.lost) - SHOWN} tasks"


def _and(others: Sequence[Cell], what: str) -> str:
    return f" and {len(others)} more {what}" if others else ""


def _tail(log: Path | None) -> list[str]:
    if log is None:
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        return file.read().decode(errors="replace").splitlines()[-4:]


def _by(job: Mapping[str, Any]) -> str:
    """Who did it: `on n2, job 12_3, attempt 2, log …`."""
    told = [f"on {job.get('host', '?')}"]
    told += [f"job {job['job_id']}"] if job.get("job_id") else []
    told += [f"attempt {job['attempt']}"] if job.get("attempt", 1) != 1 else []
    told += [f"log {job['log']}"] if job.get("log") else []
    return ", ".join(told)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
