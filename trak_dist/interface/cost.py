"""What the rest of a run will cost: tasks, hours, wall time. Estimates, each saying from what.

The time of a cell is its work (`Cell.work`) divided by a rate: that of finished cells of its kind,
else of finished cells whose work is of the same unit, else of a trial, else a stated one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from trak_dist import graph, resources
from trak_dist.cells import KINDS, STAGE_STEPS, STEPS, Cell, FeaturizeCell
from trak_dist.configuration.config import ClusterConfig, SlurmConfig
from trak_dist.plan import Plan
from trak_dist.store.record import Receipt

PRODUCTS_PER_SECOND = 10**10  # of a core, in float64; 0.7 to 1.9 of it by benchmarks/reduce.py
PAGES_PER_SECOND = 0.1
START_SECONDS = 15  # of a process: Python, torch, the problem, a checkpoint
SMALL_FILE_BYTES = 700  # a receipt, the metadata of an array
UNKNOWN = "no cell like it is done yet"

Trial = Callable[[], float]


@dataclass(frozen=True)
class Rate:
    """Work per second of one process, and what says so; `device` is where it was measured."""

    per_second: float
    origin: Literal["receipts", "trial", "stated"]
    text: str
    device: str = "cpu"


@dataclass(frozen=True)
class StepCost:
    """The missing cells of one step.

    Parameters
    ----------
    cells, tasks : int
        How many.
    gpus : int
        That a task has; 0: it computes on CPUs.
    seconds : float or None
        Of all tasks, one after another; None where nothing says how long a cell takes.
    longest_seconds : float or None
        Of the task that takes longest.
    longest : task
        That task.
    rates : tuple of str
        What the estimate is from.
    """

    step: str
    cells: int
    tasks: int
    gpus: int
    seconds: float | None
    longest_seconds: float | None
    longest: graph.Task
    rates: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """An estimate of what is left of a run, step by step.

    Parameters
    ----------
    steps : tuple of StepCost
        Those with missing cells.
    at_once : int
        Tasks that run at once; 0: all that a step has.
    store_bytes, files : int
        Of the finished run, uncompressed; what its jobs log is not counted.
    """

    steps: tuple[StepCost, ...]
    at_once: int
    store_bytes: int
    files: int

    @property
    def unknown(self) -> list[str]:
        """The steps of which no rate is known; hours and wall time leave them out."""
        return [step.step for step in self.steps if step.seconds is None]

    @property
    def gpu_hours(self) -> float:
        """Hours of GPUs, those that a task's processes wait for each other in among them."""
        return sum((s.seconds or 0) * s.gpus for s in self.steps) / 3600

    @property
    def cpu_hours(self) -> float:
        """Hours of the tasks that have no GPU."""
        return sum(s.seconds or 0 for s in self.steps if not s.gpus) / 3600

    def wall_seconds(self, at_once: int = 0) -> float:
        """Until all is done, with so many tasks at once (0: all of a step), step after step."""
        return sum(
            max(s.seconds / min(at_once or s.tasks, s.tasks), s.longest_seconds or 0)
            for s in self.steps
            if s.seconds is not None
        )

    def longest(self) -> StepCost | None:
        """The step with the task that takes longest, if any is known."""
        known = [s for s in self.steps if s.longest_seconds is not None]
        return max(known, key=lambda s: s.longest_seconds or 0, default=None)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.steps:
            heads = f"{'estimate':<15}{'cells':>9}{'tasks':>9}{'hours':>9}"
            yield f"{heads}     {'longest task':>13}  by"
        for s in self.steps:
            hours = "?" if s.seconds is None else f"{s.seconds * max(1, s.gpus) / 3600:,.2f}"
            longest = "?" if s.longest_seconds is None else duration(s.longest_seconds)
            unit = "GPU" if s.gpus else "CPU"
            sources = "; ".join(s.rates)
            yield f"{s.step:<15}{s.cells:>9}{s.tasks:>9}{hours:>9} {unit} {longest:>13}  {sources}"
        if longest_step := self.longest():
            task = longest_step.longest
            more = f" and {len(task) - 1} more cells" if len(task) > 1 else ""
            yield f"longest task: {task[0].id}{more}, {duration(longest_step.longest_seconds or 0)}"
        but = f", and {', '.join(self.unknown)}, of which nothing is known" if self.unknown else ""
        yield (
            f"in all {self.gpu_hours:,.2f} GPU hours, {self.cpu_hours:,.2f} CPU hours{but}; "
            f"{self.store_bytes / 2**20:,.1f} MiB in {self.files:,} files"
        )
        at_once = (
            f"{self.at_once} task{'s' * (self.at_once > 1)}" if self.at_once else "all of a step"
        )
        yield f"{duration(self.wall_seconds(self.at_once))} with {at_once} at once{but}"


