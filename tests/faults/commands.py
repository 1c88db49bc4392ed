"""Commands and tasks as processes of their own, forked from one that has imported everything."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import zarr.core.sync
from fault_injection import Fault, Layer, note, step_clock

from trak_dist import launch, task
from trak_dist.cells import of_stage
from trak_dist.executors.local import run_logged
from trak_dist.executors.protocol import CellIds, RunCells
from trak_dist.status.verify import damaged_cells
from trak_dist.store.run import Run

HUNG_SECONDS = 120.0
HUNG = "hung"
Listings = dict[str, tuple[float, frozenset[str]]]  # names in directories, believed for seconds


@dataclass
class Process:
    """A forked process, whose output goes to a file."""

    pid: int
    output: Path

    def wait(self, seconds: float = HUNG_SECONDS) -> int | str:
        """Its exit code, negative for a signal; `HUNG` if it had to be killed after so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        self.kill()
        os.waitpid(self.pid, 0)
        return HUNG

    def kill(self, by: int = signal.SIGKILL) -> None:
        """Send a signal."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, by)

    @property
    def said(self) -> str:
        """All that it wrote so far."""
        return self.output.read_text()


def start(do: Callable[[], int], output: Path) -> Process:
    """Fork a process that does something and ends with the code that comes of it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Process(pid, output)
    code = 99
    try:
        os.setpgid(0, 0)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = do()
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def launched(
    arguments: Sequence[str], *, workers: int = 0, of_worker: Callable[[int], None]
) -> int:
    """`python -m trak_dist.launch`, its cells in this process, or in `workers` forked ones."""
    sys.argv = ["trak-dist", "cluster=debug", *arguments]
    if workers:
        launch._executor = lambda *_: Forked(workers, of_worker)  # type: ignore[assignment]
    launch.main()
    return 0


@dataclass
class Forked:
    """The local executor, but for how its processes come to be."""

    workers: int
    of_worker: Callable[[int], None]

    def run(self, job: RunCells, tasks: Sequence[CellIds], tick: Callable[[], None]) -> None:
        """See `trak_dist.executors.protocol.Executor`."""
        count = min(self.workers, len(tasks))
        shares = [
            tasks[i * len(tasks) // count : (i + 1) * len(tasks) // count] for i in range(count)
        ]
        running = {self._start(job, share, i) for i, share in enumerate(shares)}
        try:
            while running:
                running -= {pid for pid in running if os.waitpid(pid, os.WNOHANG)[0]}
                tick()
                time.sleep(0.01)
        except BaseException:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise

    def _start(self, job: RunCells, tasks: Sequence[CellIds], number: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            self.of_worker(number)
            run_logged(job, [cell for one in tasks for cell in one])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)


def tasked(run_dir: Path, step: str, index: int, count: int) -> int:
    """A task of an array of one's own: its share of a step's cells."""
    os.environ |= {
        "SLURM_ARRAY_JOB_ID": "12",
        "SLURM_ARRAY_TASK_ID": str(index),
        "SLURM_ARRAY_TASK_MIN": "0",
        "SLURM_ARRAY_TASK_MAX": str(count - 1),
        "SLURM_ARRAY_TASK_COUNT": str(count),
    }
    task.PAUSE_SECONDS = 0.1
    return task.main([str(run_dir), step, "--device", "cpu"])


def below(root: Path, fault: Fault, listings: Listings) -> None:
    """Put the layer below this process, whose counts are written when it ends."""
    if fault.kind == "clock steps":
        note(str(root), "clock steps")
        step_clock(fault.seed)
        return
    now = time.monotonic()
    seen = {path: (now + seconds, names) for path, (seconds, names) in listings.items()}
    layer = Layer(str(root), fault, listings=seen)
    layer.install()


def counted(root: Path, do: Callable[[], int], to: Path) -> int:
    """Do something above a layer without fault, and write how often it did what with files."""
    layer = Layer(str(root), Fault())
    layer.install()
    try:
        return do()
    finally:
        to.write_text(json.dumps(layer.counts))


def found(run_dir: Path, to: Path) -> int:
    """Write the digests of all that a run's cells made, and what is damaged."""
    run = Run.open(run_dir)
    stages = ("train", "featurize", "reduce", "evaluate", "report")
    done = {
        c.id: r.digests for s in stages for c, r in run.receipts.done(of_stage(run.plan, s)).items()
    }
    every = [c.id for s in stages for c in of_stage(run.plan, s)]
    damaged = {c.id: why for c, why in damaged_cells(run)}
    missing = [c for c in every if c not in done]
    to.write_text(json.dumps({"done": done, "damaged": damaged, "missing": missing}))
    return 0


def import_what_a_command_needs(do: Callable[[], int]) -> None:
    """Do something here, for what it imports; no thread of it is left to be missed by a fork."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        do()
    logging.root.handlers.clear()  # which write there
    zarr.core.sync.cleanup_resources()
