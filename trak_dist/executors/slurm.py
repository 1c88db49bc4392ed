"""slurm: the whole job graph as job arrays, submitted at once; then this process may end.

The cells of an array are frozen in a file before it is submitted, and its name in the queue says
which file: the queue alone says which cells are taken. What is done is in the receipts alone.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Sequence

from trak_dist import graph, machine, slurm
from trak_dist.cell_map import CellMap, Owners
from trak_dist.cells import STEPS
from trak_dist.configuration.config import SlurmConfig
from trak_dist.configuration.validation import cluster_from_mapping
from trak_dist.errors import ConfigError, MissingInputs, QueueFull, SlurmError, SlurmRefused
from trak_dist.executors import batch
from trak_dist.executors.submission import (
    PendingGroups,
    Rate,
    SubmissionRequest,
    SubmissionResult,
    make_batch,
    make_submit,
    read_limits,
    submit_within_limits,
)
from trak_dist.status.queue import Queue, cells_of, read_queue
from trak_dist.store.jobs import CONTINUATION, JobRecord, JobRecords
from trak_dist.store.run import Run

RETRY_SECONDS = 30.0  # between two looks whether the queue has room

log = logging.getLogger(__name__)


def submit(
    run: Run, cluster: SlurmConfig, stages: Sequence[str], *, rate: Rate, force: bool = False
) -> SubmissionResult:
    """Submit the cells of `stages` that are neither done nor, unless by `force`, in the queue.

    `rate` estimates the rows per second of a featurize task while none was measured. Where the
    limits forbid all at once, a last job submits the rest when these have ended.

    Raises
    ------
    ConfigError
        If a job would stay pending forever.
    SlurmError
        If Slurm is not there or refuses a job.
    """
    request = SubmissionRequest(cluster, tuple(stages), uuid.uuid4().hex)
    check_time_limit(request)
    jobs = JobRecords(run)
    queue = read_queue(jobs)
    owners, unsatisfiable = _owners_and_unsatisfiable(run, queue)
    slurm.cancel(unsatisfiable)
    if force:
        kinds = {kind for step in request.steps for kind in STEPS[step]}
        owners.drop(kinds)
    groups = PendingGroups(jobs, request, owners, rate=rate)
    _, blocked = groups.forecast()
    if blocked:
        raise MissingInputs(
            f"{len(blocked)} cells depend on others that are neither done nor in the queue, "
            f"{blocked[0].id} first",
            where=str(run.layout.run_dir),
            next="leave out stage=…: the whole graph is submitted then",
        )
    continuation_job = "" if force else queue.continuation_job(request.stages)
    submit_group = make_submit(jobs, request, groups.rows)
    return submit_within_limits(
        groups, submit_group, read_limits(cluster), continuation_job=continuation_job
    )


def _owners_and_unsatisfiable(run: Run, queue: Queue) -> tuple[Owners, list[str]]:
    """The queued task of each cell; and the waiting tasks whose dependencies no task makes.

    Those are cancelled by Slurm a little later, or begin too early: after a failure, or if the run
    has more checkpoints now than when they were submitted.
    """
    plan, owners = run.plan, Owners(run.plan)
    unsatisfiable = [
        task.job_id for task, job in queue.tasks if task.unsatisfiable and job.step == CONTINUATION
    ]
    done = run.progress().done if queue.tasks else CellMap(plan)
    for step, kinds in STEPS.items():
        blocked: dict[object, bool] = {}
        candidates = [
            (t, j, cells_of(t, j)) for t, j in queue.tasks if j.step == step and not t.ended
        ]
        # A task that begins with a kernel waits for the one that makes the Gram.
        for task, job, cells in sorted(candidates, key=lambda one: kinds.index(type(one[2][0]))):
            group = type(cells[0]), cells[0].dependency_group
            if group not in blocked:
                blocked[group] = bool(graph.inputs(plan, step, cells[:1], done, owners)[2])
            if task.unsatisfiable or (blocked[group] and not task.has_started):
                # Tasks of another member are neither cancelled nor waited for.
                unsatisfiable += [task.job_id] if job.member == run.layout.member else []
            else:
                owners.take(cells, task.job_id)
    return owners, unsatisfiable


def continue_submission(jobs: JobRecords, job: JobRecord) -> SubmissionResult:
    """Submit what had no room before; wait for room if there is none.

    A cell that this command submitted before is not submitted again: it failed.
    """
    order = SubmissionRequest(cluster_from_mapping(job.cluster), job.stages, job.launch)
    own_job = machine.process()["job_id"]
    while True:
        try:
            result = _continue_once(jobs, order)
        except SlurmRefused as error:
            if not isinstance(error, QueueFull):
                raise
            log.info("%s; trying again in %.0f s", error.what, RETRY_SECONDS)
        except SlurmError as error:  # Slurm does not answer, for now
            log.warning("%s; trying again in %.0f s", error.what, RETRY_SECONDS)
        else:
            # Where there was no room for another continuation job, this one goes on.
            if not result.deferred_cells or result.continuation_job not in ("", own_job):
                return result
            log.info(
                "no room for %d cells; trying again in %.0f s",
                result.deferred_cells,
                RETRY_SECONDS,
            )
        time.sleep(RETRY_SECONDS)


def _continue_once(jobs: JobRecords, order: SubmissionRequest) -> SubmissionResult:
    own_jobs = [j for _, j in jobs.readable(jobs.numbers()) if j.launch == order.launch]
    attempted = CellMap.of(jobs.run.plan, *(j.all_cells for j in own_jobs))
    owners, _ = _owners_and_unsatisfiable(jobs.run, read_queue(jobs))
    arrays = PendingGroups(jobs, order, owners, skip=attempted)
    limits = read_limits(order.cluster)
    # Another continuation job needs room too; where there is none, this one keeps running.
    reusable_job = machine.process()["job_id"] if limits.room < 2 else ""
    return submit_within_limits(
        arrays, make_submit(jobs, order, arrays.rows), limits, continuation_job=reusable_job
    )


def dry_run(
    run: Run, cluster: SlurmConfig, stages: Sequence[str], *, rate: Rate
) -> tuple[SubmissionResult, list[str]]:
    """What `submit` would submit to an empty queue without limits, and the batch scripts."""
    jobs, request = JobRecords(run), SubmissionRequest(cluster, tuple(stages), "")
    scripts: list[str] = []

    def submit_group(step: str, tasks: Sequence[graph.Task], dependency: str) -> str:
        number = len(scripts) + 1
        array = make_batch(jobs, cluster, number, step, tasks, dependency)
        scripts.append(batch.script(run, cluster, array))
        return f"<{number}>"

    everything = slurm.Limits(slurm.UNLIMITED, slurm.UNLIMITED, "")
    return submit_within_limits(
        PendingGroups(jobs, request, Owners(run.plan), rate=rate), submit_group, everything
    ), scripts


def check_time_limit(order: SubmissionRequest) -> None:
    """Raise `ConfigError` if a task asks for more time than its partition ever gives."""
    minutes = order.cluster.time
    steps = (*order.steps, CONTINUATION)
    for partition in {batch.destination(order.cluster, s).get("partition", "") for s in steps}:
        longest = slurm.longest_job(partition)
        if minutes > longest:
            name = f"partition {partition}" if partition else "the default partition"
            raise ConfigError(
                f"cluster.time is {minutes} minutes, {name} gives {longest} at most: the jobs "
                "would stay pending forever",
                where="cluster.time",
                next=f"cluster.time={longest}, or another cluster.partition",
            )
