"""What the Slurm tests do: start a run, wait for it, look at it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trak_dist import open_run
from trak_dist.status.state import Status, read_status
from trak_dist.store.run import Run

SCRIPT = Path(__file__).parent.parent.parent / "launch" / "slurm-lab"
SLURM = ("cluster=slurm", "cluster.rows_per_task=16", "cluster.memory_gb=1")


@dataclass(frozen=True)
class Lab:
    """A running Slurm."""

    directory: Path
    options: tuple[str, ...]

    def __call__(self, *arguments: str) -> None:
        command = [sys.executable, str(SCRIPT), "--dir", str(self.directory), *self.options]
        subprocess.run([*command, *arguments], check=True, timeout=120)


def overrides(path: Path, name: str, *, seconds: float = 0.0) -> list[str]:
    return [
        *("problem._target_=acting_problem.problem", f"+problem.directory={path / 'checkpoints'}"),
        *(f"+problem.seconds={seconds}", f"run_dir={path / name}", "proj_dim=16"),
        *("featurize.batch_rows=4", "featurize.cell_rows=4"),
    ]


def status(run_dir: Path) -> Status:
    return read_status(Run.open(run_dir))


def undone_cells(run_dir: Path) -> int:
    return sum(len(stage.cells) - len(stage.done) for stage in status(run_dir).stages.values())


def wait(what: str, ready: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, f"waited {seconds} s for {what}"
        time.sleep(0.3)


def finish(run_dir: Path, seconds: float = 120) -> Status:
    """Wait until none of the run's jobs is in the queue."""
    wait("an empty queue", lambda: not status(run_dir).queue.tasks, seconds)
    return status(run_dir)


def running(run_dir: Path, step: str = "featurize") -> list[str]:
    """The run's tasks of one step that run."""
    queue = status(run_dir).queue
    return [t.job_id for t, _ in queue.tasks if t.state == "RUNNING" and f"-{step}-" in t.name]


def scores(run_dir: Path) -> np.ndarray:
    return open_run(run_dir).scores("val")
