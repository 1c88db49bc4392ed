"""Submission to a faked Slurm by the Python interface."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from submission_assertions import fail, finish, opened
from test_slurm import WHOLE_GRAPH

import trak_dist
from trak_dist import PlannedRun, Progress
from trak_dist.cells import of_run
from trak_dist.errors import CellsFailed
from trak_dist.interface import execution

pytestmark = pytest.mark.slow


@pytest.fixture
def plan(fake_slurm, tmp_path: Path) -> Callable[..., PlannedRun]:
    tiny.write_checkpoints(tmp_path / "checkpoints")

    def planned(**settings: Any) -> PlannedRun:
        return trak_dist.plan_run(
            run_dir=tmp_path / "run",
            problem={"_target_": "tiny.problem", "directory": tmp_path / "checkpoints"},
            proj_dim=16,
            featurize={"batch_rows": 4, "cell_rows": 8},
            cluster={"kind": "slurm", "rows_per_task": 50, "memory_gb": 1, **settings},
        )

    return planned


def test_what_is_submitted_is_returned(plan, capfd) -> None:
    planned = plan()
    assert planned.summary.workers is None
    assert planned.summary.minutes is None
    assert planned.summary.stages["featurize"].tasks == 9
    outcome = planned.execute()
    assert outcome.submission.job_ids == ("1", "2", "3", "4", "5", "6", "7")
    assert [(a.step, a.job_id, a.tasks) for a in outcome.submission.result.jobs] == [
        row[:3] for row in WHOLE_GRAPH
    ]
    assert outcome.pending == 43
    assert not outcome.complete
    assert not outcome.failed
    outcome.raise_for_failures()
    assert capfd.readouterr() == ("", "")
    again = planned.execute()
    assert again.submission.job_ids == ()
    assert again.pending == 43


def test_how_many_tasks_is_not_known_before_anything_was_measured(plan) -> None:
    assert plan(rows_per_task=0).summary.stages["featurize"].tasks is None


def test_a_dry_run_returns_its_scripts(plan, fake_slurm) -> None:
    outcome = plan(dry_run=True).execute()
    assert len(outcome.submission.scripts) == 7
    assert "#SBATCH --mem=1024M" in outcome.submission.scripts[0]
    assert not fake_slurm.calls("sbatch")


def test_waiting_ends_when_the_queue_is_empty(plan, fake_slurm, tmp_path, monkeypatch) -> None:
    planned = plan()
    run = opened(tmp_path)
    cells = list(of_run(run.plan))

    def later(_: float) -> None:
        finish(run, [cell for cell in cells if cell.id != "gram/1"])
        fail(run, "gram/1")
        fake_slurm.queue = []

    clock = SimpleNamespace(sleep=later, monotonic=time.monotonic)
    monkeypatch.setattr(execution, "time", clock)
    seen: list[Progress] = []
    outcome = planned.execute(on_progress=seen.append, wait=True)
    assert [progress.step for progress in seen] == ["featurize", "reduce", "report"]
    assert (seen[0].done, seen[0].running, seen[0].total) == (0, 0, 27)
    assert [cell.id for cell in outcome.failed] == ["gram/1"]
    assert outcome.submission.job_ids
    assert not outcome.complete
    with pytest.raises(CellsFailed, match="gram/1: bad luck"):
        outcome.raise_for_failures()
