"""The whole graph on a real Slurm: same scores, the right order, nothing submitted twice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from on_slurm import SLURM, finish, overrides, running, scores, status, undone_cells, wait

from trak_dist import open_run

TEMPLATE = Path(__file__).parent.parent.parent / "launch" / "array.sbatch"


def submitted(out: str) -> list[tuple[str, str, str]]:
    """Step, job and dependency of each line of the table."""
    rows = [line.split() for line in out.splitlines() if ":" not in line.split()[:1]]
    steps = ("train", "featurize", "kernel", "score", "evaluate", "report", "submit")
    return [(r[0], r[1], r[4] if len(r) > 4 else "") for r in rows if r and r[0] in steps]


def test_the_graph_runs_and_its_scores_are_those_of_the_other_executors(
    launch, path: Path, expected: np.ndarray
) -> None:
    ended = launch(*overrides(path, "run"), *SLURM)
    assert ended.code == 0, ended.err
    table = submitted(ended.out)
    steps = [step for step, *_ in table]
    assert steps == ["featurize", "kernel", "kernel", "score", "report"]
    features, first, second, score, report = (job for _, job, _ in table)
    after = {job: dependency for _, job, dependency in table}
    assert after[first] == f"afterok:{features}_0:{features}_1:{features}_2"
    assert after[score] == f"afterok:{first}:{second}"
    assert after[report] == f"afterok:{score}"
    assert f"stage=status run_dir={path / 'run'}" in ended.out
    found = finish(path / "run")
    assert found.complete
    assert np.array_equal(scores(path / "run"), expected)
    assert launch(*overrides(path, "local"), "cluster=local").code == 0
    assert np.array_equal(scores(path / "local"), expected)
    receipt = open_run(path / "run").receipts("featurize")["featurize/1/train/28-32"]
    assert receipt.job["job_id"] == f"{features}_4"
    assert Path(receipt.job["log"]).read_text().count("done in") == 4
    assert launch(*overrides(path, "run"), *SLURM).out.count("nothing to submit") == 1


@pytest.mark.long
def test_the_ground_truth_is_trained_and_held_against_the_scores(launch, path: Path) -> None:
    truth = ("+problem.trains=true", "checkpoints.train=2", "ground_truth.subsets=3")
    ended = launch(*overrides(path, "run"), *truth, *SLURM)
    assert ended.code == 0, ended.err
    table = submitted(ended.out)
    trains = [job for step, job, _ in table if step == "train"]
    (evaluate, after), (_, report_after) = (
        (job, dependency) for step, job, dependency in table if step in ("evaluate", "report")
    )
    assert len(trains) == 1
    assert {f"{trains[0]}_{index}" for index in range(2, 5)} <= set(after.split(":"))
    assert report_after == f"afterok:{evaluate}"
    assert finish(path / "run").complete
    assert launch(*overrides(path, "debug"), *truth, "cluster=debug").code == 0
    found = [(path / name / "report" / "val.json").read_text() for name in ("run", "debug")]
    assert found[0] == found[1]


def test_the_same_command_submits_nothing_twice_and_cancel_ends_the_runs_own_jobs(
    launch, path: Path, expected: np.ndarray
) -> None:
    one = [*overrides(path, "one", seconds=2.0), *SLURM]
    assert launch(*one).code == 0
    assert launch(*overrides(path, "two", seconds=2.0), *SLURM).code == 0
    before = undone_cells(path / "one")
    again = launch(*one)
    assert again.code == 0
    assert submitted(again.out) == []
    left = re.search(r"already in the queue: (\d+) cells", again.out)
    assert left
    assert undone_cells(path / "one") <= int(left[1]) <= before <= 28
    ended = launch("stage=cancel", f"run_dir={path / 'two'}")
    assert ended.code == 0
    assert ended.out.startswith("cancelled: ")
    wait("the cancelled jobs to go", lambda: not status(path / "two").queue.tasks)
    assert status(path / "one").queue.tasks
    assert launch("stage=cancel", f"run_dir={path / 'two'}").out.startswith("cancelled: nothing")
    assert finish(path / "one").complete
    assert np.array_equal(scores(path / "one"), expected)
    assert not status(path / "two").complete


@pytest.mark.long
def test_a_stage_waits_for_what_is_still_queued(launch, path: Path, expected: np.ndarray) -> None:
    arguments = [*overrides(path, "run", seconds=0.5), *SLURM]
    refused = launch(*arguments, "stage=reduce")
    assert refused.code == 2
    assert "depend on others that are neither done nor in the queue, gram/0 first" in refused.err
    [(_, features, _)] = submitted(launch(*arguments, "stage=featurize").out)
    reduce = submitted(launch(*arguments, "stage=reduce").out)
    assert [step for step, *_ in reduce] == ["kernel", "kernel", "score"]
    assert reduce[0][2] == f"afterok:{features}_0:{features}_1:{features}_2"
    assert launch(*arguments, "stage=report").code == 0
    assert finish(path / "run").complete
    assert np.array_equal(scores(path / "run"), expected)


@pytest.mark.long
def test_checkpoints_that_are_trained_on_the_way_are_featurized_each_after_its_own_training(
    launch, path: Path, expected: np.ndarray
) -> None:
    arguments = [*overrides(path, "run"), *SLURM, "+problem.trains=true", "checkpoints.train=2"]
    table = submitted(launch(*arguments).out)
    train = table[0][1]
    assert [(step, after) for step, _, after in table][:3] == [
        ("train", ""),
        ("featurize", f"afterok:{train}_0"),
        ("featurize", f"afterok:{train}_1"),
    ]
    assert finish(path / "run").complete
    assert np.array_equal(scores(path / "run"), expected)


@pytest.mark.long
def test_a_kernel_starts_before_another_checkpoint_is_featurized(launch, path: Path) -> None:
    arguments = [*overrides(path, "run", seconds=0.5), *SLURM, "cluster.array_parallelism=2"]
    assert launch(*arguments).code == 0
    assert finish(path / "run").complete
    run = open_run(path / "run")
    ends = [
        receipt.job["started"] + receipt.job["seconds"]
        for cell, receipt in run.receipts("featurize").items()
        if cell.startswith("featurize/1/")
    ]
    assert run.receipts("reduce")["kernel/0"].job["started"] < max(ends)


@pytest.mark.long
def test_the_sbatch_template_gives_the_same_scores(
    launch, path: Path, expected: np.ndarray
) -> None:
    assert launch(*overrides(path, "run"), "stage=plan").code == 0
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for step, tasks in (("featurize", 3), ("kernel", 2), ("score", 1), ("report", 1)):
        subprocess.run(
            [
                *("sbatch", "--wait", f"--array=1-{tasks}", "--mem=1G", f"--output={path}/%A.out"),
                *(str(TEMPLATE), str(path / "run"), step),
            ],
            check=True,
            env=environment,
            timeout=120,
        )
    assert status(path / "run").complete
    assert np.array_equal(scores(path / "run"), expected)


def test_status_tells_what_runs_and_what_waits(launch, path: Path) -> None:
    assert launch(*overrides(path, "run", seconds=2.0), *SLURM).code == 0
    wait("running tasks", lambda: len(running(path / "run")) == 6)
    ended = launch("stage=status", f"run_dir={path / 'run'}")
    counts = json.loads(ended.out.splitlines()[-1])["stage"]
    assert counts["featurize"]["running"] > 0
    assert counts["reduce"]["queued"] > 0
    assert counts["reduce"]["running"] == 0
    assert "tasks waiting in the queue: 4 for Dependency" in ended.out
    assert ">" in ended.out
    launch("stage=cancel", f"run_dir={path / 'run'}")


def test_dry_run_prints_scripts_and_submits_nothing(launch, path: Path) -> None:
    ended = launch(*overrides(path, "run"), *SLURM, "cluster.dry_run=true")
    assert ended.code == 0
    assert [step for step, *_ in submitted(ended.out)][:2] == ["featurize", "kernel"]
    assert "#SBATCH --dependency='afterok:<1>_0:<1>_1:<1>_2'" in ended.out
    assert not status(path / "run").queue.tasks
    assert not (path / "run" / "jobs").exists()
