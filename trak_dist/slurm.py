"""What Slurm's commands report: the queue, its limits, past jobs. Knows nothing of cells.

The one place that runs them, but for sbatch, which submitit runs. A call asks for all jobs at once.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import os
import re
import subprocess
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from trak_dist.errors import ConfigError, SlurmError, SlurmNotFound, SlurmTimeout

TIMEOUT_SECONDS = 60
UNLIMITED = 10**9
# States of a job that Slurm still has plans for.
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
NEVER = "DependencyNeverSatisfied"
_PRESERVED = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
_SCRUBBED = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SQUEUE_", "SACCT_", "SCANCEL_", "SUBMITIT_")


@dataclass(frozen=True)
class QueuedTask:
    """One task in the queue; `job_id` is `12_3` for task 3 of array 12."""

    job_id: str
    name: str
    state: str
    reason: str
    node: str

    @property
    def has_started(self) -> bool:
        """Whether it has begun."""
        return self.state in RUNNING

    @property
    def ended(self) -> bool:
        """Whether its processes have ended, or are being killed."""
        return self.state == "COMPLETING"

    @property
    def unsatisfiable(self) -> bool:
        """Whether its dependency can never be satisfied."""
        return self.reason.strip("()") == NEVER


@dataclass(frozen=True)
class Limits:
    """How much may be submitted: tasks in one array, and tasks in total, besides those queued.

    `why` names the limit behind `room`.
    """

    array: int
    room: int
    why: str


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """Hide variables of a surrounding job, or of the user's shell, from Slurm's commands.

    A job that submits jobs would else hand them its own memory and CPU binding, and sbatch takes
    SBATCH_PARTITION and its like over what the script says.
    """
    hidden = {
        k: v for k, v in os.environ.items() if k.startswith(_SCRUBBED) and k not in _PRESERVED
    }
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def queue(name_pattern: str) -> list[QueuedTask]:
    """The user's tasks in the queue whose job names match `name_pattern`.

    Raises
    ------
    SlurmError
        If squeue is missing or fails.
    """
    columns = "%i|%j|%T|%r|%N"
    tasks = (
        QueuedTask(*fields)
        for fields in _table("squeue", "-h", "-r", "-u", getpass.getuser(), "-o", columns)
        if len(fields) == 5  # else a foreign job with a bar in its name
    )
    alive = (t for t in tasks if t.state in (*RUNNING, *WAITING))
    return [t for t in alive if re.fullmatch(name_pattern, t.name)]


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs; those that have ended are ignored.

    Raises
    ------
    SlurmError
        If scancel is missing or fails.
    """
    if job_ids:
        _run("scancel", "--quiet", *job_ids)


def states(job_ids: Sequence[str]) -> dict[str, str]:
    """What accounting says became of jobs; empty where there is no accounting."""
    if not job_ids:
        return {}
    try:
        rows = _table("sacct", "-nXP", "-j", ",".join(job_ids), "-o", "JobID,State")
    except SlurmError:
        return {}
    return {row[0]: row[1] for row in rows}


def limits(destinations: Collection[tuple[str, str]]) -> Limits:
    """How much this user may submit now, to these accounts and QOSes; empty: the default ones.

    Without an accounting database only the largest array is known, and sbatch decides.

    Raises
    ------
    SlurmError
        If scontrol or squeue is missing or fails.
    """
    config = _run("scontrol", "show", "config")
    array = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
    cluster = re.search(r"^ClusterName\s*=\s*(\S+)", config, re.MULTILINE)
    bounds: set[_Bound] = set()
    with contextlib.suppress(SlurmError):
        for account, qos in destinations:
            bounds |= set(_bounds(cluster[1] if cluster else "", account, qos))
    room, why = UNLIMITED, ""
    if bounds:
        queued = Counter(
            named
            for fields in _table("squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%q|%a")
            for named in zip(("QOS", "account"), fields, strict=True)
        )
        room, why = min(
            (b.limit - queued[b.kind, b.name], f"{b.limit} jobs of {b.kind} {b.name}")
            for b in bounds
        )
    return Limits(max(1, int(array[1])) if array else UNLIMITED, room, why)


@dataclass(frozen=True)
class _Bound:
    """The most jobs that a user may have in the queue in one account or QOS."""

    kind: str
    name: str
    limit: int


def _bounds(cluster: str, account: str, qos: str) -> Iterator[_Bound]:
    named = [f"user={getpass.getuser()}", *([f"cluster={cluster}"] if cluster else [])]
    columns = "format=account,maxsubmitjobs,defaultqos"
    for name, most, default_qos in _table("sacctmgr", "-nP", "show", "assoc", *named, columns):
        if account in ("", name):
            qos = qos or default_qos
            if most:
                yield _Bound("account", name, int(most))
    if qos:
        for name, most in _table("sacctmgr", "-nP", "show", "qos", qos, "format=name,maxsubmitpu"):
            if most:
                yield _Bound("QOS", name, int(most))


def longest_job(partitions: str) -> int:
    """Minutes of the longest job in any of `partitions`, `a,b`; in the default one if empty.

    Raises
    ------
    ConfigError
        If there is no partition of that name.
    """
    lines = _run("scontrol", "-a", "-o", "show", "partition").splitlines()
    listed = [dict(f.split("=", 1) for f in line.split() if "=" in f) for line in lines]
    by_name = {fields.get("PartitionName", ""): fields for fields in listed}
    names = partitions.split(",") if partitions else []
    for name in names:
        if name not in by_name:
            raise ConfigError(
                f"there is no partition {name!r}; there are {', '.join(sorted(by_name))}",
                where="cluster.partition",
                next="cluster.partition=… one of them",
            )
    chosen = [
        f for n, f in by_name.items() if n in names or (not names and f.get("Default") == "YES")
    ]
    return max((_minutes(fields.get("MaxTime", "")) for fields in chosen), default=UNLIMITED)


def _minutes(text: str) -> int:
    """Slurm's [days-]hours:minutes:seconds in minutes."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if not found:
        return UNLIMITED
    days, hours, minutes, _ = (int(part or 0) for part in found.groups())
    return (24 * days + hours) * 60 + minutes


def _table(*command: str) -> list[list[str]]:
    """The fields of each line, which are separated by bars."""
    return [line.split("|") for line in _run(*command).splitlines() if "|" in line]


def missing_command(command: str) -> SlurmNotFound:
    """The error for a Slurm command that is missing."""
    return SlurmNotFound(
        f"{command} is not there: this machine has no Slurm commands",
        next="launch where sbatch and squeue work, or use cluster=local",
        errno=errno.ENOENT,
    )


def _run(*command: str) -> str:
    with clean_environment():
        try:
            ended = subprocess.run(  # noqa: S603 -- no shell, and names of commands from here
                command, capture_output=True, text=True, check=True, timeout=TIMEOUT_SECONDS
            )
        except FileNotFoundError:
            raise missing_command(command[0]) from None
        except subprocess.TimeoutExpired:
            raise SlurmTimeout(
                f"{command[0]} did not answer within {TIMEOUT_SECONDS} s",
                next="check that Slurm is up (scontrol ping), then run the same command again",
            ) from None
        except subprocess.CalledProcessError as error:
            raise SlurmError(
                f"{command[0]} failed: {(error.stderr or error.stdout).strip()}",
                where=" ".join(command),
                next="check that Slurm is up (scontrol ping), then run the same command again",
            ) from None
    return ended.stdout
