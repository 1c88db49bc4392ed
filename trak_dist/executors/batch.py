"""One job array as a batch script: its resources, and its submission by submitit.

submitit writes the script and runs sbatch. The tasks run `trak_dist.task`, not submitit's pickles:
what a task does is in the run directory, and nothing from there is ever unpickled.
"""

from __future__ import annotations

import contextlib
import io
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from trak_dist import graph, slurm
from trak_dist.cells import STEPS, count
from trak_dist.configuration.config import SlurmConfig
from trak_dist.errors import QueueFull, SlurmError, SlurmRefused, SlurmTimeout
from trak_dist.executors import refusals
from trak_dist.machine import LOG_VARIABLE
from trak_dist.plan import Plan
from trak_dist.store import atomic
from trak_dist.store.run import Run

# What a task holds besides its cells and the user's data: 0.25 to 0.35 GiB of resident memory by
# benchmarks/memory_of_tasks.py; a torch for CUDA has larger libraries. CUDA's own is not measured.
BASE_GB, CUDA_GB = 1, 7
UNMEASURED_GB = 7  # the user's data, in plans of earlier versions and of streamed rows
CELL_RECORD_BYTES = 5 * 2**10  # of what submits the rest
TRIES, PAUSE_SECONDS = 4, 5.0
# What sbatch says where a limit on submitted jobs is reached, and where trying again may help.
FULL = ("MaxSubmitJob", "GrpSubmitJob", "job queue full", "temporarily unable to accept")
PASSING = ("timed out", "Unable to contact", "Connection refused", "Transport endpoint")
# What follows srun. 85 asks to be requeued; above 128 the worker was killed. A job that is not
# RUNNING any more is being cancelled, or put into the queue by Slurm itself.
REQUEUE = (
    "code=$?",
    "task=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}",
    'if [ "$code" = 85 ] || [ "$code" -gt 128 ]; then',
    '  for _ in 1 2 3; do state=$(squeue -h -j "$task" -o %T) && break; sleep 5; done',
    '  if [ "$state" = RUNNING ]; then trap \'\' TERM; scontrol requeue "$task"; fi',
    "fi",
    'exit "$code"',
)


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """A request for one job array; `number` is that of its record, `tasks` the number of tasks.

    Each task is shared by so many `processes`.
    """

    name: str
    step: str
    tasks: int
    dependency: str
    number: int
    processes: int = 1


def submit(run: Run, cluster: SlurmConfig, batch: BatchRequest) -> str:
    """Submit an array; return its job id.

    Raises
    ------
    SlurmRefused
        If Slurm rejects the job; `QueueFull` where a limit on submitted jobs is the reason.
    SlurmError
        If neither sbatch nor squeue answer, so that the array may be in the queue or not.
    """
    logs = run.layout.job_logs(batch.number)
    with atomic.write_errors(logs):
        logs.mkdir(parents=True, exist_ok=True)
    executor, answer = _executor(run, cluster, batch), ""
    for _ in range(TRIES):
        try:
            with slurm.clean_environment(), contextlib.redirect_stderr(io.StringIO()):
                return executor.submit_command(_command(run, cluster, batch), batch.tasks)
        except FileNotFoundError:
            raise slurm.missing_command("sbatch") from None
        except OSError:  # the batch script can't be written
            with atomic.write_errors(logs):
                raise
        except FailedSubmissionError as error:
            # submitted, by an sbatch whose answer submitit can't parse
            for task in slurm.queue(batch.name):
                return task.job_id.split("_")[0]
            raise SlurmError(str(error), next="check which sbatch this machine runs") from None
        except FailedJobError as error:
            answer = str(error).strip()
        if any(text in answer for text in FULL):
            raise QueueFull(
                f"Slurm accepts no more jobs: {answer}",
                next="run the same command again when some of your jobs have ended",
            )
        if not any(text in answer for text in PASSING):
            raise SlurmRefused(
                f"sbatch refused the {batch.step} array: {answer}",
                where="cluster",
                next=_hint(run.plan, cluster, batch, answer),
            )
        time.sleep(PAUSE_SECONDS)
        # the job may be submitted although the answer was lost
        for task in slurm.queue(batch.name):
            return task.job_id.split("_")[0]
    raise SlurmTimeout(
        f"sbatch did not answer for the {batch.step} array: {answer}",
        next="check that Slurm is up (scontrol ping), then run the same command again",
    )


def _hint(plan: Plan, cluster: SlurmConfig, batch: BatchRequest, answer: str) -> str:
    elsewhere = not on_gpu(batch.step) and any(vars(cluster.cpu_jobs).values())
    return refusals.hint(
        answer,
        to="cluster.cpu_jobs." if elsewhere else "cluster.",
        gb=math.ceil(memory_gb(plan, cluster, batch)),
        gpus=gpus(cluster, batch.step),
        cpus=_cpus(plan, cluster, batch.step),
        minutes=cluster.time,
    )


def script(run: Run, cluster: SlurmConfig, batch: BatchRequest) -> str:
    """The batch script of an array."""
    return _executor(run, cluster, batch).text(_command(run, cluster, batch), batch.tasks)


