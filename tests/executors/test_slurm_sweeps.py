"""What the tasks of a sweep submit to Slurm: each cell once; all commands are faked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_result import Ended, Launch
from fake_slurm import FakeSlurm
from submission_assertions import fail, finish, table
from sweeping import members

from trak_dist.cells import of_step
from trak_dist.status.queue import read_queue
from trak_dist.status.state import read_status
from trak_dist.store.jobs import JobRecords
from trak_dist.store.run import Run

pytestmark = pytest.mark.long


@pytest.fixture
def sweep(slurm_run: list[str]) -> list[str]:
    """The tiny run with two dimensions, one of them given by the test."""
    others = [o for o in slurm_run if not o.startswith("proj_dim")]
    return [*others, "targets=val", "-m"]


def arrays(ended: Ended) -> list[tuple[str, str, int, int, str]]:
    """Step, job, tasks, cells and dependency of each array that any task submitted."""
    assert ended.code == 0, ended.err
    rows = (line.split() for line in ended.out.splitlines())
    return [
        (row[0], row[1], int(row[2]), int(row[3]), "".join(row[4:]))
        for row in rows
        if len(row) > 3 and row[0] in ("featurize", "kernel", "score", "report")
    ]


def runs(path: Path) -> dict[int, Run]:
    """The run and its members, by `proj_dim`."""
    return {dim: Run.open(found) for dim, found in members(path / "run").items()}


WAITS = ("afterok:1_0:1_1", "afterok:1_2:1_3", "afterok:1_4:1_5")


def test_all_members_are_submitted_at_once_and_featurize_once(
    launch: Launch, sweep, fake_slurm: FakeSlurm, tmp_path: Path
) -> None:
    ended = launch(*sweep, "proj_dim=16,8,4,2")
    assert arrays(ended) == [
        ("featurize", "1", 6, 24, ""),
        *(("kernel", str(2 + i), 1, 3, WAITS[i]) for i in range(3)),
        ("score", "5", 1, 1, "afterok:2:3:4"),
        ("report", "6", 1, 1, "afterok:5"),
        *(("kernel", str(7 + i), 1, 3, WAITS[i]) for i in range(3)),
        ("score", "10", 1, 1, "afterok:7:8:9"),
        ("report", "11", 1, 1, "afterok:10"),
        *(("kernel", str(12 + i), 1, 3, WAITS[i]) for i in range(3)),
        ("score", "15", 1, 1, "afterok:12:13:14"),
        ("report", "16", 1, 1, "afterok:15"),
        *(("kernel", str(17 + i), 1, 3, WAITS[i]) for i in range(3)),
        ("score", "20", 1, 1, "afterok:17:18:19"),
        ("report", "21", 1, 1, "afterok:20"),
    ]
    assert ended.out.count("already in the queue: 24 cells\n") == 3
    there = runs(tmp_path)
    assert set(there) == {16, 8, 4, 2}
    assert [line.split() for line in ended.out.splitlines()[-4:]] == [
        [f"proj_dim={k}", "submitted", str(there[k].layout.run_dir)] for k in (16, 8, 4, 2)
    ]
    member = there[8].layout
    assert f"-m trak_dist.task {member.run_dir} 7\n" in fake_slurm.script(7)
    assert fake_slurm.options(7)["job-name"] == f"trak-kernel-7-{JobRecords(there[16]).run_id}"
    assert {JobRecords(run).run_id for run in there.values()} == {JobRecords(there[16]).run_id}
    assert JobRecords(there[16]).read(7).member == member.member
    assert not (member.run_dir / "jobs").exists()
    again = launch(*sweep, "proj_dim=16,8,4,2")
    assert arrays(again) == []
    assert len(fake_slurm.calls("sbatch")) == 21


def test_members_of_different_lambdas_share_the_grams_of_the_first(
    launch: Launch, sweep, fake_slurm: FakeSlurm, tmp_path: Path
) -> None:
    ended = launch(*sweep, "proj_dim=8", "reduce.lambda_reg=1,2")
    assert arrays(ended)[6:] == [
        *(("kernel", str(7 + i), 1, 2, f"{WAITS[i]},afterany:{2 + i}_0") for i in range(3)),
        ("score", "10", 1, 1, "afterok:7:8:9"),
        ("report", "11", 1, 1, "afterok:10"),
    ]
    base = Run.open(tmp_path / "run")
    (name,) = base.layout.members()
    member = Run.open(base.layout.sweeps / name)
    # The first kernel fails after its Gram: that is no matter of the member's.
    finish(base, [*of_step(base.plan, "featurize"), "gram/0", "gram/1"])
    fail(base, "kernel/0")
    fake_slurm.end("1", "2", "3")
    again = launch(f"run_dir={member.layout.run_dir}", "cluster=slurm")
    assert table(again) == []
    # The Gram that nobody makes any more is made by the member.
    fake_slurm.end("4")
    again = launch(f"run_dir={member.layout.run_dir}", "cluster=slurm")
    assert table(again)[0] == ("kernel", "12", 1, 3, "")
    assert fake_slurm.calls("scancel") == [["--quiet", "9_0", "10_0", "11_0"]]


def test_each_kernel_of_a_projection_of_its_own_has_its_own_featurize_tasks(
    launch: Launch, sweep, fake_slurm: FakeSlurm
) -> None:
    ended = launch(*sweep, "projection=sjlt,gaussian", "proj_dim=8")
    assert [row[:4] for row in arrays(ended) if row[0] == "featurize"] == [
        ("featurize", "1", 6, 24),
        ("featurize", "7", 6, 24),
    ]


def test_a_member_does_not_cancel_what_others_submitted(
    launch: Launch, sweep, fake_slurm: FakeSlurm, tmp_path: Path
) -> None:
    assert launch(*sweep, "proj_dim=16,8").code == 0
    fake_slurm.end("1")  # nobody makes grads any more
    member = runs(tmp_path)[8].layout.run_dir
    ended = launch(f"run_dir={member}", "cluster=slurm", "cluster.rows_per_task=50")
    assert table(ended)[0] == ("featurize", "12", 6, 24, "")
    (cancelled,) = fake_slurm.calls("scancel")
    assert sorted(cancelled[1:]) == ["10_0", "11_0", "7_0", "8_0", "9_0"]


def test_cancel_of_a_member_leaves_the_others(
    launch: Launch, sweep, fake_slurm: FakeSlurm, tmp_path: Path
) -> None:
    assert launch(*sweep, "proj_dim=16,8").code == 0
    member = runs(tmp_path)[8].layout.run_dir
    ended = launch("stage=cancel", f"run_dir={member}")
    assert (ended.code, ended.out) == (0, "cancelled: 7, 8, 9, 10, 11\n")
    ended = launch("stage=cancel", f"run_dir={tmp_path / 'run'}")
    assert ended.out == f"cancelled: {', '.join(map(str, range(1, 12)))}\n"


def test_status_of_a_member_shows_what_others_make_for_it(
    launch: Launch, sweep, fake_slurm: FakeSlurm, tmp_path: Path
) -> None:
    assert launch(*sweep, "proj_dim=16,8").code == 0
    fake_slurm.set(lambda row: row.job_id == "1_0", state="RUNNING", node="n1")
    there = runs(tmp_path)
    for run in there.values():
        stages = read_status(run).stages
        assert (len(stages["featurize"].running), len(stages["featurize"].queued)) == (7, 17)
        assert len(stages["reduce"].queued) == 10
    rows = [task.job_id for task, _ in read_queue(JobRecords(there[8])).tasks]
    assert not {"2_0", "5_0", "6_0"} & {*rows}
    ended = launch("stage=status", f"run_dir={there[8].layout.run_dir}")
    assert json.loads(ended.out.splitlines()[-1])["stage"]["featurize"]["queued"] == 17


def test_a_member_that_is_gone_is_no_owner(
    launch: Launch, sweep, fake_slurm: FakeSlurm, tmp_path: Path
) -> None:
    assert launch(*sweep, "projection=gaussian,sjlt", "proj_dim=8").code == 0
    base = Run.open(tmp_path / "run")
    (name,) = base.layout.members()
    (base.layout.sweeps / name / "plan.json").unlink()
    assert all(job.member == "" for _, job in read_queue(JobRecords(base)).tasks)
