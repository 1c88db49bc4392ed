"""What a launch submits to Slurm, and what it says where Slurm refuses; all commands are faked."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_slurm import FakeSlurm, Queued
from killing import Killed
from submission_assertions import (
    cells_of,
    fail,
    finish,
    opened,
    publish,
    records,
    refuses,
    table,
    told,
)

from trak_dist import site_files, slurm, task
from trak_dist.cells import STEPS, of_step
from trak_dist.configuration.config import SlurmConfig
from trak_dist.executors import batch
from trak_dist.executors import slurm as executor
from trak_dist.status.state import read_status
from trak_dist.status.text import lines
from trak_dist.store import atomic
from trak_dist.store.jobs import JobRecords
from trak_dist.store.run import Run

pytestmark = pytest.mark.slow

MISSING = (
    "{} is not there: this machine has no Slurm commands\n"
    "  next:  launch where sbatch and squeue work, or use cluster=local"
)
FAILED = (
    "{} failed: Unable to contact slurm controller (connect failure)\n"
    "  where: {}\n"
    "  next:  check that Slurm is up (scontrol ping), then run the same command again"
)
SQUEUE = "squeue -h -r -u ada -o %i|%j|%T|%r|%N"
TIMED_OUT = "Batch job submission failed: Socket timed out on send/recv operation"
POLICY = (
    "QOSMaxSubmitJobPerUserLimit\n"
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy "
    "(job submit limit, user's size and/or time limits)"
)
WHOLE_GRAPH = [
    ("featurize", "1", 9, 27, ""),
    ("kernel", "2", 1, 4, "afterok:1_0:1_1:1_2"),
    ("kernel", "3", 1, 4, "afterok:1_3:1_4:1_5"),
    ("kernel", "4", 1, 4, "afterok:1_6:1_7:1_8"),
    ("score", "5", 2, 2, "afterok:2:3:4"),
    ("report", "6", 1, 1, "afterok:5_0"),
    ("report", "7", 1, 1, "afterok:5_1"),
]
FIRST_CHECKPOINT = [("featurize", "1", 3, 9, ""), ("kernel", "2", 1, 4, "afterok:1")]
Launch = Callable[..., SimpleNamespace]


@pytest.fixture
def status(launch: Launch, tmp_path: Path) -> Callable[[], SimpleNamespace]:
    return lambda: launch("stage=status", f"run_dir={tmp_path / 'run'}")


@pytest.fixture
def small_run(slurm_run: list[str]) -> list[str]:
    """One target set only: 2 tasks of featurize for each checkpoint."""
    return [*slurm_run, "targets=val"]


# What is submitted ------------------------------------------------------------------------------


def test_the_whole_graph_is_submitted_at_once(
    launch, slurm_run, fake_slurm: FakeSlurm, tmp_path: Path
) -> None:
    ended = launch(*slurm_run)
    assert table(ended) == WHOLE_GRAPH
    assert told(ended) == []
    assert f"next:   python -m trak_dist.launch stage=status run_dir={tmp_path}/run" in ended.out
    assert records(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    run_id = JobRecords(opened(tmp_path)).run_id
    assert JobRecords(opened(tmp_path)).read(1).plan == opened(tmp_path).plan_digest(0)
    named = [fake_slurm.options(job)["job-name"] for job in range(1, 8)]
    assert named == [f"trak-{step}-{job}-{run_id}" for step, job, *_ in WHOLE_GRAPH]
    assert cells_of(tmp_path, 3) == [
        "gram/1",
        "kernel/1",
        "precondition/1/val",
        "precondition/1/test",
    ]
    assert fake_slurm.options(3)["dependency"] == "afterok:1_3:1_4:1_5"


def test_what_is_done_is_not_submitted(launch, slurm_run, tmp_path: Path) -> None:
    assert launch(*slurm_run, "stage=plan").code == 0
    run = opened(tmp_path)
    finish(run, of_step(run.plan, "featurize"))
    finish(run, ["gram/0", "kernel/0", "precondition/0/val", "precondition/0/test"])
    assert table(launch(*slurm_run)) == [
        ("kernel", "1", 2, 8, ""),
        ("score", "2", 2, 2, "afterok:1"),
        ("report", "3", 1, 1, "afterok:2_0"),
        ("report", "4", 1, 1, "afterok:2_1"),
    ]


def test_nothing_is_submitted_where_all_is_done(launch, slurm_run, fake_slurm, tmp_path) -> None:
    assert launch(*slurm_run, "stage=plan").code == 0
    run = opened(tmp_path)
    finish(
        run,
        (c for step in ("featurize", "kernel", "score", "report") for c in of_step(run.plan, step)),
    )
    assert told(launch(*slurm_run)) == ["nothing to submit: all cells are done"]
    assert fake_slurm.calls("sbatch") == []


def test_a_stage_whose_inputs_nobody_makes_is_refused(launch, slurm_run, tmp_path: Path) -> None:
    refuses(
        launch(*slurm_run, "stage=reduce"),
        "14 cells depend on others that are neither done nor in the queue, gram/0 first\n"
        f"  where: {tmp_path / 'run'}\n"
        "  next:  leave out stage=…: the whole graph is submitted then",
    )
    assert records(tmp_path) == []


def test_dry_run_shows_the_graph_and_asks_slurm_nothing(
    launch, slurm_run, fake_slurm: FakeSlurm, tmp_path: Path
) -> None:
    ended = launch(*slurm_run, "cluster.dry_run=true")
    assert ended.code == 0
    assert "featurize             <1>       9      27\n" in ended.out
    assert "kernel                <2>       1       4  afterok:<1>_0:<1>_1:<1>_2\n" in ended.out
    assert ended.out.count("#!/bin/bash\n") == 7
    assert fake_slurm.home.joinpath("calls").read_text() == ""
    assert records(tmp_path) == []


# Commands that are not there, fail, or give no answer ---------------------------------------------


@pytest.mark.parametrize("command", ["scontrol", "squeue"])
def test_a_command_that_is_not_there(launch, slurm_run, fake_slurm, command: str) -> None:
    fake_slurm.remove(command)
    refuses(launch(*slurm_run), MISSING.format(command))


def test_sbatch_is_not_there(launch, slurm_run, fake_slurm, tmp_path: Path) -> None:
    fake_slurm.remove("sbatch")
    refuses(launch(*slurm_run), MISSING.format("sbatch"))
    assert records(tmp_path) == []


@pytest.mark.parametrize(
    ("command", "where"), [("scontrol", "scontrol -a -o show partition"), ("squeue", SQUEUE)]
)
def test_a_command_that_fails(launch, slurm_run, fake_slurm, command: str, where: str) -> None:
    fake_slurm.fail(command, "Unable to contact slurm controller (connect failure)")
    refuses(launch(*slurm_run), FAILED.format(command, where))
    assert fake_slurm.calls("sbatch") == []


def test_squeue_gives_no_answer(launch, slurm_run, fake_slurm, monkeypatch) -> None:
    monkeypatch.setattr(slurm, "TIMEOUT_SECONDS", 0.1)
    fake_slurm.hang("squeue")
    refuses(
        launch(*slurm_run),
        "squeue did not answer within 0.1 s\n"
        "  next:  check that Slurm is up (scontrol ping), then run the same command again",
    )


def test_scancel_is_not_there_or_fails(launch, small_run, fake_slurm) -> None:
    assert launch(*small_run).code == 0
    fake_slurm.fail("scancel", "Unable to contact slurm controller (connect failure)")
    cancel = ("stage=cancel", small_run[2])
    refuses(launch(*cancel), FAILED.format("scancel", "scancel --quiet 1 2 3 4 5 6"))
    fake_slurm.remove("scancel")
    refuses(launch(*cancel), MISSING.format("scancel"))


@pytest.mark.parametrize("how", ["remove", "fail"])
def test_without_accounting_sbatch_has_the_last_word(
    launch, slurm_run, fake_slurm, how: str
) -> None:
    if how == "remove":
        fake_slurm.remove("sacctmgr")
    else:
        fake_slurm.fail("sacctmgr", "You are not running a supported accounting_storage plugin")
    fake_slurm.limit(5)
    assert table(launch(*slurm_run)) == WHOLE_GRAPH


# sbatch refuses, or its answer is lost ------------------------------------------------------------


def test_a_partition_that_is_not_there(launch, slurm_run, fake_slurm, tmp_path: Path) -> None:
    refuses(
        launch(*slurm_run, "cluster.partition=gppu"),
        "there is no partition 'gppu'; there are cpu, gpu\n"
        "  where: cluster.partition\n"
        "  next:  cluster.partition=… one of them",
    )
    assert records(tmp_path) == []


def test_several_partitions_as_sbatch_takes_them(launch, slurm_run) -> None:
    assert table(launch(*slurm_run, "cluster.partition='gpu,cpu'")) == WHOLE_GRAPH


def test_sbatch_refuses(launch, slurm_run, fake_slurm, tmp_path: Path) -> None:
    fake_slurm.refuse("Batch job submission failed: Invalid account", [1])
    refuses(
        launch(*slurm_run),
        "sbatch refused the featurize array: sbatch: error: Batch job submission failed: Invalid "
        "account\n"
        "  where: cluster\n"
        "  next:  cluster.account=…, one of those that sacctmgr show assoc user=$USER lists; "
        "cluster.dry_run=true shows the script",
    )
    assert len(fake_slurm.calls("sbatch")) == 1
    assert records(tmp_path) == []
    assert table(launch(*slurm_run))[0] == ("featurize", "2", 9, 27, "")


def test_nodes_with_less_memory_than_a_task_asks_for(launch, slurm_run, fake_slurm) -> None:
    fake_slurm.refuse("Memory specification can not be satisfied", [1])
    refuses(
        launch(*slurm_run),
        "sbatch refused the featurize array: sbatch: error: Memory specification can not be "
        "satisfied\n"
        "  where: cluster\n"
        "  next:  cluster.memory_gb=… with less than the 1 GiB that a task asks for; "
        "cluster.dry_run=true shows the script",
    )


def test_what_was_submitted_before_sbatch_refused_is_reported_and_left_alone_afterwards(
    launch, slurm_run, fake_slurm, tmp_path: Path
) -> None:
    fake_slurm.refuse("Batch job submission failed: Invalid qos specification", [3])
    refuses(
        launch(*slurm_run),
        "sbatch refused the kernel array: sbatch: error: Batch job submission failed: Invalid qos "
        "specification; submitted before: 1, 2\n"
        "  where: cluster\n"
        "  next:  cluster.qos=…, one of those that sacctmgr show assoc user=$USER format=qos "
        "lists; cluster.dry_run=true shows the script",
    )
    assert records(tmp_path) == [1, 2]
    ended = launch(*slurm_run)
    assert [row[:2] for row in table(ended)][:2] == [("kernel", "4"), ("kernel", "5")]
    assert told(ended) == ["already in the queue: 31 cells"]


def test_an_answer_that_was_lost_though_the_job_was_taken(
    launch, slurm_run, fake_slurm, tmp_path: Path
) -> None:
    fake_slurm.refuse(TIMED_OUT, [1], queued=True)
    assert table(launch(*slurm_run)) == WHOLE_GRAPH
    assert len(fake_slurm.calls("sbatch")) == 7


def test_an_answer_that_was_lost_with_the_job(launch, slurm_run, fake_slurm, tmp_path) -> None:
    fake_slurm.refuse(TIMED_OUT, [1, 2, 3])
    assert table(launch(*slurm_run))[:2] == [
        ("featurize", "4", 9, 27, ""),
        ("kernel", "5", 1, 4, "afterok:4_0:4_1:4_2"),
    ]
    assert records(tmp_path) == [1, 2, 3, 4, 5, 6, 7]


def test_after_four_tries_it_gives_up(launch, slurm_run, fake_slurm, tmp_path: Path) -> None:
    fake_slurm.refuse(TIMED_OUT, range(1, 10))
    refuses(
        launch(*slurm_run),
        f"sbatch did not answer for the featurize array: sbatch: error: {TIMED_OUT}\n"
        "  next:  check that Slurm is up (scontrol ping), then run the same command again",
    )
    assert len(fake_slurm.calls("sbatch")) == 4
    assert records(tmp_path) == [1]  # for it may still come


def test_the_answer_to_the_last_try_is_lost_though_the_job_was_taken(
    launch, slurm_run, fake_slurm
) -> None:
    fake_slurm.refuse(TIMED_OUT, [1, 2, 3])
    fake_slurm.refuse(TIMED_OUT, [4], queued=True)
    assert table(launch(*slurm_run))[0] == ("featurize", "4", 9, 27, "")


def test_sbatch_and_squeue_fail_together_though_the_job_was_taken(
    launch, slurm_run, fake_slurm, monkeypatch
) -> None:
    fake_slurm.refuse(TIMED_OUT, [1], queued=True)
    slept = SimpleNamespace(sleep=lambda _: fake_slurm.fail("squeue", TIMED_OUT))
    monkeypatch.setattr(batch, "time", slept)
    assert launch(*slurm_run).code == 2
    (fake_slurm.home / "fails" / "squeue").unlink()
    assert launch(*slurm_run).code == 0


# Limits -------------------------------------------------------------------------------------------


def test_arrays_are_cut_at_max_array_size(launch, slurm_run, fake_slurm) -> None:
    fake_slurm.answer(config="MaxArraySize            = 4\n")
    assert table(launch(*slurm_run)) == [
        ("featurize", "1", 4, 16, ""),
        ("featurize", "2", 4, 10, ""),
        ("featurize", "3", 1, 1, ""),
        ("kernel", "4", 1, 4, "afterok:1_0:1_1:1_2"),
        ("kernel", "5", 1, 4, "afterok:1_3:2_0:2_1"),
        ("kernel", "6", 1, 4, "afterok:2_2:2_3:3"),
        ("score", "7", 2, 2, "afterok:4:5:6"),
        ("report", "8", 1, 1, "afterok:7_0"),
        ("report", "9", 1, 1, "afterok:7_1"),
    ]
    assert fake_slurm.options(2)["array"] == "0-3%4"


def test_what_has_no_room_is_submitted_by_a_last_job(
    launch, slurm_run, fake_slurm, tmp_path: Path
) -> None:
    fake_slurm.limit(5)
    ended = launch(*slurm_run)
    assert table(ended) == FIRST_CHECKPOINT
    assert told(ended) == ["no room in the queue for 30 cells: job 3 submits them"]
    assert len(fake_slurm.queue) == 5
    options = fake_slurm.options(3)
    assert options["dependency"] == "afterany:1_0:1_1"
    assert options["job-name"] == f"trak-submit-3-{JobRecords(opened(tmp_path)).run_id}"
    assert options["array"] == "0-0%1"
    assert "gpus-per-node" not in options
    assert f"-m trak_dist.task {tmp_path / 'run'} 3\n" in fake_slurm.script(3)


def test_a_limit_that_is_just_met_needs_no_last_job(launch, slurm_run, fake_slurm) -> None:
    fake_slurm.limit(16)
    ended = launch(*slurm_run)
    assert table(ended) == WHOLE_GRAPH
    assert told(ended) == []


@pytest.mark.parametrize("free", [0, 1])
def test_no_room_at_all(launch, slurm_run, fake_slurm, tmp_path: Path, free: int) -> None:
    fake_slurm.limit(5)
    fake_slurm.queue = [Queued(f"{90 + i}", "train-gpt") for i in range(5 - free)]
    refuses(
        launch(*slurm_run),
        f"the queue has no room: 5 jobs of QOS normal, {free} of them free\n"
        "  next:  run the same command again when some of your jobs have ended",
    )
    assert records(tmp_path) == []
    assert fake_slurm.calls("sbatch") == []


def test_jobs_of_other_qoses_and_other_users_do_not_count(launch, slurm_run, fake_slurm) -> None:
    fake_slurm.limit(5)
    fake_slurm.queue = [
        *(Queued(f"{80 + i}", "train-gpt", qos="high") for i in range(5)),
        *(Queued(f"{90 + i}", "train-gpt", user="bob") for i in range(5)),
    ]
    assert table(launch(*slurm_run)) == FIRST_CHECKPOINT


def test_the_qos_that_is_asked_for_sets_the_limit(launch, slurm_run, fake_slurm) -> None:
    fake_slurm.answer(qos="normal|1\nhigh|6\n")
    ended = launch(*slurm_run, "cluster.qos=high")
    assert table(ended) == [*FIRST_CHECKPOINT, ("featurize", "3", 1, 7, "")]


def test_an_accounts_limit(launch, slurm_run, fake_slurm) -> None:
    fake_slurm.answer(associations="default|2|normal\nlab|3|normal\n")
    fake_slurm.queue = [Queued("90", "train-gpt"), Queued("91", "train-gpt")]
    ended = launch(*slurm_run, "cluster.account=lab")
    assert table(ended) == [("featurize", "1", 2, 8, "")]
    refuses(
        launch(*slurm_run, "cluster.account=default", "force=true"),
        "the queue has no room: 2 jobs of account default, 0 of them free\n"
        "  next:  run the same command again when some of your jobs have ended",
    )


def test_a_limit_that_accounting_does_not_tell(launch, slurm_run, fake_slurm, tmp_path) -> None:
    fake_slurm.refuse(POLICY, range(1, 10))
    refuses(
        launch(*slurm_run),
        f"Slurm accepts no more jobs: sbatch: error: {POLICY}\n"
        "  next:  run the same command again when some of your jobs have ended",
    )
    assert len(fake_slurm.calls("sbatch")) == 1
    assert records(tmp_path) == []


def test_a_limit_that_accounting_does_not_tell_is_met_on_the_way(
    launch, slurm_run, fake_slurm, tmp_path: Path
) -> None:
    fake_slurm.refuse("QOSMaxSubmitJobPerUserLimit", range(3, 10))
    ended = launch(*slurm_run)
    assert [row[:2] for row in table(ended)] == [("featurize", "1"), ("kernel", "2")]
    assert told(ended) == [
        "no room in the queue for 12 cells: run the same command again when some jobs have ended"
    ]
    assert len(fake_slurm.calls("sbatch")) == 4
    assert records(tmp_path) == [1, 2]


def test_a_limit_that_accounting_does_not_tell_leaves_room_for_a_last_job(
    launch, slurm_run, fake_slurm
) -> None:
    fake_slurm.refuse("AssocMaxSubmitJobLimit", [2])
    ended = launch(*slurm_run)
    assert [row[:2] for row in table(ended)] == [("featurize", "1")]
    assert told(ended) == ["no room in the queue for 16 cells: job 3 submits them"]
    assert fake_slurm.options(3)["dependency"] == "afterany:1_0:1_1:1_2:1_3:1_4"


# The same command again ---------------------------------------------------------------------------


def test_nothing_is_submitted_twice(launch, slurm_run, fake_slurm) -> None:
    assert launch(*slurm_run).code == 0
    fake_slurm.set(lambda row: row.job_id == "1_0", state="RUNNING", node="n1")
    ended = launch(*slurm_run)
    assert table(ended) == []
    assert told(ended) == ["already in the queue: 43 cells"]
    assert len(fake_slurm.calls("sbatch")) == 7


def test_exactly_what_is_missing_is_submitted(
    launch, slurm_run, fake_slurm, tmp_path: Path
) -> None:
    assert launch(*slurm_run).code == 0
    run = opened(tmp_path)
    finish(run, (c for c in of_step(run.plan, "featurize") if c.model_id == 0))
    fake_slurm.end("1_0", "1_1", "1_2", "1_4", "3", "5", "6", "7")
    ended = launch(*slurm_run)
    assert table(ended) == [
        ("featurize", "8", 1, 1, ""),
        ("kernel", "9", 1, 4, "afterok:1_3:1_5:8"),
        ("score", "10", 2, 2, "afterok:2_0:4_0:9"),
        ("report", "11", 1, 1, "afterok:10_0"),
        ("report", "12", 1, 1, "afterok:10_1"),
    ]
    assert cells_of(tmp_path, 8) == ["featurize/1/val/0-7"]
    assert told(ended) == ["already in the queue: 25 cells"]


def test_tasks_that_end_meanwhile_are_not_in_the_queue(launch, slurm_run, fake_slurm) -> None:
    assert launch(*slurm_run).code == 0
    fake_slurm.set(lambda row: row.job_id == "1_4", state="TIMEOUT")
    fake_slurm.set(lambda row: row.job_id == "1_5", state="COMPLETING")
    ended = launch(*slurm_run)
    assert table(ended)[0] == ("featurize", "8", 2, 2, "")
    # What waits for them would never run, or too early.
    assert fake_slurm.calls("scancel") == [["--quiet", "3_0", "5_0", "5_1", "6_0", "7_0"]]


def test_force_submits_all_of_them_again(launch, slurm_run, fake_slurm, tmp_path: Path) -> None:
    assert launch(*slurm_run).code == 0
    run = opened(tmp_path)
    finish(run, ["featurize/0/train/0-8"])
    ended = launch(*slurm_run, "force=true")
    assert [row[:4] for row in table(ended)][:2] == [
        ("featurize", "8", 9, 26),
        ("kernel", "9", 1, 4),
    ]
    assert sum(cells for *_, cells, _ in table(ended)) == 42
    assert told(ended) == []


def test_while_a_job_waits_to_submit_the_rest_no_second_one_is_made(
    launch, slurm_run, fake_slurm, tmp_path: Path
) -> None:
    fake_slurm.limit(5)
    assert launch(*slurm_run).code == 0
    ended = launch(*slurm_run)
    assert table(ended) == []
    left = "no room in the queue for 30 cells: job 3_0 submits them"
    assert told(ended) == ["already in the queue: 13 cells", left]
    finish(opened(tmp_path), [*cells_of(tmp_path, 1), *cells_of(tmp_path, 2)])
    fake_slurm.end("1", "2")
    ended = launch(*slurm_run)
    assert table(ended) == [
        ("featurize", "4", 3, 9, ""),
        ("kernel", "5", 1, 4, "afterok:4"),
    ]
    assert told(ended) == ["no room in the queue for 17 cells: job 3_0 submits them"]
    assert [row.job_id for row in fake_slurm.queue] == ["3_0", "4_0", "4_1", "4_2", "5_0"]


def test_a_job_that_waits_to_submit_other_stages_does_not_count(
    launch, slurm_run, fake_slurm, tmp_path: Path
) -> None:
    fake_slurm.limit(5)
    assert launch(*slurm_run, "stage=featurize").code == 0
    fake_slurm.limit(8)
    ended = launch(*slurm_run)
    waiting = [row.job_id for row in fake_slurm.queue if "-submit-" in row.name]
    jobs = JobRecords(opened(tmp_path))
    stages = [
        jobs.read(jobs.number(row.name)).stages for row in fake_slurm.queue if row.job_id in waiting
    ]
    assert ended.code == 0
    assert any("report" in s for s in stages)


# Tasks that would pend for ever -------------------------------------------------------------------


def test_what_would_never_run_is_cancelled_and_submitted_anew(
    launch, slurm_run, fake_slurm, tmp_path: Path
) -> None:
    assert launch(*slurm_run).code == 0
    finish(opened(tmp_path), cells_of(tmp_path, 1)[:9])
    fake_slurm.end("1")
    never = {"3_0", "5_0", "5_1"}
    fake_slurm.set(lambda row: row.job_id in never, reason="DependencyNeverSatisfied")
    ended = launch(*slurm_run)
    # Slurm has not noticed yet that 4_0, and the reports, wait for the same.
    (cancelled,) = fake_slurm.calls("scancel")
    assert sorted(cancelled[1:]) == ["3_0", "4_0", "5_0", "5_1", "6_0", "7_0"]
    assert table(ended) == [
        ("featurize", "8", 6, 18, ""),
        ("kernel", "9", 1, 4, "afterok:8_0:8_1:8_2"),
        ("kernel", "10", 1, 4, "afterok:8_3:8_4:8_5"),
        ("score", "11", 2, 2, "afterok:10:2_0:9"),
        ("report", "12", 1, 1, "afterok:11_0"),
        ("report", "13", 1, 1, "afterok:11_1"),
    ]
    assert told(ended) == ["already in the queue: 4 cells"]


def test_a_job_to_submit_the_rest_that_would_never_run_is_made_anew(
    launch, slurm_run, fake_slurm
) -> None:
    fake_slurm.limit(5)
    assert launch(*slurm_run).code == 0
    fake_slurm.set(lambda row: row.job_id == "3_0", reason="(DependencyNeverSatisfied)")
    fake_slurm.limit(7)
    ended = launch(*slurm_run)
    assert fake_slurm.calls("scancel") == [["--quiet", "3_0"]]
    assert table(ended) == [("featurize", "4", 1, 7, "")]
    assert told(ended)[-1] == "no room in the queue for 23 cells: job 5 submits them"


# The job that submits the rest --------------------------------------------------------------------


@pytest.fixture
def limited(launch, slurm_run, fake_slurm, tmp_path: Path, monkeypatch) -> FakeSlurm:
    """The tasks of the first checkpoint have ended; job 3, which submits the rest, runs."""
    fake_slurm.limit(5)
    assert launch(*slurm_run).code == 0
    fake_slurm.end("1", "2")
    fake_slurm.set(lambda row: row.job_id == "3_0", state="RUNNING", reason="None", node="n1")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setattr(task, "TerminationNotice", lambda: SimpleNamespace(grace_seconds=30.0))
    return fake_slurm


@pytest.fixture
def runs(tmp_path: Path, capfd) -> Callable[[int], SimpleNamespace]:
    """A job's only task, in this process."""

    def run(job: int) -> SimpleNamespace:
        capfd.readouterr()
        code = task.main([str(tmp_path / "run"), str(job)])
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


