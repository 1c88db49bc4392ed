"""What this machine gives to a process, and what surrounds it: cores, memory, job, log."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

LOG_VARIABLE = "TRAK_DIST_LOG"  # who starts a worker says in it where its output goes
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


def process() -> dict[str, Any]:
    """Host, process, job (`12_3` for task 3 of Slurm's array 12) and log file of this process."""
    get = os.environ.get
    array, index = get("SLURM_ARRAY_JOB_ID"), get("SLURM_ARRAY_TASK_ID")
    job_id = f"{array}_{index}" if array else get("SLURM_JOB_ID") or get("SUBMITIT_LOCAL_JOB_ID")
    return {
        "host": get("SLURMD_NODENAME") or socket.gethostname(),
        "pid": os.getpid(),
        "job_id": job_id or "",
        "log": get(LOG_VARIABLE, ""),
    }