def duration(seconds: float) -> str:
    """Seconds as text."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"


def measured_rates(plan: Plan, done: Mapping[Cell, Receipt]) -> dict[type[Cell], Rate]:
    """The median rate of each kind of which there are receipts that say how long a cell took.

    A task's first cell also pays for what is imported and drawn once.
    """
    found: dict[type[Cell], list[float]] = {}
    devices: dict[type[Cell], str] = {}
    for cell, receipt in done.items():
        seconds, work = receipt.job.get("seconds"), cell.work(plan)
        if work and isinstance(seconds, int | float) and seconds > 0:
            found.setdefault(type(cell), []).append(work / seconds)
            devices[type(cell)] = str(receipt.job.get("device", "cpu"))
    return {
        kind: Rate(
            median(rates),
            "receipts",
            f"{len(rates)} {kind.kind} cells on {devices[kind]}",
            devices[kind],
        )
        for kind, rates in found.items()
    }


def rates(
    plan: Plan, measured: Mapping[type[Cell], Rate], trial: Trial, kinds: Collection[type[Cell]]
) -> dict[type[Cell], Rate]:
    """The rate of each kind, as far as there is one. `trial` is asked if it has to be."""
    found: dict[type[Cell], Rate] = {}
    for kind in kinds:
        alike = [measured[k] for k in KINDS if k in measured and k.work_unit == kind.work_unit]
        if kind in measured:
            found[kind] = measured[kind]
        elif alike:
            found[kind] = alike[0]
        elif kind.work_unit == "rows" and plan.has_problem:
            rate = trial()
            found[kind] = Rate(rate, "trial", f"a trial on this CPU, {rate:,.3g} rows/s")
        elif kind.work_unit == "products":
            cores = kind.threads(plan)
            text = f"{PRODUCTS_PER_SECOND:.0e} products/s of a core"
            found[kind] = Rate(PRODUCTS_PER_SECOND * cores, "stated", text)
        elif kind.work_unit == "pages":
            found[kind] = Rate(PAGES_PER_SECOND, "stated", f"{1 / PAGES_PER_SECOND:.0f} s a page")
    return found


def seconds_of(cells: Iterable[Cell], plan: Plan, known: Mapping[type[Cell], Rate]) -> float:
    """What one process needs for some cells, whose rates are all known."""
    return sum(cell.work(plan) / known[type(cell)].per_second for cell in cells)


def estimate(  # noqa: PLR0913
    plan: Plan,
    stages: Sequence[str],
    cluster: ClusterConfig | SlurmConfig,
    *,
    done: Mapping[Cell, Receipt],
    trial: Trial,
    workers: int,
    gpus: int,
) -> Cost:
    """What the cells of some stages that are not done will cost.

    Parameters
    ----------
    trial : callable
        Gives the rows per second of a trial; called where no receipt says it.
    workers, gpus : int
        Of this machine, where it runs the cells: processes at once, and GPUs.
    """
    steps = [step for stage in stages for step in STAGE_STEPS[stage]]
    kinds = [k for step in steps for k in STEPS[step] if any(c not in done for c in k.of(plan))]
    known = rates(plan, measured_rates(plan, done), trial, kinds)
    rows = rows_per_task(cluster, known)
    costs = []
    for step in steps:
        tasks = graph.tasks(plan, step, skip=done, rows_per_task=rows)
        if isinstance(cluster, SlurmConfig):
            from trak_dist.executors import batch  # loads submitit

            shape = batch.gpus(cluster, step), batch.processes(cluster, step, tasks), START_SECONDS
        else:  # a process goes on to its next task
            shape = int(bool(gpus) and any(kind.gpu for kind in STEPS[step])), 1, 0
        if tasks:
            costs.append(_step_cost(plan, step, tasks, known, *shape))
    others = resources.other_files(plan)
    return Cost(
        steps=tuple(costs),
        at_once=cluster.array_parallelism if isinstance(cluster, SlurmConfig) else workers,
        store_bytes=resources.disk_bytes(plan) + SMALL_FILE_BYTES * others,
        files=resources.chunk_files(plan) + others,
    )


def _step_cost(  # noqa: PLR0913, PLR0917
    plan: Plan,
    step: str,
    tasks: Sequence[graph.Task],
    known: Mapping[type[Cell], Rate],
    gpus: int,
    processes: int,
    start_seconds: int,
) -> StepCost:
    cells = [cell for task in tasks for cell in task]
    kinds = dict.fromkeys(map(type, cells))
    by_task: list[float] = []
    for task in tasks if all(kind in known for kind in kinds) else ():
        shares = (graph.share(task, part, processes) for part in range(processes))
        by_task.append(start_seconds + max(seconds_of(share, plan, known) for share in shares))
    longest = max(range(len(by_task)), key=by_task.__getitem__, default=0)
    return StepCost(
        step=step,
        cells=len(cells),
        tasks=len(tasks),
        gpus=gpus,
        seconds=sum(by_task) if by_task else None,
        longest_seconds=by_task[longest] if by_task else None,
        longest=tasks[longest],
        rates=tuple(dict.fromkeys(known[k].text if k in known else UNKNOWN for k in kinds)),
    )


def rows_per_task(cluster: ClusterConfig | SlurmConfig, known: Mapping[type[Cell], Rate]) -> int:
    """Rows of a data shard, as submission cuts them; 0 where no rate is known for that."""
    if not isinstance(cluster, SlurmConfig):
        return 1
    from trak_dist.executors import batch

    measured = known[FeaturizeCell].per_second if FeaturizeCell in known else 0.0
    processes = max(1, batch.gpus(cluster, "featurize"))
    return cluster.rows_per_task or int(60 * cluster.minutes_per_task * measured * processes)