def first_wave(path: Path) -> list[str]:
    """The cells that were submitted at once."""
    return [*cells_of(path, 1), *cells_of(path, 2)]


def test_the_rest_is_submitted_in_its_turn(limited, runs, tmp_path: Path) -> None:
    finish(opened(tmp_path), first_wave(tmp_path))
    ended = runs(3)
    assert table(ended) == [("featurize", "4", 3, 9, "")]
    assert told(ended) == ["no room in the queue for 21 cells: job 5 submits them"]
    assert limited.options(5)["dependency"] == "afterany:4_0:4_1"
    limited.limit(100)
    finish(opened(tmp_path), cells_of(tmp_path, 4))
    limited.queue = []
    assert [row[:4] for row in table(runs(5))] == [
        ("featurize", "6", 3, 9),
        ("kernel", "7", 1, 4),
        ("kernel", "8", 1, 4),
        ("score", "9", 2, 2),
        ("report", "10", 1, 1),
        ("report", "11", 1, 1),
    ]


def test_what_its_own_launch_submitted_before_is_not_submitted_again(
    limited, runs, tmp_path: Path
) -> None:
    run = opened(tmp_path)
    lost = "featurize/0/train/8-16"
    finish(run, (cell for cell in cells_of(tmp_path, 1) if cell != lost))
    fail(run, lost)
    limited.limit(100)
    ended = runs(3)
    assert ended.code == 1
    assert [line.split()[:4] for line in ended.out.splitlines()[1:4]] == [
        ["featurize", "4", "6", "18"],
        ["kernel", "5", "1", "4"],
        ["kernel", "6", "1", "4"],
    ]
    assert ended.out.splitlines()[4] == (
        "not submitted, since a dependency failed or is missing: 4 cells, score/val/0-50 first"
    )
    assert lost not in [cell for number in (4, 5, 6) for cell in cells_of(tmp_path, number)]


