"""The arrays of one command, sent to Slurm as far as there is room."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from trak_dist import graph, slurm
from trak_dist.cells import STAGE_STEPS, STEPS, Cell, FeaturizeCell, of_run, of_step
from trak_dist.configuration.config import SlurmConfig
from trak_dist.errors import QueueFull, SlurmError, SlurmRefused
from trak_dist.executors import batch
from trak_dist.store.jobs import GO_ON, Job, Jobs
from trak_dist.store.receipts import rows_per_second


@dataclass(frozen=True)
class Order:
    """What a command asked for: settings, stages, and a name that tells it from other commands."""

    cluster: SlurmConfig
    stages: tuple[str, ...]
    launch: str

    @property
    def steps(self) -> list[str]:
        """The steps of the stages, in order."""
        return [step for stage in self.stages for step in STAGE_STEPS[stage]]


@dataclass(frozen=True)
class Line:
    """One submitted array."""

    step: str
    job_id: str
    tasks: int
    cells: int
    dependency: str


@dataclass(kw_only=True)
class Submitted:
    """What a command submitted, and what it did not.

    `left` cells found no room, job `goes_on` submits them; `blocked` ones need cells that are
    missing and that nobody makes.
    """

    lines: list[Line] = field(default_factory=list)
    queued_before: int = 0
    left: int = 0
    goes_on: str = ""
    blocked: list[Cell] = field(default_factory=list)


Send = Callable[[str, Sequence[graph.Task], str], str]
Rate = Callable[[], float]


class Arrays:
    """The arrays of one command that are still to be submitted."""

    def __init__(
        self,
        jobs: Jobs,
        order: Order,
        owners: Mapping[Cell, str],
        *,
        skip: Collection[Cell] = (),
        rate: Rate = lambda: 0.0,
    ) -> None:
        plan = jobs.run.plan
        self.jobs = jobs
        self.owners = dict(owners)
        self._plan, self._steps, self._skip = plan, order.steps, skip
        self._done = jobs.run.receipts.done(of_run(plan))
        self.rows = order.cluster.rows_per_task
        if not self.rows and "featurize" in self._steps:
            receipts = (r for c, r in self._done.items() if isinstance(c, FeaturizeCell))
            measured = rows_per_second(receipts) or rate()
            self.rows = int(60 * order.cluster.minutes_per_task * measured)

    def __iter__(self) -> Iterator[graph.Array]:
        return self._arrays(self.owners)

    def foreseen(self) -> tuple[list[graph.Task], list[Cell]]:
        """The tasks that there will be, and the cells that lack what nobody makes."""
        owners = dict(self.owners)
        tasks: list[graph.Task] = []
        blocked: list[Cell] = []
        for array in self._arrays(owners):
            cells = [cell for task in array.tasks for cell in task]
            if array.lacks:
                blocked += cells
            else:
                tasks += array.tasks
                owners.update(dict.fromkeys(cells, "foreseen"))
        return tasks, blocked

    def queued(self) -> int:
        """How many cells of these steps are in the queue."""
        return sum(1 for s in self._steps for c in of_step(self._plan, s) if c in self.owners)

    def _arrays(self, owners: dict[Cell, str]) -> Iterator[graph.Array]:
        return graph.arrays(
            self._plan,
            self._steps,
            done=self._done,
            owners=owners,
            skip=self._skip,
            rows_per_task=self.rows,
        )


def read_limits(cluster: SlurmConfig) -> slurm.Limits:
    """How much may be submitted to where the settings send tasks."""
    asked = [batch.destination(cluster, step) for step in STEPS]
    return slurm.limits({(d.get("account", ""), d.get("qos", "")) for d in asked})


def sender(jobs: Jobs, order: Order, rows: int) -> Send:
    """Publishes what is to be sent, then sends it; the rest is to have as large data shards."""

    def send(step: str, tasks: Sequence[graph.Task], dependency: str) -> str:
        job = Job(
            launch=order.launch,
            step=step,
            fingerprint=jobs.run.plan.fingerprint,
            device=order.cluster.device if batch.on_gpu(step) else "cpu",
            tasks=tuple(tuple(cell.id for cell in task) for task in tasks),
            cluster=asdict(replace(order.cluster, rows_per_task=rows)),
            stages=order.stages,
            member=jobs.run.layout.member,
            generation=jobs.run.generation,
        )
        number = jobs.publish(job)
        try:
            asked = batch_of(jobs, number, step, tasks, dependency)
            return batch.submit(jobs.run, order.cluster, asked)
        except SlurmRefused:
            jobs.withdraw(number)
            raise

    return send


def send_as_fits(
    arrays: Arrays, send: Send, limits: slurm.Limits, *, goes_on: str = ""
) -> Submitted:
    """Send the arrays as far as `limits` allow, and a job that goes on if there is none.

    Raises
    ------
    QueueFull
        If nothing could be sent.
    SlurmError
        If Slurm does not answer or refuses an array, with what was sent before.
    """
    tasks, blocked = arrays.foreseen()
    result = Submitted(queued_before=arrays.queued(), blocked=blocked, goes_on=goes_on)
    room = limits.room if goes_on or len(tasks) <= limits.room else limits.room - 1
    if tasks and room < 1 and not goes_on:
        raise QueueFull(
            f"the queue has no room: {limits.why}, {max(0, limits.room)} of them free",
            next="run the same command again when some of your jobs have ended",
        )
    sizes: dict[str, int] = {}
    for array, tasks_wanted in _parts(arrays, limits.array):
        part = tasks_wanted[: max(0, room)]
        after = _dependency(array, sizes)
        try:
            job_id = send(array.step, part, after) if part else ""
        except QueueFull:  # by a limit that accounting does not tell
            if not result.lines:
                raise
            job_id, room = "", 0
        except SlurmError as error:
            raise _told_before(error, sizes) from None
        if job_id:
            room -= len(part)
            sizes[job_id] = len(part)
            for index, task in enumerate(part):
                arrays.owners.update(dict.fromkeys(task, f"{job_id}_{index}"))
            cells = sum(map(len, part))
            result.lines.append(Line(array.step, job_id, len(part), cells, after))
    result.left = sum(map(len, tasks)) - sum(line.cells for line in result.lines)
    if result.left and not goes_on:
        try:
            result.goes_on = send(GO_ON, (), f"afterany:{':'.join(sizes)}")
        except QueueFull:
            pass  # told as cells that are left, by no job
        except SlurmError as error:
            raise _told_before(error, sizes) from None
    return result


def _told_before(error: SlurmError, submitted: Collection[str]) -> SlurmError:
    before = f"; submitted before: {', '.join(submitted)}" if submitted else ""
    return type(error)(error.what + before, where=error.where, next=error.next, errno=error.errno)


def _parts(arrays: Arrays, most: int) -> Iterator[tuple[graph.Array, tuple[graph.Task, ...]]]:
    """The arrays that can run, cut into pieces of at most so many tasks."""
    for array in arrays:
        if not array.lacks:
            for start in range(0, len(array.tasks), most):
                yield array, array.tasks[start : start + most]


def batch_of(
    jobs: Jobs, number: int, step: str, tasks: Sequence[graph.Task], dependency: str
) -> batch.Batch:
    """What is asked of Slurm for some tasks; none are those of a job that goes on."""
    return batch.Batch(
        name=jobs.name(number, step),
        step=step,
        tasks=max(1, len(tasks)),
        dependency=dependency,
        number=number,
    )


def _dependency(array: graph.Array, sizes: Mapping[str, int]) -> str:
    """`afterok` of tasks `12_3`, an array named as a whole where all of its tasks are meant.

    `afterany` of those beside it: what fails there need not be what is needed here.
    """
    kinds = {"afterok": array.after, "afterany": array.beside}
    return ",".join(
        f"{kind}:{':'.join(_named(names, sizes))}" for kind, names in kinds.items() if names
    )


def _named(tasks: Collection[str], sizes: Mapping[str, int]) -> Iterator[str]:
    by_job: dict[str, list[str]] = {}
    for name in sorted(tasks):
        by_job.setdefault(name.split("_")[0], []).append(name)
    for job, names in by_job.items():
        yield from [job] if sizes.get(job) == len(names) else names
