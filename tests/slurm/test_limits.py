"""Where Slurm takes few tasks in an array, or few jobs at once, a run completes by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from on_slurm import SLURM, Lab, finish, overrides, scores

from trak_dist.store.jobs import JobRecords
from trak_dist.store.run import Run


@pytest.mark.long
def test_arrays_and_the_queue_are_kept_below_their_limits(
    launch, path: Path, expected: np.ndarray, small_lab: Lab
) -> None:
    run = path / "run"
    ended = launch(*overrides(path, "run"), *SLURM, "cluster.qos=tiny", "cluster.rows_per_task=8")
    assert ended.code == 0
    assert "no room in the queue for " in ended.out
    assert finish(run, 400).complete
    assert np.array_equal(scores(run), expected)


@pytest.mark.long
def test_an_array_is_split_below_the_largest_index(
    launch, path: Path, expected: np.ndarray, small_lab: Lab
) -> None:
    run = path / "run"
    ended = launch(*overrides(path, "run"), *SLURM, "cluster.rows_per_task=4")
    assert ended.code == 0
    jobs = JobRecords(Run.open(run))
    arrays = [jobs.read(n) for n in jobs.numbers()]
    assert [len(j.tasks) for j in arrays if j.step == "featurize"] == [11, 9]
    assert finish(run, 300).complete
    assert np.array_equal(scores(run), expected)


@pytest.mark.long
def test_a_cell_that_fails_is_not_submitted_again_by_the_job_that_resumes(
    launch, path: Path, small_lab: Lab
) -> None:
    run = path / "run"
    (path / "act").write_text("fail")
    assert launch(*overrides(path, "run"), *SLURM, "cluster.qos=tiny").code == 0
    found = finish(run, 300)
    assert len(found.stages["featurize"].failed) == 2
    jobs = JobRecords(Run.open(run))
    cells = [c for n in jobs.numbers() for task in jobs.read(n).tasks for c in task]
    assert len(cells) == len(set(cells))