def test_what_another_launch_submitted_before_is_submitted_again(
    limited, runs, tmp_path: Path
) -> None:
    run = opened(tmp_path)
    finish(run, first_wave(tmp_path))
    publish(run, ["featurize/1/val/0-7"])
    limited.limit(100)
    assert runs(3).code == 0
    assert "featurize/1/val/0-7" in cells_of(tmp_path, 5)


def test_it_waits_for_room(limited, runs, tmp_path: Path, monkeypatch) -> None:
    finish(opened(tmp_path), first_wave(tmp_path))
    limited.queue = [*limited.queue, *(Queued(f"{90 + i}", "train-gpt") for i in range(4))]
    waited = []

    def sleep(seconds: float) -> None:
        assert len(waited) < 5
        waited.append(seconds)
        for job_id in ("90", "91", "92", "93"):
            limited.end(job_id)

    monkeypatch.setattr(executor, "time", SimpleNamespace(sleep=sleep))
    assert table(runs(3)) == [("featurize", "4", 3, 9, "")]
    assert waited == [executor.RETRY_SECONDS]


def test_where_there_is_room_for_one_task_beside_it_it_stays_and_submits_one_by_one(
    limited, runs, tmp_path: Path, monkeypatch
) -> None:
    run = opened(tmp_path)
    finish(run, first_wave(tmp_path))
    limited.limit(2)
    jobs = []

    def sleep(seconds: float) -> None:
        assert len(jobs) < 30
        jobs.append(max(int(path.stem) for path in (tmp_path / "run" / "jobs").glob("*.json")))
        finish(run, cells_of(tmp_path, jobs[-1]))
        limited.end(str(jobs[-1]))

    monkeypatch.setattr(executor, "time", SimpleNamespace(sleep=sleep))
    assert runs(3).code == 0
    assert jobs == list(range(4, 4 + len(jobs)))
    submitted = [c for number in (1, 2, *jobs, jobs[-1] + 1) for c in cells_of(tmp_path, number)]
    assert sorted(submitted) == sorted(c.id for s in STEPS for c in of_step(run.plan, s))


