"""Job records: what each job array was submitted to do, and the last attempts at its tasks.

Written before submission and never changed, so that a task finds its cells by index even if the
plan is extended. Needs no zarr and no torch. What is done is in the receipts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from trak_dist import decoding
from trak_dist.cell_map import CellMap
from trak_dist.cells import STAGE_STEPS, STEPS, Cell, parse_cell
from trak_dist.configuration.config import DEVICES
from trak_dist.configuration.structuring import structure, unstructure
from trak_dist.coordinates import check_name
from trak_dist.errors import PlanMismatch, StoreError
from trak_dist.plan import digest
from trak_dist.store import atomic
from trak_dist.store.layout import Layout
from trak_dist.store.run import Run

log = logging.getLogger(__name__)

CONTINUATION = "submit"  # the step of a job that submits what the queue had no room for


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """An array of tasks, or a job of step `submit`, which has none.

    `launch` names the command that it came from: of one command each cell is submitted once.
    `cluster` and `stages` are what the command was given, `device` is what follows for this step;
    `member` names the member of a sweep that it is for, `generation` is that of its plan,
    `plan` the digest of its file, and `processes` how many share each task.
    """

    launch: str
    step: str = field(metadata={"choices": (*STEPS, CONTINUATION)})
    fingerprint: str
    device: str = field(metadata={"choices": DEVICES})
    tasks: tuple[tuple[str, ...], ...]
    cluster: Mapping[str, Any]
    stages: tuple[str, ...]
    member: str = ""
    generation: int = 0
    plan: str = ""
    processes: int = field(default=1, metadata={"min": 1})

    def cells(self, index: int) -> tuple[Cell, ...]:
        """The cells of one task; of a task that there is not, none."""
        return tuple(parse_cell(cell_id) for task in self.tasks[index:][:1] for cell_id in task)

    @property
    def all_cells(self) -> Iterator[Cell]:
        """The cells of all tasks."""
        return (cell for index in range(len(self.tasks)) for cell in self.cells(index))

    @classmethod
    def from_json(cls, text: bytes) -> JobRecord:
        """Read back a job; raise `ValueError` if it is none."""
        job = structure(cls, decoding.mapping(text), "it is no job:")
        for cell_id in (c for task in job.tasks for c in task):
            parse_cell(cell_id)
        if job.member:
            check_name(job.member, what="the member")  # it names a directory
        if not set(job.stages) <= set(STAGE_STEPS):
            raise ValueError(f"stages {list(job.stages)} are none")
        return job


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """The start of an attempt at a task.

    `fruitless` counts the attempts in a row, this one included, that began without progress since
    the last; `done` is how many of the task's cells were done when it began. A continuation job's
    progress is the jobs that there are; ended in order, it has no fruitless attempts.
    """

    number: int
    fruitless: int
    done: int
    job: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JobRecords:
    """The job records of one run; those of its sweep's members share its numbering."""

    run: Run

    @property
    def _layout(self) -> Layout:
        return self.run.layout

    @cached_property
    def run_id(self) -> str:
        """Names the run in the queue, the same for all members; two runs never share one."""
        base = self._layout.base
        run = Run.open(base) if self._layout.member else self.run
        return digest([run.plan.fingerprint, str(base.resolve())])[:12]

    def name(self, number: int, step: str) -> str:
        """The name that a job has in the queue."""
        return f"trak-{step}-{number}-{self.run_id}"

    @property
    def pattern(self) -> str:
        """A regular expression that the names of this run's and its members' jobs match only."""
        return f"trak-[a-z]+-[0-9]+-{self.run_id}"

    @staticmethod
    def number(name: str) -> int:
        """The number of the job whose name in the queue is `name`."""
        return int(name.split("-")[2])

    def withdraw(self, number: int) -> None:
        """Remove the record of a job that was not submitted."""
        path = self._layout.job(number)
        with atomic.write_errors(path):
            path.unlink(missing_ok=True)

    def publish(self, job: JobRecord) -> int:
        """Write `job` under the next free number; return the number."""
        content = json.dumps(unstructure(job)).encode()
        number = max(self._layout.jobs(), default=0)
        while True:
            number += 1
            path = self._layout.job(number)
            if not atomic.exists(path) and atomic.write_once(path, content) == content:
                return number

    def read(self, number: int) -> JobRecord:
        """The job of that number.

        Raises
        ------
        StoreError
            If there is none.
        """
        path = self._layout.job(number)
        try:
            return JobRecord.from_json(atomic.retry_stale(path.read_bytes))
        except (OSError, ValueError) as error:
            raise StoreError(
                f"the job's record can't be read ({' '.join(str(error).split())})",
                where=str(path),
                next="run the launch command again: what is missing is submitted again",
                errno=getattr(error, "errno", None),
            ) from None

    def check_plan(self, job: JobRecord) -> None:
        """Raise `PlanMismatch` unless the run has the plan that `job` is for, or a later one."""
        path, found = self._layout.plan(job.generation), self.run.plan_digest(job.generation)
        seen = found and self.run.generation >= job.generation
        if not seen or job.plan not in ("", found):  # earlier versions named no digest
            here = f"has digest {found} here, {job.plan} there" if seen else "is not there"
            raise PlanMismatch(
                f"the job was submitted for {path.name}, which {here}",
                where=str(path),
                next="run the launch command again: what is missing is submitted again",
            )

    def numbers(self) -> list[int]:
        """The numbers of all jobs, in order."""
        return self._layout.jobs()

    def readable(self, numbers: Collection[int]) -> Iterator[tuple[int, JobRecord]]:
        """The jobs of these numbers, newest first, without those whose record is damaged.

        Of other members' jobs only the cells that this run shares.
        """
        for number in sorted(numbers, reverse=True):
            try:
                job = self.read(number)
                shared = job if job.member == self._layout.member else self._shared(job)
            except (StoreError, PlanMismatch) as error:
                log.warning("%s: %s", error.where, error.what)
            else:
                if shared:
                    yield number, shared

    def _shared(self, job: JobRecord) -> JobRecord | None:
        other = self._others.get(job.member)
        if other is None:
            sweeps, base = self._layout.sweeps, self._layout.base
            other = self._others[job.member] = Run.open(sweeps / job.member if job.member else base)
        tasks = tuple(
            tuple(c for c in task if self._is_shared(parse_cell(c), other)) for task in job.tasks
        )
        return replace(job, tasks=tasks) if any(tasks) else None

    def _is_shared(self, cell: Cell, other: Run) -> bool:
        """Whether `cell` of `other` is a cell of this run too, done by the same receipt."""
        run = self.run
        return (
            cell in self._all
            and cell.key(run.plan) == cell.key(other.plan)
            and run.layout.receipt(run.plan, cell) == other.layout.receipt(other.plan, cell)
        )

    @cached_property
    def _all(self) -> CellMap:
        return CellMap(self.run.plan, fill=1)

    @cached_property
    def _others(self) -> dict[str, Run]:
        return {}

    def attempt(self, job: str, index: int, process: int = 0) -> Attempt | None:
        """How the last attempt of a process at a task began, if there was one."""
        try:
            raw = decoding.mapping(self._layout.attempt(job, index, process).read_bytes())
            return structure(Attempt, raw, "it is no attempt:")
        except (OSError, ValueError):  # none, or damaged: counting starts over
            return None

    def begin(
        self, job: str, index: int, process: int = 0, *, done: int, by: Mapping[str, Any]
    ) -> Attempt:
        """Record that an attempt at a task begins, `done` of the process's cells being done."""
        last = self.attempt(job, index, process)
        fruitless = last.fruitless + 1 if last and last.done >= done else 1
        number = last.number + 1 if last else 1
        attempt = Attempt(number=number, fruitless=fruitless, done=done, job=by)
        self._write(self._layout.attempt(job, index, process), attempt)
        return attempt

    def begin_submitting(self, job: str, *, by: Mapping[str, Any]) -> Attempt:
        """Record that an attempt at a continuation job begins."""
        return self.begin(job, 0, done=len(self.numbers()), by=by)

    def end_submitting(self, job: str, attempt: Attempt) -> None:
        """Record that it ended in order: for now, or having submitted all."""
        self._write(self._layout.attempt(job, 0), replace(attempt, fruitless=0))

    @staticmethod
    def _write(path: Path, attempt: Attempt) -> None:
        atomic.write(path, json.dumps(unstructure(attempt)).encode())