def memory_gb(plan: Plan, cluster: SlurmConfig, batch: BatchRequest) -> float:
    """Memory that a task asks for, all of its processes together."""
    if cluster.memory_gb:
        return cluster.memory_gb
    kinds = [kind for kind in STEPS.get(batch.step, ()) if kind.count(plan)]
    needed = max((kind.memory(plan) for kind in kinds), default=CELL_RECORD_BYTES * count(plan))
    base = BASE_GB + (CUDA_GB if gpus(cluster, batch.step) else 0)
    if any(kind.runs_problem for kind in kinds):  # twice: a worker reads more of it than planning
        base += 0 if plan.problem_bytes else UNMEASURED_GB
        needed += 2 * plan.problem_bytes
    return batch.processes * (base + -(-needed // 2**30))


def on_gpu(step: str) -> bool:
    """Whether a task of this step has cells that compute on the device that is asked for."""
    return any(kind.gpu for kind in STEPS.get(step, ()))


def gpus(cluster: SlurmConfig, step: str) -> int:
    """How many GPUs a task of this step asks for."""
    return cluster.gpus_per_node if on_gpu(step) and cluster.device != "cpu" else 0


def processes(cluster: SlurmConfig, step: str, tasks: Sequence[graph.Task]) -> int:
    """How many processes share each task: one for each GPU that there is something to do for.

    As many as the site's own options of sbatch say, if they do.
    """
    named = {str(key).replace("_", "-"): str(value) for key, value in cluster.sbatch.items()}
    for option in ("ntasks-per-node", "ntasks"):
        if named.get(option, "").isdecimal():
            return max(1, int(named[option]))
    largest = max(map(graph.chains, tasks), default=1)
    return max(1, min(gpus(cluster, step), largest))


def destination(cluster: SlurmConfig, step: str) -> dict[str, str]:
    """Partition, account, QOS, nodes that tasks of this step ask for, where not the site's own."""
    names = ("partition", "account", "qos", "constraint", "exclude")
    chosen = {n: getattr(cluster, n) for n in names}
    if not on_gpu(step):
        chosen |= {n: v for n in names if (v := getattr(cluster.cpu_jobs, n))}
    return {n: v for n, v in chosen.items() if v}


class _Sbatch(submitit.SlurmExecutor):
    """submitit's batch scripts and its sbatch, for a command in place of a pickled function."""

    @classmethod
    def affinity(cls) -> int:
        return 2  # whether sbatch is there shows when it is run

    def text(self, command: str, tasks: int) -> str:
        self.parameters["map_count"] = tasks
        return self._make_submission_file_text(command, "")

    def submit_command(self, command: str, tasks: int) -> str:
        self.parameters["map_count"] = tasks
        return self._submit_command(command).job_id


def _command(run: Run, cluster: SlurmConfig, batch: BatchRequest) -> str:
    python = cluster.python or shlex.quote(sys.executable)
    return f"{python} -u -m trak_dist.task {shlex.quote(str(run.layout.run_dir))} {batch.number}"


def _executor(run: Run, cluster: SlurmConfig, batch: BatchRequest) -> _Sbatch:
    executor = _Sbatch(folder=run.layout.job_logs(batch.number))
    executor.update_parameters(**_parameters(run, cluster, batch))
    return executor


def _parameters(run: Run, cluster: SlurmConfig, batch: BatchRequest) -> dict[str, Any]:
    cpus = _cpus(run.plan, cluster, batch.step)
    logs = shlex.quote(str(run.layout.job_logs(batch.number)))
    log = '"${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}_%t_log.out"'
    parameters: dict[str, Any] = {
        "job_name": batch.name,
        "time": cluster.time,
        "mem": f"{math.ceil(1024 * memory_gb(run.plan, cluster, batch))}M",
        "cpus_per_task": cpus,
        "gpus_per_node": gpus(cluster, batch.step) or None,
        "signal_delay_s": cluster.signal_delay,
        "array_parallelism": cluster.array_parallelism or batch.tasks,
        "dependency": batch.dependency or None,
        "stderr_to_stdout": True,
        "setup": [
            f"export {LOG_VARIABLE}={logs}/{log}",
            *(f"{{ {line}\n}} || exit 1" for line in cluster.setup),
        ],
        "teardown": list(REQUEUE),
        # Since 22.05 srun does not take --cpus-per-task from sbatch. Logs are appended to when
        # requeued. A process that ends or fails before the others of its task does not end them.
        "srun_args": [
            *(f"--cpus-per-task={cpus}", "--open-mode=append"),
            *("--wait=0", "--kill-on-bad-exit=0"),
        ],
        "additional_parameters": {
            "requeue": True,
            "kill-on-invalid-dep": "yes",
            **({"ntasks-per-node": batch.processes} if batch.processes > 1 else {}),
            **destination(cluster, batch.step),
            **cluster.sbatch,
        },
    }
    # Without a wckey of submitit's: some sites refuse those that they don't know.
    return {k: v for k, v in parameters.items() if v is not None} | {"wckey": None}


def _cpus(plan: Plan, cluster: SlurmConfig, step: str) -> int:
    return cluster.cpus_per_task or 1 + _threads(plan, step)


def _threads(plan: Plan, step: str) -> int:
    return max((kind.threads(plan) for kind in STEPS.get(step, ())), default=1)