def test_where_there_is_room_for_tasks_but_for_no_other_such_job_it_stays(
    limited, runs, tmp_path: Path, monkeypatch
) -> None:
    """By a limit that accounting does not tell: sbatch refuses what follows the first array."""
    run = opened(tmp_path)
    finish(run, first_wave(tmp_path))
    limited.limit(100)
    limited.refuse("QOSMaxSubmitJobPerUserLimit", [5, 6])
    waited = []

    def sleep(seconds: float) -> None:
        assert not waited
        waited.append(seconds)
        finish(run, cells_of(tmp_path, 4))
        limited.end("4")

    monkeypatch.setattr(executor, "time", SimpleNamespace(sleep=sleep))
    ended = runs(3)
    assert [row[0] for row in table(ended)] == ["kernel", "score", "report", "report"]
    jobs = JobRecords(run)
    submitted = [c for n in jobs.numbers() for task in jobs.read(n).tasks for c in task]
    assert sorted(submitted) == sorted(c.id for s in STEPS for c in of_step(run.plan, s))


def test_killed_again_and_again_it_gives_up_and_status_tells(
    limited, runs, status, tmp_path: Path, monkeypatch, caplog
) -> None:
    finish(opened(tmp_path), first_wave(tmp_path))

    def killed(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(executor, "continue_submission", killed)
    for _ in range(SlurmConfig().max_attempts):
        with pytest.raises(Killed):
            runs(3)
    assert "lost " not in status().out, "it is in the queue"
    ended = runs(3)
    assert ended.code == 1
    assert (
        "5 attempts in a row to submit the rest ended silently\n"
        "  where: job 3\n"
        "  next:  see the log's end, then run the launch command again"
    ) in caplog.text
    limited.queue = []
    ended = status()
    assert ended.code == 1
    assert ended.out.split("\nlost   ")[1].startswith(
        "the job that was to submit featurize/1/train/0-8 and 29 more cells on "
    )
    assert "\n  the task ended silently\n" in ended.out


@pytest.mark.parametrize("sent", [signal.SIGUSR2, signal.SIGTERM])
def test_ended_by_slurm_while_it_waits_for_room_it_may_wait_on(
    limited, runs, status, tmp_path: Path, monkeypatch, sent: signal.Signals
) -> None:
    finish(opened(tmp_path), first_wave(tmp_path))
    limited.queue = [*limited.queue, *(Queued(f"{90 + i}", "train-gpt") for i in range(4))]
    before = signal.getsignal(sent)

    def sleep(_: float) -> None:
        os.kill(os.getpid(), sent)
        time.sleep(5)
        pytest.fail("it is still waiting")

    monkeypatch.setattr(executor, "time", SimpleNamespace(sleep=sleep))
    for _ in range(SlurmConfig().max_attempts + 1):
        assert runs(3).code == 85
    assert signal.getsignal(sent) == before
    limited.queue = []
    assert "lost " not in status().out


# Settings that can't be right ---------------------------------------------------------------------


def test_more_time_than_the_partition_gives(launch, slurm_run, fake_slurm) -> None:
    fake_slurm.answer(
        partitions="PartitionName=cpu Default=NO MaxTime=00:30:00 State=UP\n"
        "PartitionName=gpu Default=YES MaxTime=02:00:00 State=UP\n"
        "PartitionName=long Default=NO MaxTime=2-01:00:00 State=UP\n"
    )
    for partition, asked, name, most in (
        ("", 121, "the default partition", 120),
        ("gpu", 121, "partition gpu", 120),
        ("long", 2941, "partition long", 2940),
        ("cpu", 31, "partition cpu", 30),
    ):
        refuses(
            launch(*slurm_run, f"cluster.partition='{partition}'", f"cluster.time={asked}"),
            f"cluster.time is {asked} minutes, {name} gives {most} at most: the jobs would stay "
            "pending forever\n"
            "  where: cluster.time\n"
            f"  next:  cluster.time={most}, or another cluster.partition",
        )
    assert "partition cpu gives 30" in launch(*slurm_run, "cluster.cpu_jobs.partition=cpu").err
    assert fake_slurm.calls("sbatch") == []
    assert launch(*slurm_run, "cluster.time=120").code == 0


def test_a_partition_without_a_limit(launch, slurm_run) -> None:
    assert launch(*slurm_run, "cluster.partition=cpu", "cluster.time=100000").code == 0


def test_less_memory_than_a_cell_needs(launch, slurm_run, fake_slurm, tmp_path: Path) -> None:
    refuses(
        launch(*slurm_run, "proj_dim=16384", "reduce.kernel_form=primal"),
        "a kernel cell needs 8.0 GiB, there are 1.0 GiB\n"
        "  where: kernel\n"
        "  next:  a smaller proj_dim (memory goes with its square), or cluster.memory_gb=…",
    )
    assert not (tmp_path / "run").exists()


def test_unknown_settings_of_the_cluster(launch, slurm_run) -> None:
    refuses(
        launch(*slurm_run, "cluster.partitoin=gpu", "cluster.cpu_jobs.acount=lab"),
        "unknown keys:\n"
        "  cluster.partitoin: unknown; did you mean 'cluster.partition'?\n"
        "  cluster.cpu_jobs.acount: unknown; did you mean 'cluster.cpu_jobs.account'?\n"
        "  where: the command line\n"
        "  next:  python -m trak_dist.launch --help lists the keys",
    )


def test_unknown_settings_of_a_profile(launch, slurm_run, tmp_path: Path, monkeypatch) -> None:
    own = tmp_path / "conf" / "cluster"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(
        "defaults: [slurm]\npartitoin: gpu\ncpu_jobs: {qso: x}\ntime: 1h\nsetup: 3\nsbatch: x\n"
    )
    monkeypatch.chdir(tmp_path)
    overrides = [o for o in slurm_run if not o.startswith("cluster=")]
    refuses(
        launch(*overrides, "cluster=mine"),
        "the configuration is not valid:\n"
        "  cluster.cpu_jobs.qso: unknown; did you mean 'qos'?\n"
        "  cluster.time: '1h' is not of type int\n"
        "  cluster.setup: 3 is not a name or a list of names\n"
        "  cluster.sbatch: 'x' is not a mapping\n"
        "  cluster.partitoin: unknown; did you mean 'partition'?\n"
        "  next:  python -m trak_dist.launch --help lists the keys",
    )


def test_a_warning_that_would_come_before_the_beginning(launch, slurm_run) -> None:
    refuses(
        launch(*slurm_run, "cluster.time=2", "cluster.signal_delay=120"),
        "the configuration is not valid:\n"
        "  cluster.signal_delay: 120 seconds are not less than cluster.time 2 minutes\n"
        "  next:  python -m trak_dist.launch --help lists the keys",
    )


# The surroundings ---------------------------------------------------------------------------------


def test_a_surrounding_job_is_hidden_from_slurms_commands(
    launch, slurm_run, fake_slurm, monkeypatch
) -> None:
    surrounding = {
        *("SLURM_JOB_ID", "SLURM_MEM_PER_NODE", "SLURM_CPU_BIND", "SLURM_ARRAY_TASK_ID"),
        *("SLURMD_NODENAME", "SRUN_DEBUG", "SQUEUE_FORMAT", "SACCT_FORMAT", "SUBMITIT_EXECUTOR"),
        "SBATCH_PARTITION",
    }
    kept = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}
    for name in surrounding | kept:
        monkeypatch.setenv(name, "7")
    assert table(launch(*slurm_run)) == WHOLE_GRAPH
    for command in ("sbatch", "squeue", "scontrol", "sacctmgr"):
        seen = fake_slurm.environment(command)
        assert not seen & surrounding
        assert kept <= seen
    assert surrounding <= os.environ.keys()


