"""One task of a Slurm job: its cells, its exit code, its attempts, and Slurm's signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from blocking_problem import AT
from killing import Killed
from submission_assertions import fail, finish, opened, publish

from trak_dist import graph, machine, plan_file, task, worker
from trak_dist.cells import of_stage, parse_cell
from trak_dist.errors import PlanMismatch
from trak_dist.runtime.inputs import require
from trak_dist.store import atomic
from trak_dist.store.jobs import Attempt, JobRecords
from trak_dist.store.run import Run

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
FIRST = ["featurize/0/train/0-8", "featurize/0/train/8-16", "featurize/0/train/16-24"]
KERNEL = ["gram/0", "kernel/0", "precondition/0/val", "precondition/0/test"]

Main = Callable[..., int]


@pytest.fixture
def run(launch, tiny_run, tmp_path: Path, fake_slurm) -> Run:
    assert launch(*tiny_run, "stage=plan").code == 0
    return opened(tmp_path)


@pytest.fixture
def log(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What tasks log; Hydra, with which `run` is made, has closed pytest's own way to it."""
    lines: list[str] = []
    for name in ("info", "error"):
        monkeypatch.setattr(task.log, name, lambda text, *values: lines.append(text % values))
    return lines


@pytest.fixture
def main(run: Run, monkeypatch: pytest.MonkeyPatch) -> Main:
    """`python -m trak_dist.task RUN …` in this process, whose signals stay what they are."""

    class Unwarned:
        grace_seconds = 0.0

        def __call__(self) -> bool:
            return False

    monkeypatch.setattr(task, "TerminationNotice", Unwarned)
    monkeypatch.setattr(task, "PAUSE_SECONDS", 0.0)

    def called(*arguments: object, index: int | None = None) -> int:
        with pytest.MonkeyPatch.context() as patch:
            if index is not None:
                patch.setenv("SLURM_ARRAY_TASK_ID", str(index))
            return task.main([str(run.layout.run_dir), *map(str, arguments)])

    return called


def done(run: Run, cells: Sequence[str]) -> list[str]:
    return [cell.id for cell in run.receipts.done([parse_cell(c) for c in cells])]


def attempt(run: Run, job: object, index: int = 0) -> Attempt:
    found = JobRecords(run).attempt(str(job), index)
    assert found
    return found


# The task of a submitted job ----------------------------------------------------------------------


def test_a_submitted_task_runs_its_cells_and_no_others(main: Main, run: Run, log) -> None:
    job = publish(run, FIRST[:1], FIRST[1:])
    assert main(job, index=1) == 0
    assert done(run, FIRST) == FIRST[1:]
    assert attempt(run, job, 1).number == 1
    assert main(job, index=1) == 0
    assert log[-1] == "all 2 cells were done before"
    assert attempt(run, job, 1).number == 1, "where nothing is left no attempt begins"


def test_a_task_resumes_where_it_was_left(main: Main, run: Run, monkeypatch) -> None:
    finish(run, FIRST[:1])
    begun = []
    real = worker._run_cell
    monkeypatch.setattr(worker, "_run_cell", lambda s, c: (begun.append(c.id), real(s, c)))
    assert main(publish(run, FIRST)) == 0
    assert begun == FIRST[1:]


def test_a_task_with_a_cell_that_fails(main: Main, run: Run, monkeypatch) -> None:
    real = tiny.Rows.__getitem__

    def broken(self: tiny.Rows, index: int) -> object:
        if index == 9:
            raise RuntimeError("row 9 can't be read")
        return real(self, index)

    monkeypatch.setattr(tiny.Rows, "__getitem__", broken)
    assert main(publish(run, FIRST)) == 1
    assert done(run, FIRST) == [FIRST[0], FIRST[2]]
    failure = run.receipts.failure(parse_cell(FIRST[1]))
    assert failure
    assert "reading row 9 of 'train' raised RuntimeError: row 9 can't be read" in failure.error


