"""Submitting the task groups of one command, as far as the queue has room."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from trak_dist import graph, slurm
from trak_dist.cell_map import Owners, others_by_checkpoint
from trak_dist.cells import STAGE_STEPS, STEPS, Cell, FeaturizeCell
from trak_dist.configuration.config import SlurmConfig
from trak_dist.errors import QueueFull, SlurmError, SlurmRefused
from trak_dist.executors import batch
from trak_dist.store.jobs import CONTINUATION, JobRecord, JobRecords


@dataclass(frozen=True)
class SubmissionRequest:
    """What a command asked for: settings, stages, and a name of its own."""

    cluster: SlurmConfig
    stages: tuple[str, ...]
    launch: str

    @property
    def steps(self) -> list[str]:
        """The steps of the stages, in order."""
        return [step for stage in self.stages for step in STAGE_STEPS[stage]]


@dataclass(frozen=True)
class SubmittedJob:
    """One submitted job array."""

    step: str
    job_id: str
    tasks: int
    cells: int
    dependency: str


@dataclass(kw_only=True)
class SubmissionResult:
    """What a command submitted, and what it did not.

    `deferred_cells` cells found no room, the job `continuation_job` submits them; `blocked` ones
    depend on missing cells that no task makes.
    """

    jobs: list[SubmittedJob] = field(default_factory=list)
    already_queued: int = 0
    deferred_cells: int = 0
    continuation_job: str = ""
    blocked: list[Cell] = field(default_factory=list)


SubmitFunction = Callable[[str, Sequence[graph.Task], str], str]
Rate = Callable[[], float]


class PendingGroups:
    """The task groups of one command that are still to be submitted."""

    def __init__(
        self,
        jobs: JobRecords,
        order: SubmissionRequest,
        owners: Owners,
        *,
        skip: Collection[Cell] = (),
        rate: Rate = lambda: 0.0,
    ) -> None:
        plan = jobs.run.plan
        self.jobs = jobs
        self.owners = owners
        self._plan, self._steps, self._skip = plan, order.steps, skip
        progress = jobs.run.progress()
        self._done = progress.done
        self.rows = order.cluster.rows_per_task
        if not self.rows and "featurize" in self._steps:
            measured = progress.rows_per_second([FeaturizeCell]) or rate()
            workers = max(1, batch.gpus(order.cluster, "featurize"))
            self.rows = int(60 * order.cluster.minutes_per_task * measured * workers)

    def __iter__(self) -> Iterator[graph.TaskGroup]:
        return self._groups(self.owners, self._skip)

    def by_checkpoint(self) -> Iterator[graph.TaskGroup]:
        """All steps of one checkpoint before those of the next, where not all find room at once."""
        for others in others_by_checkpoint(self._plan):
            others.mark(self._skip, 1)
            yield from self._groups(self.owners, others)

    def forecast(self) -> tuple[list[graph.Task], list[Cell]]:
        """The tasks to come, and the cells whose dependencies no task makes."""
        owners = self.owners.copy()
        tasks: list[graph.Task] = []
        blocked: list[Cell] = []
        for group in self._groups(owners, self._skip):
            if group.missing_inputs:
                blocked += [cell for task in group.tasks for cell in task]
            else:
                tasks += group.tasks
                for task in group.tasks:
                    owners.take(task, "planned")
        return tasks, blocked

    def queued(self) -> int:
        """How many cells of these steps are in the queue."""
        kinds = [kind for step in self._steps for kind in STEPS[step]]
        return sum(int(np.count_nonzero(numbers)) for _, numbers in self.owners.series(kinds))

    def _groups(self, owners: Owners, skip: Collection[Cell]) -> Iterator[graph.TaskGroup]:
        return graph.task_groups(
            self._plan,
            self._steps,
            done=self._done,
            owners=owners,
            skip=skip,
            rows_per_task=self.rows,
        )


def read_limits(cluster: SlurmConfig) -> slurm.Limits:
    """How much may be submitted to where the settings send tasks."""
    destinations = [batch.destination(cluster, step) for step in STEPS]
    return slurm.limits({(d.get("account", ""), d.get("qos", "")) for d in destinations})


def make_submit(jobs: JobRecords, order: SubmissionRequest, rows: int) -> SubmitFunction:
    """Returns a function that records a job array, then submits it."""

    def send(step: str, tasks: Sequence[graph.Task], dependency: str) -> str:
        cluster = order.cluster
        job = JobRecord(
            launch=order.launch,
            step=step,
            fingerprint=jobs.run.plan.fingerprint,
            device=cluster.device if batch.on_gpu(step) else "cpu",
            tasks=tuple(tuple(graph.ids(task)) for task in tasks),
            cluster=asdict(replace(cluster, rows_per_task=rows)),
            stages=order.stages,
            member=jobs.run.layout.member,
            generation=jobs.run.generation,
            plan=jobs.run.plan_digest(jobs.run.generation),
            processes=batch.processes(cluster, step, tasks),
        )
        number = jobs.publish(job)
        try:
            request = make_batch(jobs, cluster, number, step, tasks, dependency)
            return batch.submit(jobs.run, cluster, request)
        except SlurmRefused:
            jobs.withdraw(number)
            raise

    return send


def submit_within_limits(
    groups: PendingGroups, send: SubmitFunction, limits: slurm.Limits, *, continuation_job: str = ""
) -> SubmissionResult:
    """Submit the groups as far as `limits` allow, and a continuation job if there is none.

    Raises
    ------
    QueueFull
        If nothing could be submitted.
    SlurmError
        If Slurm does not answer or rejects an array, with what was submitted before.
    """
    tasks, blocked = groups.forecast()
    result = SubmissionResult(
        already_queued=groups.queued(), blocked=blocked, continuation_job=continuation_job
    )
    all_fit = len(tasks) <= limits.room
    room = limits.room if continuation_job or all_fit else limits.room - 1
    if tasks and room < 1 and not continuation_job:
        raise QueueFull(
            f"the queue has no room: {limits.why}, {max(0, limits.room)} of them free",
            next="run the same command again when some of your jobs have ended",
        )
    sizes: dict[str, int] = {}
    for group, group_tasks in _parts(groups if all_fit else groups.by_checkpoint(), limits.array):
        if room < 1:
            break
        part, after = group_tasks[:room], _dependency(group, sizes)
        try:
            job_id = send(group.step, part, after)
        except QueueFull:  # by a limit that accounting does not report
            if not result.jobs:
                raise
            break
        except SlurmError as error:
            raise _with_submitted_jobs(error, sizes) from None
        room -= len(part)
        sizes[job_id] = len(part)
        for index, task in enumerate(part):
            groups.owners.take(task, f"{job_id}_{index}")
        cells = sum(map(len, part))
        result.jobs.append(SubmittedJob(group.step, job_id, len(part), cells, after))
    result.deferred_cells = sum(map(len, tasks)) - sum(line.cells for line in result.jobs)
    if result.deferred_cells and not continuation_job:
        try:
            result.continuation_job = send(CONTINUATION, (), _first_half(sizes))
        except QueueFull:
            pass  # reported as deferred cells without a job
        except SlurmError as error:
            raise _with_submitted_jobs(error, sizes) from None
    return result


def _with_submitted_jobs(error: SlurmError, submitted: Collection[str]) -> SlurmError:
    before = f"; submitted before: {', '.join(submitted)}" if submitted else ""
    return type(error)(error.what + before, where=error.where, next=error.next, errno=error.errno)


def _parts(
    groups: Iterable[graph.TaskGroup], most: int
) -> Iterator[tuple[graph.TaskGroup, tuple[graph.Task, ...]]]:
    """The groups that can run, cut into pieces of at most so many tasks."""
    for group in groups:
        if not group.missing_inputs:
            for start in range(0, len(group.tasks), most):
                yield group, group.tasks[start : start + most]


def make_batch(
    jobs: JobRecords,
    cluster: SlurmConfig,
    number: int,
    step: str,
    tasks: Sequence[graph.Task],
    dependency: str,
) -> batch.BatchRequest:
    """What is asked of Slurm for some tasks; no tasks: the continuation job."""
    return batch.BatchRequest(
        name=jobs.name(number, step),
        step=step,
        tasks=max(1, len(tasks)),
        dependency=dependency,
        number=number,
        processes=batch.processes(cluster, step, tasks),
    )


def _dependency(group: graph.TaskGroup, sizes: Mapping[str, int]) -> str:
    """`afterok` of tasks `12_3`, an array named as a whole where all of its tasks are meant.

    `afterany` of those of another member: what fails there need not be needed here.
    """
    kinds = {"afterok": group.after, "afterany": group.after_any}
    return ",".join(
        f"{kind}:{':'.join(_job_names(names, sizes))}" for kind, names in kinds.items() if names
    )


def _first_half(sizes: Mapping[str, int]) -> str:
    """Beginning then, a continuation job keeps the queue full whatever the last task takes."""
    tasks = [f"{job}_{index}" for job, size in sizes.items() for index in range(size)]
    return f"afterany:{':'.join(_job_names(tasks[: -(-len(tasks) // 2)], sizes))}"


def _job_names(tasks: Collection[str], sizes: Mapping[str, int]) -> Iterator[str]:
    by_job: dict[str, list[str]] = {}
    for name in sorted(tasks):
        by_job.setdefault(name.split("_")[0], []).append(name)
    for job, names in by_job.items():
        yield from [job] if sizes.get(job) == len(names) else names