@pytest.mark.parametrize("profile", ["generic", "apptainer", "preemptible"])
def test_the_profiles_compose_where_no_slurm_is(
    launch, slurm_run, fake_slurm, tmp_path: Path, monkeypatch, profile: str
) -> None:
    shutil.rmtree(fake_slurm.home / "bin")
    site_files.main([str(tmp_path / "site")])
    (tmp_path / "conf").mkdir()
    shutil.copytree(tmp_path / "site" / "profiles", tmp_path / "conf" / "cluster")
    monkeypatch.chdir(tmp_path)
    overrides = [o for o in slurm_run if not o.startswith("cluster")]
    ended = launch(*overrides, f"cluster={profile}", "cluster.dry_run=true")
    assert ended.code == 0, ended.err
    first, kernel = (ended.out.split("#!/bin/bash")[n] for n in (1, 2))
    expected = {
        "generic": (
            *("--partition=gpu", "--account=my_project", "--time=120"),
            "\n{ module load python/3.11 cuda\n} || exit 1\n",
            " python -u -m trak_dist.task ",
        ),
        "apptainer": (
            "--partition=gpu",
            ' apptainer exec --nv --bind /scratch --bind "$PWD" --pwd "$PWD" ',
            " /scratch/images/trak.sif python -u -m trak_dist.task ",
        ),
        "preemptible": ("--partition=preemptible", "--qos=scavenger", "--time=180"),
    }
    for text in expected[profile]:
        assert text in first
    assert "--mem=9216M" in first
    assert "--gpus-per-node=1" in first
    assert "--gpus-per-node" not in kernel
    elsewhere = {"generic": "cpu", "apptainer": "gpu", "preemptible": "cpu"}[profile]
    assert f"--partition={elsewhere}\n" in kernel