def test_a_task_whose_inputs_are_missing(main: Main, run: Run) -> None:
    assert main(publish(run, KERNEL, step="kernel")) == 1
    assert done(run, KERNEL) == []
    failures = run.receipts.failures(map(parse_cell, KERNEL))
    assert [c.id for c in failures] == KERNEL[:1], "the others lack this one"


def test_a_task_for_another_plan(main: Main, run: Run, log) -> None:
    job = publish(run, FIRST)
    path = run.layout.job(job)
    path.write_text(path.read_text().replace(run.plan.fingerprint, "another"))
    assert main(job) == 1
    assert log[-1].startswith(
        f"this job was made for fingerprint another, the plan has {run.plan.fingerprint}\n"
    )
    assert done(run, FIRST) == []


def test_an_index_beyond_the_tasks(main: Main, run: Run, log) -> None:
    job = publish(run, FIRST)
    assert main(job, index=1) == 1
    assert f"job {job} has 1 tasks, there is no task 1" in log[-1]


def test_a_job_that_was_never_published(main: Main, run: Run, log) -> None:
    assert main(7) == 1
    assert f"where: {run.layout.job(7)}" in log[-1]


def test_a_damaged_record(main: Main, run: Run, log) -> None:
    job = publish(run, FIRST)
    run.layout.job(job).write_text("{")
    assert main(job) == 1
    assert "the job's record can't be read (Expecting property name" in log[-1]
    assert "next:  run the launch command again: what is missing is submitted again" in log[-1]


def test_a_directory_without_a_run(main: Main, tmp_path: Path, log) -> None:
    assert task.main([str(tmp_path / "nowhere"), "1"]) == 1
    assert "there is no run here: plan.json is missing" in log[-1]


@pytest.fixture
def as_process(main: Main, monkeypatch) -> Callable[..., int]:
    """As one of several processes that srun started for one task."""

    def called(number: int, count: int, *arguments: object) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_PROCID", str(number))
            patch.setenv("SLURM_LOCALID", str(number))
            patch.setenv("SLURM_STEP_NUM_TASKS", str(count))
            return main(*arguments)

    return called


