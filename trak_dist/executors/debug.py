"""debug: one task after another, in this process, so that `breakpoint()` and `pdb` work."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trak_dist.executors.protocol import CellIds, RunCells


class DebugExecutor:
    """Runs tasks in this process."""

    def run(self, job: RunCells, tasks: Sequence[CellIds], tick: Callable[[int], None]) -> None:
        """See `Executor`."""
        for number, task in enumerate(tasks, 1):
            job(task)
            tick(int(number < len(tasks)))