# cancel -------------------------------------------------------------------------------------------


def test_cancel_ends_the_runs_own_jobs_and_nobody_elses(
    launch, small_run, fake_slurm, tmp_path: Path
) -> None:
    assert launch(*small_run).code == 0
    run_id = JobRecords(opened(tmp_path)).run_id
    fake_slurm.queue = [
        Queued("90_0", "trak-featurize-1-0123456789ab"),
        Queued("91_0", f"trak-featurize-1-{run_id}0"),
        Queued("92_0", f"my-trak-featurize-1-{run_id}"),
        Queued("93_0", f"trak-featurize-{run_id}"),
        Queued("94_0", f"trak-featurize-1-{run_id}", user="bob"),
        Queued("95", "train-gpt"),
        *fake_slurm.queue,
        Queued("10_0", f"trak-submit-2-{run_id}"),
    ]
    ended = launch("stage=cancel", small_run[2])
    assert (ended.code, ended.out) == (0, "cancelled: 1, 2, 3, 4, 5, 6, 10\n")
    assert fake_slurm.calls("scancel") == [["--quiet", "1", "2", "3", "4", "5", "6", "10"]]


def test_cancel_where_nothing_is_queued(launch, small_run, fake_slurm) -> None:
    assert launch(*small_run, "stage=plan").code == 0
    ended = launch("stage=cancel", small_run[2])
    told_so = "cancelled: nothing, no job of this run is in the queue\n"
    assert (ended.code, ended.out) == (0, told_so)
    assert fake_slurm.calls("scancel") == []


