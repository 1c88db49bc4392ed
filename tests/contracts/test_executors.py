"""What every executor does: all tasks once, in order within a task, and a word now and then."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from trak_dist.errors import StoreError
from trak_dist.executors.debug import DebugExecutor
from trak_dist.executors.local import LocalExecutor, _Local
from trak_dist.executors.protocol import CellIds, Executor

Make = Callable[[Path], Executor]
TASKS: list[CellIds] = [("a1", "a2", "a3"), ("b1",), ("c1", "c2"), ("d1",), ("e1", "e2")]


def debug(directory: Path) -> Executor:
    return DebugExecutor()


def local(directory: Path) -> Executor:
    return LocalExecutor(logs=directory / "logs", workers=2, gpus=0, log_variable="TEST_LOG")


@pytest.fixture(autouse=True)
def _workers_find_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.delenv("TEST_LOG", raising=False)


@pytest.fixture(params=[debug, local], ids=["debug", "local"])
def make(request: pytest.FixtureRequest) -> Make:
    return request.param


def append(directory: str, cells: Sequence[str]) -> None:
    """A job: one line for each cell, in a file that no other process writes."""
    with Path(directory, f"{os.getpid()}.ran").open("a") as file:
        file.writelines(f"{cell}\n" for cell in cells)


def append_or_die(directory: str, death: str, cells: Sequence[str]) -> None:
    """A job that dies silently at the cell `b1`, by exit or by signal."""
    for cell in cells:
        if cell == "b1" and death == "exit":
            os._exit(3)
        if cell == "b1":
            os.kill(os.getpid(), signal.SIGKILL)
        append(directory, [cell])


def append_and_tell_the_log(directory: str, cells: Sequence[str]) -> None:
    """A job that says which log file it was given."""
    append(directory, [f"{cell} {os.environ.get('TEST_LOG', '')}" for cell in cells])


def append_for_long(directory: str, cells: Sequence[str]) -> None:
    """A job that goes on for much longer than any test."""
    for _ in range(200):
        append(directory, cells)
        time.sleep(0.05)


def ran(directory: Path) -> list[list[str]]:
    """The cells that each process ran, in its order."""
    return [p.read_text().splitlines() for p in sorted(directory.glob("*.ran"))]


def flat(tasks: Sequence[Sequence[str]]) -> list[str]:
    """All cells of all tasks, or of all processes, sorted."""
    return sorted(cell for task in tasks for cell in task)


def run(make: Make, directory: Path, tasks: list[CellIds]) -> int:
    """Run `tasks`; how often the executor ticked."""
    ticks: list[int] = []
    job = functools.partial(append, str(directory))
    make(directory).run(job, tasks, ticks.append)
    return len(ticks)


def test_every_cell_runs_once_and_in_order_within_its_task(make: Make, tmp_path: Path) -> None:
    assert run(make, tmp_path, TASKS) > 0
    processes = ran(tmp_path)
    assert flat(processes) == flat(TASKS)
    for task in TASKS:
        (together,) = [[c for c in cells if c in task] for cells in processes if task[0] in cells]
        assert together == list(task)


def test_all_cells_have_run_when_the_executor_returns_in_a_directory_of_any_name(
    make: Make, odd_path: Path
) -> None:
    run(make, odd_path, TASKS)
    assert flat(ran(odd_path)) == flat(TASKS)


def test_one_task_is_run_by_one_process(make: Make, tmp_path: Path) -> None:
    assert run(make, tmp_path, TASKS[:1]) > 0
    assert ran(tmp_path) == [["a1", "a2", "a3"]]


def test_no_tasks_are_no_work(make: Make, tmp_path: Path) -> None:
    run(make, tmp_path, [])
    assert ran(tmp_path) == []


def test_debug_starts_no_task_after_an_interrupt(tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        debug(tmp_path).run(functools.partial(append, str(tmp_path)), TASKS, interrupt)
    assert ran(tmp_path) == [["a1", "a2", "a3"]]


@pytest.mark.slow
def test_local_leaves_no_worker_running_after_an_interrupt(tmp_path: Path) -> None:
    def interrupt_once_both_work(_: int) -> None:
        if len(ran(tmp_path)) == 2:
            raise KeyboardInterrupt

    job = functools.partial(append_for_long, str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        local(tmp_path).run(job, TASKS[:2], interrupt_once_both_work)
    lines = ran(tmp_path)
    time.sleep(0.3)
    assert ran(tmp_path) == lines


def test_local_shares_the_tasks_among_processes_other_than_this_one(tmp_path: Path) -> None:
    run(local, tmp_path, TASKS)
    assert len(ran(tmp_path)) == 2
    assert not (tmp_path / f"{os.getpid()}.ran").exists()


def test_debug_runs_in_this_process(tmp_path: Path) -> None:
    assert run(debug, tmp_path, TASKS) == len(TASKS)
    assert [p.stem for p in tmp_path.glob("*.ran")] == [str(os.getpid())]


@pytest.mark.parametrize("death", ["exit", "signal"])
def test_local_neither_hangs_nor_stops_the_others_when_a_worker_dies(
    tmp_path: Path, death: str
) -> None:
    tasks = [("a1",), ("b1", "b2"), ("c1",), ("d1",)]
    job = functools.partial(append_or_die, str(tmp_path), death)
    local(tmp_path).run(job, tasks, lambda _: None)
    assert sorted(ran(tmp_path)) == [["a1"], ["c1", "d1"]]


def test_local_gives_each_worker_a_log_that_is_there(tmp_path: Path) -> None:
    job = functools.partial(append_and_tell_the_log, str(tmp_path))
    local(tmp_path).run(job, TASKS[:2], lambda _: None)
    logs = {cell.split(" ", 1)[1] for cells in ran(tmp_path) for cell in cells}
    assert len(logs) == 2
    assert all(Path(log).is_relative_to(tmp_path / "logs") and Path(log).exists() for log in logs)


def test_local_starts_no_work_that_it_leaves_alone_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, calls = _Local.start, itertools.count()

    def full(*given: object) -> object:
        if next(calls):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return submit(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(_Local, "start", full)
    job = functools.partial(append_for_long, str(tmp_path))
    with pytest.raises(StoreError, match="no disk space: No space left on device"):
        local(tmp_path).run(job, TASKS[:2], lambda _: None)
    lines = ran(tmp_path)
    time.sleep(0.3)
    assert ran(tmp_path) == lines


def refuse(directory: str, cells: Sequence[str]) -> None:
    """A job that can't begin."""
    raise StoreError("not readable: Permission denied", where=directory, next="check permissions")


