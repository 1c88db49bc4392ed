"""Tasks of a run in Slurm's queue, and their cells. Loads neither torch nor submitit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from trak_dist import slurm
from trak_dist.cells import Cell
from trak_dist.store.jobs import CONTINUATION, JobRecord, JobRecords


@dataclass(frozen=True)
class Queue:
    """Tasks in the queue, each with its job; a damaged job's tasks are not among them.

    Those of other members of a sweep are, as far as they make cells that are this run's too.
    """

    tasks: tuple[tuple[slurm.QueuedTask, JobRecord], ...] = ()

    def continuation_job(self, stages: Sequence[str]) -> str:
        """The job that will submit what of `stages` had no room, if there is one."""
        for task, job in self.tasks:
            if (
                job.step == CONTINUATION
                and set(stages) <= set(job.stages)
                and not task.unsatisfiable
            ):
                return task.job_id
        return ""

    def workers(self, cells: Collection[Cell]) -> int:
        """How many processes of running tasks are for some of `cells`."""
        return sum(
            job.processes
            for t, job in self.tasks
            if t.has_started and any(c in cells for c in cells_of(t, job))
        )


def read_queue(jobs: JobRecords) -> Queue:
    """Ask squeue once.

    Raises
    ------
    SlurmError
        If squeue is missing or fails.
    """
    queued = slurm.queue(jobs.pattern)
    known = dict(jobs.readable({jobs.number(task.name) for task in queued}))
    numbered = ((task, known.get(jobs.number(task.name))) for task in queued)
    # A job without tasks is a continuation job; a task without cells makes nothing of this run.
    return Queue(tuple((t, j) for t, j in numbered if j and (not j.tasks or cells_of(t, j))))


def cells_of(task: slurm.QueuedTask, job: JobRecord) -> tuple[Cell, ...]:
    """The cells of a task in the queue."""
    return job.cells(int(task.job_id.partition("_")[2] or 0)) if job.tasks else ()


def cancel(jobs: JobRecords) -> list[str]:
    """Cancel the jobs of this run and of its members; return their ids.

    Raises
    ------
    SlurmError
        If squeue or scancel is missing or fails.
    """
    queued = slurm.queue(jobs.pattern)
    member = jobs.run.layout.member
    if member:  # its own only
        known = dict(jobs.readable({jobs.number(task.name) for task in queued}))
        own_numbers = {number for number, job in known.items() if job.member == member}
        queued = [task for task in queued if jobs.number(task.name) in own_numbers]
    ids = sorted({t.job_id.partition("_")[0] for t in queued}, key=int)
    slurm.cancel(ids)
    return ids
