"""Workers and launchers killed at random moments: the same command completes the run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from trak_dist import open_run
from trak_dist.cells import of_run
from trak_dist.store.run import Run

KILLS = 10 if os.environ.get("LONG") == "1" else 4
TESTS = Path(__file__).parent.parent


def start(path: Path, name: str, cluster: str) -> subprocess.Popen[bytes]:
    command = [
        *(sys.executable, "-m", "trak_dist.launch", "problem._target_=tiny.problem"),
        *(
            f"+problem.directory={path / 'checkpoints'}",
            f"+problem.rows={100 * KILLS}",
            "+problem.targets=40",
        ),
        *(f"run_dir={path / name}", f"cluster={cluster}", "proj_dim=64"),
        *("featurize.batch_rows=4", "featurize.cell_rows=8"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    # To a file: a pipe would be held open by the workers of a killed launcher.
    with (path / "errors").open("wb") as errors:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)


def workers(run_dir: Path) -> list[int]:
    """Processes that run cells of `run_dir`, those of killed launchers included."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"submitit" in command and str(run_dir).encode() in command:
            found.append(int(process.name))
    return found


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def done_cells(run_dir: Path) -> int:
    if not Run.exists(run_dir):
        return 0
    run = Run.open(run_dir)
    return len(run.receipts.done(of_run(run.plan)))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds workers in /proc")
def test_kills_at_random_moments_leave_scores_bitwise_the_same(tmp_path: Path) -> None:
    tiny.write_checkpoints(tmp_path / "checkpoints")
    assert start(tmp_path, "undisturbed", "debug").wait() == 0
    moments = random.Random(0)
    run_dir = tmp_path / "disturbed"
    kills: list[str] = []
    progress = []
    while len(kills) < KILLS:
        launcher = start(tmp_path, "disturbed", "local")
        wait_for_work(run_dir, launcher, moments.uniform(0, 1.0))
        victims = workers(run_dir)
        if moments.random() < 0.5 and victims:
            kill(moments.choice(victims))
            kills.append("worker")
        kill(launcher.pid)  # so that most of the work is left for the kills to come
        kills.append("launcher")
        launcher.wait()
        if moments.random() < 0.7:  # else the orphans go on beside the next launcher's workers
            for pid in workers(run_dir):
                kill(pid)
        progress.append(done_cells(run_dir))
    launcher = start(tmp_path, "disturbed", "local")
    launcher.wait()
    for pid in workers(run_dir):
        kill(pid)
    assert launcher.returncode == 0, (tmp_path / "errors").read_text()
    print(f"kills: {kills}\ncells done after each launch: {progress}")
    assert len(set(progress)) > KILLS // 3, "the kills did not land in the middle of the work"
    for targets in ("val", "test"):
        np.testing.assert_array_equal(
            open_run(run_dir).scores(targets), open_run(tmp_path / "undisturbed").scores(targets)
        )


def wait_for_work(run_dir: Path, launcher: subprocess.Popen[bytes], seconds: float) -> None:
    """Until some worker has been there for `seconds`, or the launcher ended."""
    until = time.monotonic() + 30
    while not workers(run_dir) and launcher.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    before = done_cells(run_dir)
    while done_cells(run_dir) == before and launcher.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(seconds)
