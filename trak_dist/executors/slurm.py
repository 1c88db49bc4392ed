"""slurm: the whole job graph as arrays of Slurm tasks, submitted at once; then this process may go.

The cells of an array are frozen in a file before it is submitted, and its name in the queue says
which file: the queue alone tells which cells are taken. What is done, the receipts alone tell.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Sequence

from trak_dist import graph, machine, slurm
from trak_dist.cells import STEPS, Cell, of_run
from trak_dist.configuration.config import SlurmConfig
from trak_dist.configuration.validation import cluster_from_mapping
from trak_dist.errors import ConfigError, MissingInputs, QueueFull, SlurmError, SlurmRefused
from trak_dist.executors import batch
from trak_dist.executors.sending import (
    Arrays,
    Order,
    Rate,
    Submitted,
    batch_of,
    read_limits,
    send_as_fits,
    sender,
)
from trak_dist.status.queue import Queue, cells_of, read_queue
from trak_dist.store.jobs import GO_ON, Job, Jobs
from trak_dist.store.run import Run

ROOM_SECONDS = 30.0  # between two looks whether the queue has room

log = logging.getLogger(__name__)


def submit(
    run: Run, cluster: SlurmConfig, stages: Sequence[str], *, rate: Rate, force: bool = False
) -> Submitted:
    """Submit the cells of `stages` that are neither done nor, unless by `force`, in the queue.

    `rate` tells what to expect of a featurize task, in rows per second, while none was measured.
    Where the limits forbid all at once, a last job submits the rest when these have ended.

    Raises
    ------
    ConfigError
        If a job would pend for ever.
    SlurmError
        If Slurm is not there or refuses a job.
    """
    order = Order(cluster, tuple(stages), uuid.uuid4().hex)
    refuse_endless(order)
    jobs = Jobs(run)
    queue = read_queue(jobs)
    owners, doomed = _can_succeed(run, queue)
    slurm.cancel(doomed)
    if force:
        kinds = {kind for step in order.steps for kind in STEPS[step]}
        owners = {c: task for c, task in owners.items() if type(c) not in kinds}
    arrays = Arrays(jobs, order, owners, rate=rate)
    _, blocked = arrays.foreseen()
    if blocked:
        raise MissingInputs(
            f"{len(blocked)} cells need others that are neither done nor in the queue, "
            f"{blocked[0].id} first",
            where=str(run.layout.run_dir),
            next="leave out stage=…: the whole graph is submitted then",
        )
    waits = "" if force else queue.goes_on(order.stages)
    send = sender(jobs, order, arrays.rows)
    return send_as_fits(arrays, send, read_limits(cluster), goes_on=waits)


def _can_succeed(run: Run, queue: Queue) -> tuple[dict[Cell, str], list[str]]:
    """Who makes which cell in the queue; and the waiting tasks whose needs nobody makes.

    Those are cancelled by Slurm a little later, or begin too early: after a failure, or if the run
    has more checkpoints now than when they were submitted.
    """
    plan, owners = run.plan, dict[Cell, str]()
    doomed = [task.job_id for task, job in queue.tasks if task.doomed and job.step == GO_ON]
    done = run.receipts.done(of_run(plan))
    for step, kinds in STEPS.items():
        lacking: dict[object, bool] = {}
        made = [(t, j, cells_of(t, j)) for t, j in queue.tasks if j.step == step and not t.ended]
        # A task that begins with a kernel waits for the one that makes the Gram.
        for task, job, cells in sorted(made, key=lambda one: kinds.index(type(one[2][0]))):
            alike = type(cells[0]), cells[0].depends_as
            if alike not in lacking:
                needed = cells[0].dependencies(plan, done)
                lacking[alike] = any(c not in done and c not in owners for c in needed)
            if task.doomed or (lacking[alike] and not task.runs):
                # Another member's are not ours to cancel, and not to be waited for.
                doomed += [task.job_id] if job.member == run.layout.member else []
            else:
                owners.update(dict.fromkeys(cells, task.job_id))
    return owners, doomed


def go_on(jobs: Jobs, job: Job) -> Submitted:
    """Submit what had no room before, waiting for room if need be.

    A cell that was submitted by the same command before is not submitted again: it failed.
    """
    order = Order(cluster_from_mapping(job.cluster), job.stages, job.launch)
    while True:
        try:
            result = _go_on_once(jobs, order)
        except SlurmRefused as error:
            if not isinstance(error, QueueFull):
                raise
            log.info("%s; looking again in %.0f s", error.what, ROOM_SECONDS)
        except SlurmError as error:  # Slurm does not answer, for now
            log.warning("%s; trying again in %.0f s", error.what, ROOM_SECONDS)
        else:
            if not result.left or result.goes_on != machine.process()["job_id"]:
                return result
            log.info("no room for %d cells; looking again in %.0f s", result.left, ROOM_SECONDS)
        time.sleep(ROOM_SECONDS)


def _go_on_once(jobs: Jobs, order: Order) -> Submitted:
    mine = [j for _, j in jobs.readable(jobs.numbers()) if j.launch == order.launch]
    tried = {cell for j in mine for i in range(len(j.tasks)) for cell in j.cells(i)}
    owners, _ = _can_succeed(jobs.run, read_queue(jobs))
    arrays = Arrays(jobs, order, owners, skip=tried)
    limits = read_limits(order.cluster)
    # Another job like this one needs room too; where there is none, this one stays.
    stays = machine.process()["job_id"] if limits.room < 2 else ""
    return send_as_fits(arrays, sender(jobs, order, arrays.rows), limits, goes_on=stays)


def dry_run(
    run: Run, cluster: SlurmConfig, stages: Sequence[str], *, rate: Rate
) -> tuple[Submitted, list[str]]:
    """What `submit` would submit in an empty queue without limits, and the batch scripts."""
    jobs, order = Jobs(run), Order(cluster, tuple(stages), "")
    scripts: list[str] = []

    def send(step: str, tasks: Sequence[graph.Task], dependency: str) -> str:
        number = len(scripts) + 1
        scripts.append(batch.script(run, cluster, batch_of(jobs, number, step, tasks, dependency)))
        return f"<{number}>"

    everything = slurm.Limits(slurm.UNLIMITED, slurm.UNLIMITED, "")
    return send_as_fits(Arrays(jobs, order, {}, rate=rate), send, everything), scripts


def refuse_endless(order: Order) -> None:
    """Raise `ConfigError` if a task asks for more time than its partition ever gives."""
    asked = order.cluster.time
    steps = (*order.steps, GO_ON)
    for partition in {batch.destination(order.cluster, s).get("partition", "") for s in steps}:
        longest = slurm.longest_job(partition)
        if asked > longest:
            name = f"partition {partition}" if partition else "the default partition"
            raise ConfigError(
                f"cluster.time is {asked} minutes, {name} gives {longest} at most: the jobs would "
                "pend for ever",
                where="cluster.time",
                next=f"cluster.time={longest}, or another cluster.partition",
            )
