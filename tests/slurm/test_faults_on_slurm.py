"""What a cluster does to jobs: by itself, or by one repeated command, the scores are the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from on_slurm import SLURM, Lab, finish, overrides, running, scores, status, wait

from trak_dist.status.queue import read_queue
from trak_dist.store.jobs import JobRecords
from trak_dist.store.run import Run


def attempts(run_dir: Path) -> int:
    """The most attempts that a task had."""
    jobs = JobRecords(Run.open(run_dir))
    tried = (jobs.attempt(str(n), i) for n in jobs.numbers() for i in range(8))
    return max(a.number for a in tried if a)


def preempt() -> None:
    """Fill all nodes, for a moment, with jobs that may preempt."""
    subprocess.run(
        [
            *("sbatch", "--wait", "--partition=high", "--array=1-4", "--exclusive", "--mem=60G"),
            *("--cpus-per-task=8", "--output=/dev/null", "--wrap=sleep 1"),
        ],
        check=True,
        timeout=120,
    )


@pytest.mark.parametrize("partition", ["low", pytest.param("lowkill", marks=pytest.mark.long)])
def test_preempted_tasks_resume(launch, path: Path, expected: np.ndarray, partition: str) -> None:
    run = path / "run"
    asked = (*SLURM, f"cluster.partition={partition}")
    assert launch(*overrides(path, "run", seconds=3.0), *asked).code == 0
    wait("a finished cell", lambda: bool(status(run).stages["featurize"].done))
    preempt()
    found = finish(run, 180)
    assert found.complete
    assert attempts(run) == 2
    assert np.array_equal(scores(run), expected)


@pytest.mark.slow
@pytest.mark.long
def test_a_task_that_takes_longer_than_its_time_resumes_until_it_is_done(
    launch, path: Path, expected: np.ndarray
) -> None:
    run = path / "run"
    asked = ("cluster=slurm", "cluster.rows_per_task=32", "cluster.memory_gb=1")
    # Slurm warns up to a minute early: some attempts finish a cell, some abandon theirs.
    timed = ("cluster.time=1", "cluster.signal_delay=24", "cluster.max_attempts=50")
    assert launch(*overrides(path, "run", seconds=11.0), *asked, *timed).code == 0
    found = finish(run, 600)
    assert found.complete
    assert attempts(run) >= 3
    assert np.array_equal(scores(run), expected)


@pytest.mark.long
@pytest.mark.parametrize("how", ["crash", "kill"])
def test_a_lost_node_is_no_loss(
    launch, path: Path, expected: np.ndarray, lab: Lab, how: str
) -> None:
    """With `kill` the orphaned task lasts long enough to meet the one that takes its place."""
    run = path / "run"
    assert (
        launch(*overrides(path, "run", seconds={"crash": 3.0, "kill": 13.0}[how]), *SLURM).code == 0
    )
    wait("a finished cell", lambda: bool(status(run).stages["featurize"].done))
    queue = read_queue(JobRecords(Run.open(run)))
    node = next(task.node for task, _ in queue.tasks if task.state == "RUNNING")
    lab("node", node, how)
    try:
        found = finish(run, 180)
    finally:
        lab("node", node, "start")
    assert found.complete
    assert attempts(run) == 2
    assert np.array_equal(scores(run), expected)


@pytest.mark.long
def test_a_killed_worker_begins_again(launch, path: Path, expected: np.ndarray) -> None:
    run = path / "run"
    (path / "act").write_text("die")
    assert launch(*overrides(path, "run"), *SLURM).code == 0
    assert finish(run).complete
    assert not (path / "act").exists()
    assert attempts(run) == 2
    assert np.array_equal(scores(run), expected)


@pytest.mark.long
def test_a_worker_that_always_dies_is_given_up_and_named(launch, path: Path) -> None:
    run = path / "run"
    assert launch(*overrides(path, "run"), *SLURM, "stage=plan").code == 0
    (path / "act").write_text("always")
    asked = (*SLURM, "cluster.max_attempts=2", "stage=featurize")
    assert launch(*overrides(path, "run"), *asked).code == 0
    found = finish(run)
    assert found.failed
    ended = launch("stage=status", f"run_dir={run}")
    assert ended.code == 1
    assert "2 attempts in a row ended silently before they finished a cell" in ended.out


@pytest.mark.long
def test_a_cancelled_task_is_submitted_again_by_the_same_command(
    launch, path: Path, expected: np.ndarray
) -> None:
    run = path / "run"
    arguments = [*overrides(path, "run", seconds=1.0), *SLURM]
    assert launch(*arguments, "cluster.array_parallelism=1").code == 0
    wait("a running task", lambda: bool(running(run)))
    queue = read_queue(JobRecords(Run.open(run))).tasks
    pending = [t for t, _ in queue if t.state == "PENDING" and "-featurize-" in t.name]
    subprocess.run(["scancel", pending[-1].job_id], check=True)
    found = finish(run)
    assert not found.complete
    assert [str(c.model_id) for c in found.stages["featurize"].missing] == ["1"] * 2
    assert launch(*arguments).code == 0
    assert finish(run).complete
    assert np.array_equal(scores(run), expected)


@pytest.mark.long
def test_a_running_task_that_is_cancelled_stays_cancelled(launch, path: Path) -> None:
    run = path / "run"
    arguments = [*overrides(path, "run", seconds=3.0), *SLURM, "stage=featurize"]
    assert launch(*arguments).code == 0
    wait("running tasks", lambda: bool(running(run)))
    time.sleep(5)
    assert launch("stage=cancel", f"run_dir={run}").code == 0
    finish(run, 30)
    time.sleep(3)
    assert not status(run).queue.tasks
    ended = launch("stage=status", f"run_dir={run}")
    assert ended.code == 1
    assert "the task ended silently" in ended.out


@pytest.mark.long
def test_the_controller_and_accounting_come_and_go(
    launch, path: Path, expected: np.ndarray, lab: Lab
) -> None:
    run = path / "run"
    arguments = [*overrides(path, "run", seconds=2.0), *SLURM]
    lab("daemon", "slurmdbd", "stop")
    try:
        assert launch(*arguments).code == 0
        wait("running tasks", lambda: bool(running(run)))
        lab("daemon", "slurmctld", "stop")
        ended = launch("stage=status", f"run_dir={run}")
        assert ended.code == 0
        assert "what is running or queued is unknown: squeue" in ended.out
        lab("daemon", "slurmctld", "start")
        assert finish(run).complete
    finally:
        lab("daemon", "slurmdbd", "start")
    assert np.array_equal(scores(run), expected)


@pytest.mark.long
def test_a_cell_that_always_fails_ends_what_waits_for_it(
    launch, path: Path, expected: np.ndarray
) -> None:
    run = path / "run"
    (path / "act").write_text("fail")
    arguments = [*overrides(path, "run"), *SLURM]
    assert launch(*arguments).code == 0
    found = finish(run)
    assert {c.id for c in found.stages["featurize"].failed} == {
        "featurize/0/train/8-12",
        "featurize/1/train/8-12",
    }
    assert not found.stages["reduce"].done
    ended = launch("stage=status", f"run_dir={run}")
    assert ended.code == 1
    assert "failed featurize/0/train/8-12 and 1 more cells, with the same error on n" in ended.out
    assert "RuntimeError: row 9 can't be read" in ended.out
    assert "acting_problem.py" in ended.out  # the traceback
    (path / "act").unlink()
    assert launch(*arguments).code == 0
    assert finish(run).complete
    assert np.array_equal(scores(run), expected)


@pytest.mark.long
def test_without_accounting_all_but_decoration_works(
    launch, path: Path, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = path / "commands"
    commands.mkdir()
    for name in ("sbatch", "srun", "squeue", "scancel", "scontrol"):
        (commands / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", f"{commands}:{Path(sys.executable).parent}:/bin.none")
    for name in ("bash", "sh", "sleep"):
        (commands / name).symlink_to(str(shutil.which(name, path=os.defpath)))
    assert shutil.which("sacct") is None
    assert shutil.which("sacctmgr") is None
    run = path / "run"
    assert launch(*overrides(path, "run"), *SLURM).code == 0
    assert finish(run).complete
    assert launch("stage=status", f"run_dir={run}").code == 0
    assert np.array_equal(scores(run), expected)


@pytest.mark.long
def test_a_setup_line_that_fails_ends_the_task_and_is_reported(launch, path: Path) -> None:
    run = path / "run"
    asked = (*SLURM, "cluster.setup=['sh -c \"echo no such module; exit 3\"']")
    assert launch(*overrides(path, "run"), *asked).code == 0
    found = finish(run)
    assert not found.stages["featurize"].done
    ended = launch("stage=status", f"run_dir={run}")
    out = ended.out
    assert ended.code == 1
    assert "lost   featurize/0/train/0-4 and 3 more cells on ?, job " in out
    assert "the task ended before its worker began" in out
    assert "no such module" in out


def test_the_processes_of_a_task_share_its_cells_though_one_dies(
    launch, path: Path, expected: np.ndarray
) -> None:
    run = path / "run"
    (path / "act").write_text("die")
    assert launch(*overrides(path, "run"), *SLURM, "cluster.gpus_per_node=2").code == 0
    assert finish(run, 240).complete
    logs = {log: log.read_text() for log in (run / "logs" / "slurm").glob("*/*_log.out")}
    began = [log for log, text in logs.items() if "cells to do" in text]
    assert {log.stem.split("_")[2] for log in began if "featurize/" in logs[log]} == {"0", "1"}
    computed = [
        line.split()[3]
        for text in logs.values()
        for line in text.splitlines()
        if ": done in " in line
    ]
    assert len(computed) == len(set(computed)), "each cell once"
    assert attempts(run) == 1, "of process 0; that of process 1 was killed"
    assert np.array_equal(scores(run), expected)
