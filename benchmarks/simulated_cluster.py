"""A run on a simulated cluster: the real plan, graph, submission, job records and receipts.

    python benchmarks/simulated_cluster.py [1e4 1e5 1e6]

Only Slurm and the computing are simulated, with a clock of their own: 1,000 GPUs, a MaxArraySize of
1,001, at most 500 submitted tasks. A task lasts as long as its cells; some attempts are killed amid
them, and requeued. CPU seconds of a submission are real, and pass on that clock too.

`ideal` is all work divided by the GPUs, or by the 500 tasks that there may be; `path` the longest
task of each step, one after another. Waves are launches and continuation jobs; operations are what
their submissions asked of the file system. Each receipt is a file of the run: 10⁶ cells take hours.
"""

from __future__ import annotations

import heapq
import itertools
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from scale import CELL_ROWS, planned, receipt

from trak_dist import resources, slurm
from trak_dist.cells import Cell, GramCell, count, of_run
from trak_dist.configuration.config import SlurmConfig
from trak_dist.executors import batch
from trak_dist.executors import slurm as executor
from trak_dist.executors.batch import BatchRequest
from trak_dist.store import atomic, record
from trak_dist.store.jobs import CONTINUATION, JobRecord, JobRecords
from trak_dist.store.run import Run

SIZES = (10**4, 10**5)
GPUS, MAX_ARRAY, MAX_SUBMITTED = 1000, 1001, 500
FAILURES = (0.0, 0.05)  # of the attempts at a task
START_SECONDS, REQUEUE_SECONDS = 30.0, 60.0
CELL_SECONDS = {"featurize": 60.0, "gram": 240.0, "kernel": 60.0}
OTHER_CELL_SECONDS = 30.0
STAGES = ("featurize", "reduce", "report")


@dataclass(eq=False)
class Task:
    """A task in the queue; `waits` are the names of those that have to end before."""

    name: str
    request: BatchRequest
    cells: tuple[Cell, ...]
    waits: set[str]


