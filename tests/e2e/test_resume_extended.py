"""Runs that grow keep what they have; runs that mix or were superseded are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from trak_dist import open_run, plan_file, worker
from trak_dist.cells import STAGE_STEPS, GramCell, of_stage, parse_cell
from trak_dist.errors import MissingInputs, PlanMismatch
from trak_dist.plan import Plan
from trak_dist.runtime.session import Session
from trak_dist.status.verify import damaged_cells
from trak_dist.store.record import Receipt
from trak_dist.store.run import Run

pytestmark = pytest.mark.slow

BAD = "featurize/1/train/8-16"


@pytest.fixture
def command(launch: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable:
    """A command on a run of the tiny problem in `tmp_path`, as if in a fresh process."""

    def run(name: str, *overrides: str) -> Any:
        return launch(
            "problem._target_=tiny.problem",
            f"+problem.directory={tmp_path / 'checkpoints'}",
            "+problem.rows=20",
            f"run_dir={tmp_path / name}",
            "proj_dim=16",
            "featurize.batch_rows=4",
            "featurize.cell_rows=8",
            "cluster=debug",
            *overrides,
        )

    tiny.write_checkpoints(tmp_path / "checkpoints", 2)
    return run


def receipts(run_dir: Path) -> dict[str, Receipt]:
    results = open_run(run_dir)
    return {i: r for stage in STAGE_STEPS for i, r in results.receipts(stage).items()}


def started(run_dir: Path) -> dict[str, float]:
    return {cell_id: r.job["started"] for cell_id, r in receipts(run_dir).items()}


def scores(run_dir: Path, targets: str) -> np.ndarray:
    found = open_run(run_dir).scores(targets)
    assert np.isfinite(found).all()
    return found.view(np.uint32)


def test_an_added_target_set_costs_only_itself(command, tmp_path: Path) -> None:
    assert command("run", "targets=val").code == 0
    before, val = started(tmp_path / "run"), scores(tmp_path / "run", "val")
    assert command("run", "targets=test").code == 0
    after = started(tmp_path / "run")
    assert {i: after[i] for i in before} == before
    assert {i for i in after if i not in before} == {
        *("featurize/0/test/0-5", "featurize/1/test/0-5"),
        *("precondition/0/test", "precondition/1/test", "score/test/0-20", "report/test"),
    }
    np.testing.assert_array_equal(scores(tmp_path / "run", "val"), val)
    assert command("run", "targets=[val,test]").code == 0
    assert started(tmp_path / "run") == after
    assert command("fresh", "targets=[val,test]").code == 0
    for name in ("val", "test"):
        np.testing.assert_array_equal(
            scores(tmp_path / "run", name), scores(tmp_path / "fresh", name)
        )


def test_an_added_checkpoint_rescores_but_recomputes_no_gradient_and_no_kernel(
    command, tmp_path: Path
) -> None:
    assert command("run", "targets=val").code == 0
    before, of_two = started(tmp_path / "run"), scores(tmp_path / "run", "val")
    torch.save(tiny.state(2), tmp_path / "checkpoints" / "2.pt")
    assert command("run").code == 0
    after = started(tmp_path / "run")
    again = {i for i in before if after[i] != before[i]}
    assert again == {"score/val/0-20", "report/val"}
    assert {i.split("/")[1] for i in after if i not in before} == {"2"}
    assert command("fresh", "targets=val").code == 0
    of_three = scores(tmp_path / "run", "val")
    np.testing.assert_array_equal(of_three, scores(tmp_path / "fresh", "val"))
    assert (of_three != of_two).any()


def test_status_of_a_grown_run_is_incomplete_until_it_is_rescored(command, tmp_path: Path) -> None:
    command("run", "targets=val")
    torch.save(tiny.state(2), tmp_path / "checkpoints" / "2.pt")
    assert command("run", "stage=plan").code == 0
    counts = json.loads(command("run", "stage=status").out.splitlines()[-1])
    assert counts["complete"] is False
    assert counts["stage"]["featurize"] == {
        "done": 8,
        "total": 12,
        "failed": 0,
        "running": 0,
        "queued": 0,
    }
    assert counts["stage"]["reduce"]["done"] == 6
    with pytest.raises(MissingInputs, match="1 of 1 score cells of 'val' are missing"):
        open_run(tmp_path / "run").scores("val")


def reseeded(plan: Plan) -> Plan:
    projection = replace(plan.spec.projection, seed=plan.spec.projection.seed + 1)
    return replace(plan, spec=replace(plan.spec, projection=projection))


def test_a_job_of_a_superseded_plan_writes_nothing(command, tmp_path: Path) -> None:
    command("run", "targets=val", "stage=plan")
    run = Run.open(tmp_path / "run")
    run.layout.plan(0).write_text(plan_file.dump(reseeded(run.plan)))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    cells = [c.id for c in of_stage(run.plan, "featurize")]
    with pytest.raises(PlanMismatch, match="this job was made for fingerprint"):
        worker.run_cells(str(tmp_path / "run"), run.plan.fingerprint, "cpu", cells)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_worker_whose_plan_is_superseded_at_work_publishes_nothing_and_stops(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trak_dist.stages import featurize

    command("run", "targets=val", "stage=plan")
    run = Run.open(tmp_path / "run")
    called: list[str] = []

    def slow(session, cell, stage=featurize.featurize) -> object:
        called.append(cell.id)
        if len(called) == 2:
            run.layout.plan(0).write_text(plan_file.dump(reseeded(run.plan)))
        return stage(session, cell)

    monkeypatch.setattr(featurize, "featurize", slow)
    cells = list(of_stage(run.plan, "featurize"))
    worker.run_cells(str(tmp_path / "run"), run.plan.fingerprint, "cpu", [c.id for c in cells])
    assert called == [c.id for c in cells[:2]]
    assert set(run.receipts.done(cells)) == {cells[0]}
    (failure,) = run.receipts.failures(cells).values()
    assert failure.cell == cells[1].id
    assert "the plan was superseded" in failure.error


def test_a_worker_of_a_smaller_ensemble_does_not_write_over_the_scores_of_a_larger_one(
    command, tmp_path: Path
) -> None:
    command("run", "targets=val")
    run = Run.open(tmp_path / "run")
    old = Session(run, torch.device("cpu"))
    torch.save(tiny.state(2), tmp_path / "checkpoints" / "2.pt")
    assert command("run").code == 0
    grown = Run.open(tmp_path / "run")
    expected = scores(tmp_path / "run", "val")
    with pytest.raises(PlanMismatch):
        worker._run_cell(old, parse_cell("score/val/0-20"))
    assert list(damaged_cells(grown)) == []
    np.testing.assert_array_equal(scores(tmp_path / "run", "val"), expected)


@pytest.fixture
def featurized(command, tmp_path: Path) -> Run:
    assert command("run", "targets=val", "stage=featurize").code == 0
    return Run.open(tmp_path / "run")


def edit(run: Run, cell_id: str, fact: str, value: object) -> None:
    cell = parse_cell(cell_id)
    receipt = run.receipts.done([cell])[cell]
    assert receipt.facts[fact] != value
    run.receipts.publish(cell, replace(receipt, facts={**receipt.facts, fact: value}))


@pytest.mark.parametrize(
    ("cell_id", "fact", "value"),
    [
        (BAD, "checkpoint_digest", "0" * 32),
        (BAD, "projector_seed", 1),
        (BAD, "dtype", "float32"),
        (BAD, "inputs_digest", "0" * 32),
        ("featurize/1/val/0-7", "checkpoint_digest", "0" * 32),
        ("featurize/1/val/0-7", "inputs_digest", "0" * 32),
    ],
)
def test_cells_made_from_different_things_are_not_reduced_together(
    command, featurized: Run, cell_id: str, fact: str, value: object
) -> None:
    edit(featurized, cell_id, fact, value)
    ended = command("run", "stage=reduce")
    assert ended.code == 1
    assert f"cells that belong together disagree on {fact}" in ended.err
    assert cell_id in ended.err
    assert repr(value) in ended.err
    done = {c.id for c in featurized.receipts.done(of_stage(featurized.plan, "reduce"))}
    assert not any(i.startswith("score") for i in done)
    if cell_id == BAD and fact != "inputs_digest":
        assert f"where: {BAD}" in ended.err
        assert not any("/1" in i for i in done)


def test_shuffled_checkpoints_are_refused(command, featurized: Run, tmp_path: Path) -> None:
    one, other = (tmp_path / "checkpoints" / f"{i}.pt" for i in (0, 1))
    shutil.copy(one, tmp_path / "kept.pt")
    shutil.copy(other, one)
    shutil.copy(tmp_path / "kept.pt", other)
    ended = command("run", "targets=[val,test]")
    assert ended.code == 2
    assert "model_id 0 has other weights than those it was first featurized with" in ended.err


@pytest.mark.parametrize("stage", ["reduce", "report"])
def test_a_stage_before_what_it_needs_says_which_command_to_run(
    command, tmp_path: Path, stage: str
) -> None:
    ended = command("run", "targets=val", f"stage={stage}")
    assert ended.code == 2
    assert ended.err == (
        f"error: stage={stage} needs featurize, of which 8 of 8 cells are missing\n"
        f"  where: {tmp_path / 'run'}\n"
        f"  next:  python -m trak_dist.launch stage=featurize run_dir={tmp_path / 'run'}\n"
    )


def test_half_a_featurize_is_not_enough_for_reduce(command, featurized: Run) -> None:
    featurized.receipts.revoke(parse_cell(BAD), why="a test")
    ended = command("run", "stage=reduce")
    assert ended.code == 2
    assert "1 of 8 cells are missing" in ended.err
    assert not bool(featurized.receipts.done([GramCell(0)]))
