"""What this machine gives to a process, and what surrounds it: cores, memory, job, log."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trak_dist.errors import MemoryRefused

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


def fit_workers(*, wanted: int, needed: Mapping[str, int], memory: int) -> int:
    """How many of `wanted` workers fit into `memory`.

    Parameters
    ----------
    needed : mapping
        Bytes that a worker needs for the largest cell of each kind.

    Raises
    ------
    MemoryRefused
        If not even one fits.
    """
    kind = max(needed, key=lambda k: needed[k])
    if needed[kind] > memory:
        raise MemoryRefused(
            f"a {kind} cell needs {needed[kind] / 2**30:,.1f} GiB, there are "
            f"{memory / 2**30:,.1f} GiB",
            where=kind,
            next=_LESS[kind],
        )
    return min(wanted, memory // needed[kind])


_LESS = {
    "featurize": "a smaller featurize.batch_rows or proj_dim, or cluster.memory_gb=…",
    "gram": "a smaller proj_dim or featurize.cell_rows, or cluster.memory_gb=…",
    "kernel": "a smaller proj_dim (memory goes with its square), or cluster.memory_gb=…",
    "precondition": "a smaller proj_dim, or fewer targets in a set, or cluster.memory_gb=…",
    "score": "a smaller proj_dim, or fewer targets in a set, or cluster.memory_gb=…",
    "evaluate": "fewer ground_truth.subsets, a smaller proj_dim, or cluster.memory_gb=…",
}
