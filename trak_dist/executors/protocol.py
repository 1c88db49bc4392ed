"""The protocol of executors: run tasks somewhere, and call back for progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

# A task: ids of cells, to run in this order in one process.
CellIds = tuple[str, ...]
RunCells = Callable[[Sequence[str]], object]


class Executor(Protocol):
    """Runs tasks with a job. What came of them is in the run directory, not returned."""

    def run(self, job: RunCells, tasks: Sequence[CellIds], tick: Callable[[int], None]) -> None:
        """Run all `tasks`, in any order; call `tick` with the workers at work now and then."""
        ...
