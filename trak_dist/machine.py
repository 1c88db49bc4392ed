"""What this machine gives to a process: cores and memory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from trak_dist.errors import MemoryRefused

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


def fit_workers(*, wanted: int, needed: int, memory: int, what: str) -> int:
    """How many of `wanted` workers fit into `memory`, if each needs `needed` bytes.

    Raises
    ------
    MemoryRefused
        If not even one does.
    """
    fitting = memory // needed
    if fitting < 1:
        raise MemoryRefused(
            f"{what} needs {needed / 2**30:,.1f} GiB, a worker has {memory / 2**30:,.1f} GiB",
            where="proj_dim",
            next="a smaller proj_dim (memory goes with its square), or cluster.memory_gb=…",
        )
    return min(wanted, fitting)
