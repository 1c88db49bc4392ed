"""What this machine gives to a process, and what surrounds it: cores, memory, job, log."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Who starts a worker says in it where its output goes, %t being its number.
LOG_VARIABLE = "TRAK_DIST_LOG"
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's if less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [physical]
    for path in map(Path, _CGROUP_LIMITS):
        with contextlib.suppress(OSError, ValueError):  # no such control group, or "max"
            limits.append(int(path.read_text()))
    return min(limits)


def resident_bytes() -> int:
    """Bytes of memory that this process holds now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class StepProcess:
    """One of `count` processes that one srun started; `local` is its number on its node."""

    number: int
    count: int
    local: int


def step_process() -> StepProcess:
    """Which of them this is; the only one where srun did not start it."""
    get = os.environ.get
    count = int(get("SLURM_STEP_NUM_TASKS", "1"))  # SLURM_NTASKS is there without srun too
    return StepProcess(int(get("SLURM_PROCID", "0")), count, int(get("SLURM_LOCALID", "0")))


def process() -> dict[str, Any]:
    """Host, process, job (`12_3` for task 3 of Slurm's array 12) and log file of this process."""
    get = os.environ.get
    array, index = get("SLURM_ARRAY_JOB_ID"), get("SLURM_ARRAY_TASK_ID")
    job_id = f"{array}_{index}" if array else get("SLURM_JOB_ID") or get("SUBMITIT_LOCAL_JOB_ID")
    directory, slash, log = get(LOG_VARIABLE, "").rpartition("/")
    return {
        "host": get("SLURMD_NODENAME") or socket.gethostname(),
        "pid": os.getpid(),
        "job_id": job_id or "",
        "log": directory + slash + log.replace("%t", str(step_process().number)),
    }
