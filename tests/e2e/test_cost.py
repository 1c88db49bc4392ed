"""What planning says a run will cost, against what the run then took."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_plan import PLAN

import trak_dist
from trak_dist import PlannedRun
from trak_dist.cells import FeaturizeCell, GramCell
from trak_dist.configuration.config import ClusterConfig, SlurmConfig
from trak_dist.errors import ConfigError
from trak_dist.interface import cost, time_limit
from trak_dist.store.record import Receipt
from trak_dist.store.run import Run


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., PlannedRun]:
    tiny.write_checkpoints(tmp_path / "checkpoints")

    def planned(**settings: Any) -> PlannedRun:
        settings = {"cluster": "debug", "proj_dim": 16, **settings}
        return trak_dist.plan_run(
            run_dir=tmp_path / "run",
            problem={"_target_": "tiny.problem", "directory": str(tmp_path / "checkpoints")},
            featurize={"batch_rows": 4, "cell_rows": 8},
            **settings,
        )

    return planned


def test_files_and_bytes_are_those_of_the_finished_run(plan, tmp_path: Path) -> None:
    planned = plan(targets="val")
    expected = planned.cost
    assert [(s.step, s.cells, s.tasks) for s in expected.steps] == [
        ("featurize", 24, 24),
        ("kernel", 9, 3),
        ("score", 1, 1),
        ("report", 1, 1),
    ]
    assert not expected.unknown
    planned.execute().raise_for_failures()
    found = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert expected.files == len(found)
    size = sum(path.stat().st_size for path in found)
    assert size == pytest.approx(expected.store_bytes, rel=0.15)
    store = tmp_path / "run" / "store.zarr"
    chunks = [p for p in found if p.is_relative_to(store) and p.name != "zarr.json"]
    assert sum(p.stat().st_size for p in chunks) == planned.summary.store_bytes
    left = plan(targets="val").cost
    assert (left.steps, left.wall_seconds()) == ((), 0)
    assert left.files == expected.files


def test_what_is_left_is_estimated_by_the_cells_that_are_done(plan) -> None:
    planned = plan()
    (featurize, *_) = planned.cost.steps
    assert "a trial on this CPU" in featurize.rates[0]
    plan(stage="featurize").execute().raise_for_failures()
    run = Run.open(planned.run_dir)
    run.receipts.revoke(next(FeaturizeCell.of(run.plan)), why="for the test")
    (featurize, *_) = plan().cost.steps
    assert (featurize.cells, featurize.rates) == (1, ("26 featurize cells on cpu",))
    assert featurize.seconds == featurize.longest_seconds


def test_the_command_line_says_it_when_a_run_is_planned(launch, tiny_run) -> None:
    ended = launch(*tiny_run, "stage=plan")
    assert ended.code == 0
    for said in (
        "featurize             27       27     0.00 CPU",
        "rows/s",
        "1e+10 products/s of a core",
        "longest task: report/val, 10 s",
        "CPU hours; 0.1 MiB in 196 files",
        "with 1 task at once",
    ):
        assert said in ended.out


def test_on_slurm_tasks_are_those_that_are_submitted(plan, monkeypatch) -> None:
    cluster = {"kind": "slurm", "rows_per_task": 50, "array_parallelism": 2, "gpus_per_node": 2}
    found = plan(cluster=cluster).cost
    assert [(s.step, s.tasks, s.gpus) for s in found.steps] == [
        ("featurize", 9, 2),
        ("kernel", 3, 0),
        ("score", 2, 0),
        ("report", 2, 0),
    ]
    assert found.at_once == 2
    featurize = found.steps[0]
    assert featurize.seconds is not None
    assert found.gpu_hours == pytest.approx(2 * featurize.seconds / 3600)
    # Nine tasks of 15 s to start, two at once.
    assert found.wall_seconds(2) > found.wall_seconds(9) == found.wall_seconds()
    assert "with 2 tasks at once" in str(found)


def test_a_kind_without_a_rate_is_said_and_left_out() -> None:
    found = cost.estimate(
        PLAN,
        ["train", "reduce"],
        ClusterConfig(kind="debug"),
        done={},
        trial=lambda: 1.0,
        workers=1,
        gpus=0,
    )
    assert found.unknown == ["train"]
    assert "? CPU" in str(found)
    assert "and train, of which nothing is known" in str(found)


# Cells that no attempt could finish --------------------------------------------------------------


def checked(run: Run | None, rate: float = 1.0, **settings: Any) -> None:
    settings = {"time": 10, "gpus_per_node": 0, **settings}
    time_limit.check_time(
        run.plan if run else PLAN,
        run,
        ["featurize", "reduce"],
        SlurmConfig(**settings),
        lambda: rate,
    )


def test_a_cell_that_a_trial_says_is_too_long_is_refused() -> None:
    rows = PLAN.train.cell_rows
    limit = 600 - 15 - 60
    checked(None, rate=rows / (4 * limit - 1))
    with pytest.raises(ConfigError) as error:
        checked(None, rate=rows / (4 * limit + 1))
    assert str(error.value) == (
        "featurize/0/train/0-4 would take about 35 min, by a trial on this CPU, 0.0019 rows/s; "
        "cluster.time is 10 minutes: no attempt would finish it\n"
        "  where: cluster.time\n"
        "  next:  cluster.time=55"
    )
    with pytest.raises(ConfigError) as error:
        checked(None, rate=rows / 1e5, time=400)
    assert error.value.next == "cluster.time=2503"
    checked(None, rate=rows / 1e9, gpus_per_node=1)  # a CPU's trial says nothing of a GPU


def test_a_cell_that_finished_ones_say_is_too_long_is_refused(plan) -> None:
    planned = plan()
    run = Run.open(planned.run_dir)
    first, *_ = FeaturizeCell.of(run.plan)

    def finish(cell, *, seconds: float, device: str = "cpu") -> None:
        job = {"seconds": seconds, "device": device}
        key = cell.key(run.plan)
        run.receipts.publish(
            cell, Receipt(cell=cell.id, key=key, fingerprint=run.plan.fingerprint, job=job)
        )

    finish(first, seconds=1049.0)
    checked(run, time=10)
    finish(first, seconds=8000.0)
    checked(run, time=100)
    finish(first, seconds=12000.0)
    with pytest.raises(ConfigError) as error:
        checked(run, time=100)
    assert error.value.what == (
        f"{first.id} would take about 3.3 h, by 1 featurize cells on cpu; "
        "cluster.time is 100 minutes: no attempt would finish it"
    )
    assert error.value.next == "cluster.time=303"
    checked(run, time=100, gpus_per_node=1)
    finish(first, seconds=12000.0, device="NVIDIA H100")
    checked(run, time=100)
    with pytest.raises(ConfigError):
        checked(run, time=100, gpus_per_node=1)
    finish(GramCell(0), seconds=7e4)
    with pytest.raises(ConfigError, match="gram/0 would take") as error:
        checked(run, time=100)
    assert error.value.next.endswith(", or reduce.gram_rows=…, which sums it in parts")