# status -------------------------------------------------------------------------------------------


def test_status_asks_no_queue_where_no_job_was_submitted(
    launch, slurm_run, status, fake_slurm
) -> None:
    assert launch(*slurm_run, "stage=plan").code == 0
    assert status().code == 0
    assert fake_slurm.home.joinpath("calls").read_text() == ""


def test_status_tells_what_runs_and_what_waits(
    launch, slurm_run, status, fake_slurm, tmp_path: Path
) -> None:
    assert launch(*slurm_run).code == 0
    finish(opened(tmp_path), ["featurize/0/train/0-8"])
    fake_slurm.set(lambda row: row.job_id == "1_0", state="RUNNING", reason="None", node="n1")
    ended = status()
    assert ended.code == 0
    assert "\nfeaturize         1       27        6       20        0        0\n" in ended.out
    assert "\n0           █>>>>>>  -    -\n" in ended.out
    assert "\ntasks waiting in the queue: 7 for Dependency, 8 for Priority\n" in ended.out
    counts = '"featurize": {"done": 1, "total": 27, "failed": 0, "running": 6, "queued": 20}'
    assert counts in ended.out.splitlines()[-1]


def test_status_where_squeue_fails(launch, slurm_run, status, fake_slurm) -> None:
    assert launch(*slurm_run).code == 0
    fake_slurm.fail("squeue", "Unable to contact slurm controller (connect failure)")
    ended = status()
    assert ended.code == 0
    assert (
        "\n"
        "note   what is running or queued is unknown: squeue failed: Unable to contact slurm "
        "controller (connect failure)\n"
    ) in ended.out
    assert '"featurize": {"done": 0, "total": 27' in ended.out.splitlines()[-1]


@pytest.fixture
def lost(launch, slurm_run, fake_slurm, tmp_path: Path) -> JobRecords:
    """The jobs of a run whose queue is empty though nothing is done."""
    assert launch(*slurm_run).code == 0
    fake_slurm.queue = []
    return JobRecords(opened(tmp_path))


def begin(jobs: JobRecords, log: Path | None = None) -> None:
    """Let the first task have begun."""
    by = {"host": "n2", "job_id": "1_0", "log": str(log or "")}
    jobs.begin("1", 0, done=0, by=by)