def test_what_a_local_worker_could_not_begin_for_is_in_its_log_in_our_words(
    tmp_path: Path,
) -> None:
    local(tmp_path).run(functools.partial(refuse, str(tmp_path)), TASKS[:1], lambda _: None)
    (log,) = (tmp_path / "logs").rglob("*.err")
    assert "ERROR not readable: Permission denied" in log.read_text()
    assert "Traceback" not in log.read_text()


def append_and_tell_where_pickles_are(directory: str, cells: Sequence[str]) -> None:
    """A job that says where it was loaded from, and who else may write there."""
    folder = Path(os.environ["SUBMITIT_FOLDER"])
    pickled = [path.name for path in folder.glob("*.pkl")]
    append(directory, [f"{folder} {folder.stat().st_mode & 0o777:o} {len(pickled)}"])


def test_local_loads_pickles_only_from_where_nobody_else_can_put_one(tmp_path: Path) -> None:
    job = functools.partial(append_and_tell_where_pickles_are, str(tmp_path))
    local(tmp_path).run(job, TASKS[:2], lambda _: None)
    told = [line for cells in ran(tmp_path) for line in cells]
    folders = {Path(line.split()[0]) for line in told}
    assert len(told) == 2
    assert len(folders) == 1
    assert {line.split()[1] for line in told} == {"700"}
    assert all(int(line.split()[2]) >= 1 for line in told)
    assert not any(folder.is_relative_to(tmp_path) or folder.exists() for folder in folders)
    assert not list(tmp_path.rglob("*.pkl"))