@dataclass
class Cluster:
    """What stands in for Slurm and its nodes."""

    run: Run
    failures: float
    clock: float = 0.0
    arrays: int = 0
    waves: int = 0
    killed: int = 0
    work: float = 0.0
    submitting: float = 0.0
    longest: dict[str, float] = field(default_factory=dict)  # seconds of a task, by step
    operations: Counter[str] = field(default_factory=Counter)
    queue: dict[str, Task] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # tasks of each array
    after: dict[str, list[Task]] = field(default_factory=lambda: defaultdict(list))
    ready: list[Task] = field(default_factory=list)
    events: list[tuple[float, int, Task, int]] = field(default_factory=list)  # its cells then done
    numbers: Iterator[int] = field(default_factory=itertools.count)
    random: random.Random = field(default_factory=lambda: random.Random(0))

    # Slurm's commands ----------------------------------------------------------------------

    def sbatch(self, run: Run, _: SlurmConfig, request: BatchRequest) -> str:
        self.arrays += 1
        array, job = str(self.arrays), JobRecords(run).read(request.number)
        assert request.tasks < MAX_ARRAY
        assert len(self.queue) + request.tasks <= MAX_SUBMITTED
        self.sizes[array] = request.tasks
        waits = {name for name in self._named(request.dependency) if name in self.queue}
        for index in range(request.tasks):
            task = Task(f"{array}_{index}", request, job.cells(index), set(waits))
            self.queue[task.name] = task
            for name in waits:
                self.after[name].append(task)
            if not waits:
                self.ready.append(task)
        return array

    def _named(self, dependency: str) -> Iterator[str]:
        """The tasks that a dependency names, and all of an array."""
        for name in itertools.chain(*(d.split(":")[1:] for d in dependency.split(",") if d)):
            every = (f"{name}_{index}" for index in range(self.sizes.get(name, 0)))
            yield from [name] if "_" in name else every

    def squeue(self, _: str) -> list[slurm.QueuedTask]:
        running = {task.name for *_, task, _ in self.events}
        return [
            slurm.QueuedTask(
                task.name,
                task.request.name,
                "RUNNING" if task.name in running else "PENDING",
                "Dependency" if task.waits else "Priority",
                "",
            )
            for task in self.queue.values()
        ]

    def limits(self, _: object) -> slurm.Limits:
        room = MAX_SUBMITTED - len(self.queue)
        return slurm.Limits(MAX_ARRAY - 1, room, f"{MAX_SUBMITTED} jobs of QOS normal")

    # What happens --------------------------------------------------------------------------

    def launch(self) -> None:
        """The user's command."""
        cluster = SlurmConfig(rows_per_task=20 * CELL_ROWS)
        self._submit(executor.submit, self.run, cluster, STAGES, rate=lambda: 0.0)

    def _submit(self, call: Any, *arguments: Any, **named: Any) -> None:
        counted = {name: self._counted(name) for name in ("read", "names", "write", "write_once")}
        started = time.process_time()
        with (
            mock.patch.object(slurm, "queue", self.squeue),
            mock.patch.object(slurm, "limits", self.limits),
            mock.patch.object(slurm, "cancel"),
            mock.patch.object(slurm, "longest_job", return_value=slurm.UNLIMITED),
            mock.patch.object(batch, "submit", self.sbatch),
            mock.patch.multiple(atomic, **counted),
        ):
            call(*arguments, **named)
        seconds = time.process_time() - started
        self.waves += 1
        self.submitting += seconds
        self.clock += seconds

    def _counted(self, name: str) -> Any:
        real = getattr(atomic, name)

        def counting(*arguments: Any, **named: Any) -> Any:
            self.operations[name] += 1
            return real(*arguments, **named)

        return counting

    def finish(self) -> None:
        """Let time pass until the queue is empty."""
        while self.queue:
            while self.ready and len(self.events) < GPUS:
                self._begin(self.ready.pop(0))
            self.clock, _, task, done = heapq.heappop(self.events)
            self._publish(task.cells[:done])
            if done < len(task.cells):
                task.cells = task.cells[done:]
                self.ready.append(task)  # requeued
            elif task.request.step == CONTINUATION:
                self._continue(task)
            else:
                self._end(task)

    def _begin(self, task: Task) -> None:
        seconds = [CELL_SECONDS.get(cell.kind, OTHER_CELL_SECONDS) for cell in task.cells]
        whole, done = START_SECONDS + sum(seconds), len(task.cells)
        step = task.request.step
        self.longest[step] = max(whole, self.longest.get(step, 0.0))
        if task.cells and self.random.random() < self.failures:
            done = self.random.randrange(len(task.cells))
            whole = START_SECONDS + sum(seconds[:done]) + seconds[done] / 2 + REQUEUE_SECONDS
            self.killed += 1
        else:
            self.work += whole
        heapq.heappush(self.events, (self.clock + whole, next(self.numbers), task, done))

    def _publish(self, cells: tuple[Cell, ...]) -> None:
        """What the worker of these cells does in the run directory, but for fsync."""
        for cell in cells:
            path = self.run.layout.receipt(self.run.plan, cell)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(record.dump(receipt(self.run, cell, next(self.numbers))))
            if isinstance(cell, GramCell):
                self.run.receipts.consolidate(cell.model_id)

    def _continue(self, task: Task) -> None:
        jobs = JobRecords(self.run)
        job: JobRecord = jobs.read(task.request.number)
        self._submit(executor.continue_submission, jobs, job)
        self._end(task)

    def _end(self, task: Task) -> None:
        del self.queue[task.name]
        for waiting in self.after.pop(task.name, ()):
            waiting.waits.discard(task.name)
            if not waiting.waits:
                self.ready.append(waiting)


def main(sizes: list[int]) -> None:
    heads = ("cells", "killed", "hours", "÷ ideal", "÷ path", "waves", "arrays", "submitting, s")
    widths = (9, 8, 8, 9, 8, 7, 8, 15)
    print("".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True)), end="")
    print(f"{'files':>9}{'listings':>10}{'reads':>10}{'writes':>8}")
    for cells in sizes or SIZES:
        for failures in FAILURES:
            with tempfile.TemporaryDirectory() as directory:
                run = planned(Path(directory) / "run", cells)
                cluster = Cluster(run, failures)
                cluster.launch()
                cluster.finish()
                missing = count(run.plan) - len(run.receipts.done(of_run(run.plan)))
            show(cluster, count(run.plan), missing)


def show(cluster: Cluster, cells: int, missing: int) -> None:
    plan, done = cluster.run.plan, cluster.operations
    files = resources.chunk_files(plan) + resources.other_files(plan)
    ideal, path = cluster.work / min(GPUS, MAX_SUBMITTED), sum(cluster.longest.values())
    print(
        f"{cells:>9,}{cluster.killed:>8,}"
        f"{cluster.clock / 3600:>8.2f}{cluster.clock / ideal:>9.2f}"
        f"{cluster.clock / path:>8.2f}{cluster.waves:>7}{cluster.arrays:>8}"
        f"{cluster.submitting:>15.1f}{files:>9,}"
        f"{done['names']:>10,}{done['read']:>10,}{done['write'] + done['write_once']:>8,}",
        f"  {missing} cells missing" if missing else "",
        flush=True,
    )


if __name__ == "__main__":
    main([int(float(size)) for size in sys.argv[1:]])