def test_status_shows_a_vanished_task_with_the_end_of_its_log(lost, status, fake_slurm) -> None:
    log = lost.run.layout.job_logs(1) / "1_0_0_log.out"
    log.write_text("".join(f"line {i}\n" for i in range(1000)))
    begin(lost, log)
    fake_slurm.answer(ended="1_0|OUT_OF_MEMORY\n")
    ended = status()
    assert ended.code == 1
    assert (
        "\n"
        f"lost   featurize/0/train/0-8 and 6 more cells on n2, job 1_0, log {log}\n"
        "  the task ended silently; Slurm says OUT_OF_MEMORY\n"
        "  line 996\n"
        "  line 997\n"
        "  line 998\n"
        "  line 999\n"
    ) in ended.out
    assert fake_slurm.calls("sacct") == [["-nXP", "-j", "1_0", "-o", "JobID,State"]]


def test_a_status_is_shown_without_a_look_at_disk_or_queue(
    lost, fake_slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = lost.run.layout.job_logs(1) / "1_0_0_log.out"
    log.write_text("the end\n")
    begin(lost, log)
    fake_slurm.answer(ended="1_0|OUT_OF_MEMORY\n")
    found = read_status(Run.open(tmp_path / "run"))
    shown = lines(found)
    assert "  the end" in shown
    shutil.rmtree(tmp_path / "run")
    asked = fake_slurm.calls("sacct")

    def looks(*_: object, **__: object) -> None:
        pytest.fail("it retries")

    for name in ("read", "names", "exists"):
        monkeypatch.setattr(atomic, name, looks)
    assert lines(found) == shown
    assert found.json_line()
    assert fake_slurm.calls("sacct") == asked


def test_watching_describes_a_vanished_task_once(lost, fake_slurm) -> None:
    logs = lost.run.layout.job_logs(1)
    log = logs / "1_0_0_log.out"
    log.write_text("the end\n")
    begin(lost, log)
    fake_slurm.answer(ended="1_0|OUT_OF_MEMORY\n")
    first = read_status(lost.run)
    log.write_text("not read again\n")
    assert read_status(lost.run, previous=first).vanished == first.vanished
    (logs / "1_4_0_log.out").write_text("another\n")
    second = read_status(lost.run, previous=first)
    assert {task.end for task in second.vanished} == {("the end",), ("another",)}
    assert [call[2] for call in fake_slurm.calls("sacct")] == ["1_0", "1_4"]
    assert read_status(lost.run).vanished[0].end == ("not read again",)


def test_status_shows_a_task_that_ended_in_its_batch_script(lost, status, fake_slurm) -> None:
    log = lost.run.layout.job_logs(1) / "1_4_0_log.out"
    log.write_text("module: command not found\n")
    ended = status()
    assert ended.code == 1
    assert (
        f"\nlost   featurize/1/val/0-7 on ?, job 1_4, log {log}\n"
        "  the task ended before its worker began\n"
        "  module: command not found\n"
    ) in ended.out


@pytest.mark.parametrize("how", ["remove", "fail"])
def test_status_where_sacct_fails(lost, status, fake_slurm, how: str) -> None:
    (lost.run.layout.job_logs(1) / "1_0_0_log.out").write_text("the end\n")
    begin(lost)
    if how == "remove":
        fake_slurm.remove("sacct")
    else:
        fake_slurm.fail("sacct", "Slurm accounting storage is disabled")
    ended = status()
    assert ended.code == 1
    assert ("\n  the task ended silently\n  the end\n") in ended.out


def test_status_reads_no_log_outside_the_run_directory(lost, status, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the password\n")
    begin(lost, secret)
    ended = status()
    assert "the task ended silently\n" in ended.out
    assert "the password" not in ended.out


def test_a_vanished_task_that_is_submitted_again_is_no_longer_vanished(
    lost, launch, slurm_run, status
) -> None:
    begin(lost)
    assert "lost " in status().out
    assert launch(*slurm_run).code == 0
    assert "lost " not in status().out


# A damaged record ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "Expecting value: line 1 column 1 (char 0)"),
        (
            "{}",
            (
                "it is no job: launch: missing step: missing fingerprint: missing device: missing "
                "tasks: missing cluster: missing stages: missing"
            ),
        ),
        ("[]", "it is no mapping"),
    ],
)
def test_a_damaged_record_of_a_queued_job(
    launch, small_run, caplog, tmp_path: Path, content: str, why: str
) -> None:
    assert launch(*small_run).code == 0
    path = tmp_path / "run" / "jobs" / "2.json"
    path.write_text(content)
    ended = launch(*small_run)
    assert ended.code == 0
    assert f"{path}: the job's record can't be read ({why})" in caplog.text
    assert [row[0] for row in table(ended)] == ["kernel", "score", "report"]


def test_a_damaged_record_does_not_keep_from_cancelling_and_submitting_anew(
    launch, small_run, fake_slurm, tmp_path: Path
) -> None:
    assert launch(*small_run).code == 0
    (tmp_path / "run" / "jobs" / "2.json").write_text("")
    assert launch("stage=cancel", small_run[2]).out == "cancelled: 1, 2, 3, 4, 5, 6\n"
    fake_slurm.queue = []
    ended = launch(*small_run)
    assert sum(cells for *_, cells, _ in table(ended)) == 35


def test_a_damaged_record_of_a_past_job_does_not_keep_status_from_telling(
    launch, small_run, status, fake_slurm, tmp_path: Path
) -> None:
    assert launch(*small_run).code == 0
    (tmp_path / "run" / "jobs" / "2.json").write_text("")
    fake_slurm.queue = []
    assert status().code == 0


# What these tests count on -----------------------------------------------------------------------


def test_the_tiny_problem_has_the_sizes_that_these_tests_count_on(
    launch, slurm_run, tmp_path: Path
) -> None:
    assert launch(*slurm_run, "stage=plan").code == 0
    plan = opened(tmp_path).plan
    assert [s.rows for s in (plan.train, *plan.targets)] == [50, 7, 5]
    assert len(list(of_step(plan, "featurize"))) == 27
