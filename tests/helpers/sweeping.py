"""Small runs by name, and the members of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from command_result import Ended, Launch

from trak_dist.store.run import Run

Command = Callable[..., Ended]


def small_runs(launch: Launch, given: list[str], directory: Path) -> Command:
    """A command on the run `directory / name`, with 20 rows and one target set."""

    def command(name: str, *overrides: str) -> Ended:
        small = ["+problem.rows=20", "targets=val", f"run_dir={directory / name}"]
        return launch(*given, *small, *overrides)

    return command


def members(run_dir: Path) -> dict[int, Path]:
    """The run and the members of its sweep, by `proj_dim`."""
    base = Run.open(run_dir)
    found = [run_dir, *(base.layout.sweeps / name for name in base.layout.members())]
    return {Run.open(path).plan.proj_dim: path for path in found}