def test_the_processes_of_a_task_share_its_cells(as_process, run: Run, asked, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    for what, cells, chains in (
        (publish(run, FIRST), FIRST, 3),
        (publish(run, KERNEL, step="kernel"), KERNEL, 1),
        ("kernel", [c.id for chain in graph.tasks(run.plan, "kernel") for c in chain], 3),
    ):
        for count in (2, 5):
            asked.clear()
            assert {as_process(number, count, what) for number in range(count)} == {0}
            assert [cell for share in asked for cell in share] == cells, "each cell once"
            assert len(asked) == min(count, chains), "what depends on another stays with it"


def test_each_process_of_a_task_counts_its_own_attempts(as_process, run: Run, monkeypatch) -> None:
    job = publish(run, FIRST, max_attempts=1)

    def run_cells(run_dir, fingerprint, device, cell_ids, stopped, pauses) -> bool:
        if cell_ids == FIRST[2:]:
            raise Killed
        finish(run, cell_ids)
        return True

    monkeypatch.setattr(worker, "run_cells", run_cells)
    assert as_process(0, 2, job) == 0
    with pytest.raises(Killed):
        as_process(1, 2, job)
    assert as_process(0, 2, job) == 0, "nothing is left"
    assert as_process(1, 2, job) == 1
    counted = [JobRecords(run).attempt(str(job), 0, process) for process in (0, 1)]
    assert [a and a.fruitless for a in counted] == [1, 2]
    assert [c.id for c in run.receipts.failures(map(parse_cell, FIRST))] == FIRST[2:]


def test_each_process_of_a_node_has_a_gpu_and_a_log_of_its_own(
    as_process, run: Run, monkeypatch
) -> None:
    devices, logs, current = [], [], []

    def run_cells(run_dir, fingerprint, device, *_: object) -> bool:
        devices.append(device)
        logs.append(machine.process()["log"])
        return True

    monkeypatch.setattr(worker, "run_cells", run_cells)
    monkeypatch.setenv(machine.LOG_VARIABLE, "/a%t/1_0_%t_log.out")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for number in range(3):
        as_process(number, 3, publish(run, FIRST, device="auto"))
    assert devices == ["cuda:0", "cuda:1", "cuda:0"]
    assert current == [0, 1, 0]
    assert logs == [f"/a%t/1_0_{number}_log.out" for number in range(3)]
    as_process(1, 2, publish(run, FIRST, device="cpu"))
    as_process(0, 1, publish(run, FIRST, device="auto"))
    assert devices[3:] == ["cpu", "auto"]


# Receipts of other nodes, which this one may see later -------------------------------------------


@pytest.fixture
def unseen(run: Run, monkeypatch) -> SimpleNamespace:
    """Cells ask for their inputs and do no more; what happens in each pause is up to a test."""
    seen = SimpleNamespace(slept=[], meanwhile={}, log=[])

    def run_cell(session, cell) -> None:
        done = session.run.receipts.done(graph.upstream(run.plan, [cell], ()))
        require(session.run, list(cell.dependencies(run.plan, done)), needed_by=cell)
        finish(run, [cell])

    def sleep(seconds: float) -> None:
        seen.slept.append(seconds)
        seen.meanwhile.get(len(seen.slept), lambda: None)()

    monkeypatch.setattr(worker, "_run_cell", run_cell)
    monkeypatch.setattr(task.time, "sleep", sleep)
    for name in ("info", "warning"):
        monkeypatch.setattr(worker.log, name, lambda text, *v: seen.log.append(text % v))
    return seen


@pytest.fixture
def on_slurm(main: Main, unseen, monkeypatch) -> Main:
    monkeypatch.setattr(task, "PAUSE_SECONDS", 5.0)
    return main


def grads(run: Run, model_id: int) -> list[str]:
    return [c.id for c in of_stage(run.plan, "featurize") if c.model_id == model_id]


def test_a_task_that_sees_its_inputs_late_runs_as_if_it_had_seen_them(
    on_slurm: Main, run: Run, unseen
) -> None:
    unseen.meanwhile[3] = lambda: finish(run, grads(run, 0))
    assert on_slurm(publish(run, KERNEL, step="kernel")) == 0
    assert done(run, KERNEL) == KERNEL
    assert unseen.slept == [5.0] * 3
    assert run.receipts.failures(map(parse_cell, KERNEL)) == {}


def test_a_task_looks_for_longer_than_nfs_may_hide_its_inputs_and_then_says_which_they_are(
    on_slurm: Main, run: Run, unseen
) -> None:
    hidden = grads(run, 0)[-1]
    finish(run, grads(run, 0)[:-1])
    assert on_slurm(publish(run, KERNEL, step="kernel")) == 1
    assert unseen.slept == [5.0] * 18, "in all, not for each of its cells"
    assert sum(unseen.slept) > 60
    assert (
        "gram/0: not run: after retrying for 90 s, 1 of the cells that gram/0 needs are not done: "
        f"{hidden}"
    ) in unseen.log
    failure = run.receipts.failure(parse_cell("gram/0"))
    assert failure
    assert failure.error.startswith("after retrying for 90 s, 1 of the cells that gram/0 needs")
    assert [line.split(":")[0] for line in unseen.log if ": not run: " in line] == KERNEL


def test_a_task_whose_inputs_failed_does_not_wait_for_them(
    on_slurm: Main, run: Run, unseen
) -> None:
    finish(run, grads(run, 0)[1:])
    fail(run, grads(run, 0)[0])
    assert on_slurm(publish(run, KERNEL, step="kernel")) == 1
    assert on_slurm(publish(run, ["score/val/0-50"], step="score")) == 1, "nor at two removes"
    assert unseen.slept == []


def test_a_failure_of_an_older_plan_is_no_reason_not_to_look_again(
    on_slurm: Main, run: Run, unseen
) -> None:
    fail(run, grads(run, 0)[0])
    path = run.layout.failure(run.plan, parse_cell(grads(run, 0)[0]))
    path.write_text(path.read_text().replace(parse_cell(grads(run, 0)[0]).key(run.plan), "older"))
    unseen.meanwhile[1] = lambda: finish(run, grads(run, 0))
    assert on_slurm(publish(run, KERNEL, step="kernel")) == 0


def test_a_task_that_is_warned_while_it_looks_requeues(run: Run, unseen) -> None:
    warned = SimpleNamespace(said=False)
    unseen.meanwhile[2] = lambda: setattr(warned, "said", True)
    cells = tuple(map(parse_cell, KERNEL))
    given = task.Assignment("1", 0, run.plan.fingerprint, cells, "cpu", 1.0, 5)
    assert task._run(JobRecords(run), given, lambda: warned.said, (5.0,) * 18) == 85
    assert unseen.slept == [5.0, 5.0]
    assert run.receipts.failures(map(parse_cell, KERNEL)) == {}


def test_where_the_launcher_waits_for_its_workers_nobody_looks_again(
    run: Run, launch, tiny_run, unseen, monkeypatch
) -> None:
    real, hidden = worker._run_cell, grads(run, 0)[0]
    monkeypatch.setattr(worker, "_run_cell", lambda s, c: None if c.id == hidden else real(s, c))
    assert launch(*tiny_run).code == 1
    assert not worker.run_cells(str(run.layout.run_dir), run.plan.fingerprint, "cpu", KERNEL)
    assert unseen.slept == []


def test_a_checkpoint_that_another_node_trains_is_waited_for(
    launch, tiny_run, tmp_path: Path, monkeypatch
) -> None:
    trained = ["problem._target_=tiny_trained.problem", "checkpoints.train=1", *tiny_run[2:]]
    assert launch(*trained, "stage=plan").code == 0
    run, slept = opened(tmp_path), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        worker.run_cells(str(run.layout.run_dir), run.plan.fingerprint, "cpu", ["train/full/0"])

    monkeypatch.setattr(worker.time, "sleep", sleep)
    where = str(run.layout.run_dir), run.plan.fingerprint, "cpu"
    assert not worker.run_cells(*where, FIRST[:1])
    assert run.receipts.failures(map(parse_cell, FIRST)) == {}
    assert worker.run_cells(*where, FIRST[:1], retry_delays=[5.0])
    assert slept == [5.0]


def test_a_task_that_sees_an_older_plan_waits_for_the_one_it_was_submitted_for(
    on_slurm: Main, run: Run, unseen, log
) -> None:
    job = publish(run, FIRST[:1], generation=1)
    later = replace(run.plan, self_influence=True)
    unseen.meanwhile[2] = lambda: run.extend(later)
    assert on_slurm(job) == 0
    assert unseen.slept == [5.0, 5.0]
    assert on_slurm(publish(run, FIRST, generation=2)) == 1
    assert log[-1].startswith(
        "after retrying for 90 s, the job was submitted for plan.2.json, which is not there\n"
    )


def test_a_task_that_sees_the_plan_of_a_run_that_was_here_before_waits_for_its_own(
    on_slurm: Main, run: Run, unseen, log
) -> None:
    path, digest = run.layout.plan(0), run.plan_digest(0)
    own, before = path.read_text(), plan_file.dump(replace(run.plan, targets=run.plan.targets[:1]))
    job = publish(run, ["featurize/0/test/0-5"], plan=digest)
    path.write_text(before)
    unseen.meanwhile[2] = lambda: path.write_text(own)
    assert on_slurm(job) == 0
    assert unseen.slept == [5.0, 5.0]
    path.write_text(before)
    assert on_slurm(job) == 1
    assert log[-1] == (
        "after retrying for 90 s, the job was submitted for plan.json, which has digest "
        f"{run.plan_digest(0)} here, {digest} there\n"
        f"  where: {path}\n"
        "  next:  run the launch command again: what is missing is submitted again"
    )
    with pytest.raises(PlanMismatch, match="the plan was superseded: featurize/0/test/0-5 has key"):
        run.check_not_superseded(parse_cell("featurize/0/test/0-5"))


def test_a_task_that_sees_its_own_record_late_waits_for_it(
    on_slurm: Main, run: Run, unseen
) -> None:
    unseen.meanwhile[2] = lambda: publish(run, FIRST[:1])
    assert on_slurm(1) == 0
    assert unseen.slept == [5.0, 5.0]


@pytest.mark.parametrize(("hidden", "code"), [(0.3, 0), (1e9, 1)])
def test_a_task_whose_listings_are_older_than_its_inputs(
    main: Main, run: Run, monkeypatch, hidden: float, code: int
) -> None:
    """Nor do they show what it wrote itself."""
    cells = [cell.id for cell in of_stage(run.plan, "featurize")]
    assert worker.run_cells(str(run.layout.run_dir), run.plan.fingerprint, "cpu", cells)
    names, receipts = atomic.names, run.layout.run_dir / "receipts"

    def old(directory: Path) -> set[str]:
        found = names(directory)
        if not directory.is_relative_to(receipts) or directory.name == "failed":
            return found
        limit = time.time() - hidden
        return {name for name in found if (directory / name).stat().st_mtime < limit}

    job = publish(run, KERNEL, step="kernel")
    monkeypatch.setattr(atomic, "names", old)
    monkeypatch.setattr(task, "PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(task, "PAUSES", 12)
    assert main(job) == code
    monkeypatch.undo()
    assert done(run, KERNEL) == ([] if code else KERNEL)
    failures = run.receipts.failures(map(parse_cell, KERNEL))
    assert [c.id for c in failures] == (KERNEL[:1] if code else [])


# A share of a step --------------------------------------------------------------------------------


@pytest.fixture
def asked(main: Main, monkeypatch) -> Iterator[list[list[str]]]:
    """The cells of each worker, none of which does anything."""
    cells: list[list[str]] = []

    def run_cells(run_dir, fingerprint, device, cell_ids, stopped, pauses) -> bool:
        cells.append(list(cell_ids))
        return True

    monkeypatch.setattr(worker, "run_cells", run_cells)
    return cells


@pytest.mark.parametrize("first", [0, 1, 5])
def test_the_shares_of_an_array_are_all_cells_once(
    main: Main, run: Run, asked, monkeypatch, first: int
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", str(first))
    for step, counts in (("featurize", (1, 4, 27, 30)), ("kernel", (2, 3)), ("report", (2, 5))):
        every = [cell.id for cells in graph.tasks(run.plan, step) for cell in cells]
        for count in counts:
            asked.clear()
            monkeypatch.setenv("SLURM_ARRAY_JOB_ID", f"{step}{count}")
            monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", str(count))
            monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", str(first + count - 1))
            assert {main(step, index=first + i) for i in range(count)} == {0}
            assert [cell for share in asked for cell in share] == every
            assert max(map(len, asked)) <= -(-len(every) // count) + (2 if step == "kernel" else 0)


def test_without_an_array_the_share_is_the_whole_step(main: Main, run: Run, asked) -> None:
    assert main("kernel") == 0
    assert asked == [[c.id for t in graph.tasks(run.plan, "kernel") for c in t]]


def test_the_device_of_a_share_is_what_its_command_says(main: Main, monkeypatch) -> None:
    devices = []
    monkeypatch.setattr(worker, "run_cells", lambda *given: devices.append(given[2]) or True)
    assert main("featurize") == 0
    assert main("featurize", "--device", "cpu") == 0
    assert devices == ["auto", "cpu"]


def test_an_array_with_gaps_is_refused_or_has_all_cells(
    main: Main, run: Run, asked, monkeypatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "0")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    codes = [main("featurize", index=index) for index in (0, 2)]
    assert sum(map(len, asked)) == 27 or codes == [1, 1]


def test_an_unknown_step(main: Main, log) -> None:
    assert main("featurise") == 1
    assert (
        "'featurise' is not a step\n"
        "  next:  one of train, featurize, gram, kernel, score, top, counterfactual, evaluate, "
        "report"
    ) in log[-1]


# Attempts -----------------------------------------------------------------------------------------


@pytest.fixture
def dies(main: Main, monkeypatch) -> Callable[..., None]:
    """An attempt at a job whose worker dies, after it finished some cells."""

    def attempted(run: Run, job: object, *finished: str) -> None:
        def run_cells(*_: object) -> bool:
            finish(run, finished)
            raise Killed

        monkeypatch.setattr(worker, "run_cells", run_cells)
        with pytest.raises(Killed):
            main(job)

    return attempted


def test_attempts_in_a_row_that_finish_nothing_come_to_an_end(
    main: Main, run: Run, dies, log
) -> None:
    job = publish(run, FIRST, max_attempts=2)
    finish(run, FIRST[:1])
    dies(run, job)
    dies(run, job)
    assert run.receipts.failures(map(parse_cell, FIRST)) == {}
    assert main(job) == 1
    error = (
        "2 attempts in a row ended silently before they finished a cell\n"
        f"  where: {FIRST[1]}\n"
        "  next:  see the log's end; memory (cluster.memory_gb), time (cluster.time), or smaller "
        "cells (featurize.cell_rows, in a new run) may help"
    )
    assert error in log[-1]
    failure = run.receipts.failure(parse_cell(FIRST[1]))
    assert failure
    assert (failure.error, failure.expected) == (error, True)
    assert failure.job["attempt"] == 2


def test_status_tells_of_a_task_that_was_given_up(
    main: Main, run: Run, dies, launch, tmp_path: Path
) -> None:
    job = publish(run, FIRST, max_attempts=1)
    dies(run, job)
    assert main(job) == 1
    ended = launch("stage=status", f"run_dir={tmp_path / 'run'}")
    assert ended.code == 1
    assert f"\nfailed {FIRST[0]} on " in ended.out
    assert ("\n  1 attempts in a row ended silently before they finished a cell\n") in ended.out


def test_progress_begins_the_count_anew(main: Main, run: Run, dies) -> None:
    job = publish(run, FIRST, max_attempts=2)
    dies(run, job)
    dies(run, job, FIRST[0])
    dies(run, job)
    dies(run, job, FIRST[1])
    assert (attempt(run, job).number, attempt(run, job).fruitless) == (4, 2)
    dies(run, job)
    dies(run, job)
    assert main(job) == 1
    assert [c.id for c in run.receipts.failures(map(parse_cell, FIRST))] == [FIRST[2]]


def test_a_new_array_begins_the_count_anew(main: Main, run: Run, dies) -> None:
    first = publish(run, FIRST, max_attempts=1)
    dies(run, first)
    assert main(first) == 1
    second = publish(run, FIRST, max_attempts=1)
    dies(run, second)
    assert attempt(run, second).number == 1


def test_a_damaged_count_starts_over(main: Main, run: Run, dies) -> None:
    job = publish(run, FIRST, max_attempts=1)
    dies(run, job)
    run.layout.attempt(str(job), 0).write_text("{")
    dies(run, job)
    assert attempt(run, job).fruitless == 1


def test_the_shares_of_an_array_of_ones_own_count_their_attempts(
    main: Main, run: Run, monkeypatch, log
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")

    def run_cells(*_: object) -> bool:
        raise Killed

    monkeypatch.setattr(worker, "run_cells", run_cells)
    with pytest.raises(Killed):
        main("featurize", "--max-attempts", 1)
    assert main("featurize", "--max-attempts", 1) == 1
    assert "1 attempts in a row ended silently" in log[-1]
    assert attempt(run, "sbatch-12-featurize").fruitless == 2


def test_the_steps_of_one_job_count_their_attempts_apart(main: Main, run: Run, monkeypatch) -> None:
    def run_cells(run_dir, fingerprint, device, cell_ids, stopped, pauses) -> bool:
        finish(run, cell_ids)
        return True

    monkeypatch.setattr(worker, "run_cells", run_cells)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    steps = ("featurize", "kernel", "score", "report")
    assert [main(step, "--max-attempts", 2) for step in steps] == [0, 0, 0, 0]


# Signals ------------------------------------------------------------------------------------------


@pytest.fixture
def waiting_run(launch, tiny_run, tmp_path: Path, fake_slurm) -> Run:
    overrides = [o.replace("tiny.problem", "blocking_problem.problem") for o in tiny_run]
    assert launch(*overrides, "stage=plan").code == 0
    return opened(tmp_path)


@pytest.fixture
def started(waiting_run: Run, tmp_path: Path) -> Iterator[Callable[[int], subprocess.Popen[bytes]]]:
    """A task in its second cell, in a process of its own."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(job: int) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "PYTHONPATH": f"{HERE}:{HERE.parent}",
            "OMP_NUM_THREADS": "1",
            "SLURM_ARRAY_JOB_ID": "12",
            "SLURM_ARRAY_TASK_ID": "0",
            AT: str(tmp_path),
        }
        command = [sys.executable, "-m", "trak_dist.task", str(waiting_run.layout.run_dir)]
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen([*command, str(job)], env=environment, stderr=log)
        processes.append(process)
        until = time.monotonic() + 60
        while not (tmp_path / "reached").exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.02)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_after_a_termination_notice_a_task_finishes_its_cell_and_requeues(
    started, waiting_run: Run, tmp_path: Path
) -> None:
    process = started(publish(waiting_run, FIRST, signal_delay=100))
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR2)
    time.sleep(0.1)
    (tmp_path / "go").touch()
    assert process.wait(60) == 85
    assert done(waiting_run, FIRST) == FIRST[:2]
    log = (tmp_path / "log").read_text()
    assert "Slurm announced the end; the running cell has 50 s to finish" in log
    assert attempt(waiting_run, 1).job["job_id"] == "12_0"


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    code = f"import hashlib, os, signal, time\nfrom trak_dist.task import TerminationNotice\n{code}"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_cell_that_is_stuck_when_warned_is_abandoned() -> None:
    """Even in a call that no handler of Python's interrupts."""
    ended = in_a_process(
        "warned = TerminationNotice()\n"
        "warned.grace_seconds = 0.2\n"
        "os.kill(os.getpid(), signal.SIGUSR2)\n"
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"
    )
    assert ended.returncode == 85
    assert "the running cell is abandoned, and the task requeued" in ended.stderr


def test_a_grace_period_is_used_to_the_end() -> None:
    ended = in_a_process(
        "warned = TerminationNotice()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(0.1)\n"
        "print(warned())\n"
        "os.kill(os.getpid(), signal.SIGUSR2)\n"
        "time.sleep(0.1)\n"
        "print(warned())\n"
    )
    assert (ended.returncode, ended.stdout) == (0, "False\nTrue\n")


def test_a_worker_that_was_warned_begins_no_further_cell(run: Run) -> None:
    asked = iter([False, True])
    run_dir, fingerprint = str(run.layout.run_dir), run.plan.fingerprint
    assert not worker.run_cells(run_dir, fingerprint, "cpu", FIRST, lambda: next(asked))
    assert done(run, FIRST) == FIRST[:1]


def test_a_failed_cell_of_a_task_that_was_warned_does_not_keep_it_from_another_go(
    run: Run, monkeypatch
) -> None:
    def run_cells(*_: object) -> bool:
        fail(run, FIRST[0])
        return False

    monkeypatch.setattr(worker, "run_cells", run_cells)
    warned = SimpleNamespace(grace_seconds=0.0, said=True)
    given = task.Assignment("1", 0, run.plan.fingerprint, (parse_cell(FIRST[0]),), "cpu", 1.0, 5)
    assert task._run(JobRecords(run), given, lambda: warned.said, ()) == 85
    warned.said = False
    assert task._run(JobRecords(run), given, lambda: warned.said, ()) == 1
