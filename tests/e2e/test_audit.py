"""The audit of featurize cells: what it finds, and what becomes of the run then."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from command_result import Launch
from torch import Tensor

from trak_dist import open_run
from trak_dist.cells import FeaturizeCell
from trak_dist.checkpoints import featurizer
from trak_dist.checks.gradient_audit import BATCHES, Audit
from trak_dist.coordinates import Rows
from trak_dist.errors import NotCovered
from trak_dist.ops.hooks import HookGradients


class Swapping(HookGradients):
    """Gives the rows of some batches each other's gradients."""

    def __call__(self, batch, take) -> Tensor:
        swaps = bool((batch[0][:, 0] > 1.5).any())
        return super().__call__(batch, lambda n, r, g: take(n, r, g.flip(0) if swaps else g))


@pytest.fixture
def thorough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Audits of all rows, so that none that is wrong is left out by the draw."""
    everything = Audit(frozenset(range(10)), 0, 0)
    monkeypatch.setattr(Audit, "sample_for_cell", lambda *_: dataclasses.replace(everything))


class Refusing(HookGradients):
    """Has no rule for what the model does in some batches."""

    def __call__(self, batch, take) -> Tensor:
        f = super().__call__(batch, take)
        if (batch[0][:, 0] > 1.5).any():
            raise NotCovered("0.weight (in torch.unheard_of)")
        return f


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    tiny.write_checkpoints(tmp_path / "checkpoints", 2)
    return [
        *("problem._target_=tiny.problem", f"+problem.directory={tmp_path / 'checkpoints'}"),
        *("proj_dim=16", "featurize.dtype=float32", "targets=val", "featurize.batch_rows=5"),
        "featurize.cell_rows=10",
    ]


@pytest.fixture
def by_loop(launch: Launch, tmp_path: Path, arguments: list[str]) -> np.ndarray:
    where = f"run_dir={tmp_path / 'loop'}"
    ended = launch(*arguments, "cluster=debug", where, "featurize.gradients=loop")
    assert ended.code == 0, ended.err
    return open_run(tmp_path / "loop").scores("val")


def test_what_was_audited_is_in_receipts_status_and_report(
    command: Launch, tmp_path: Path, arguments: list[str]
) -> None:
    assert command(*arguments).code == 0
    run = open_run(tmp_path / "run")
    facts = [r.facts for r in run.receipts("featurize").values()]
    assert len(facts) == 12
    assert all(f["audited_rows"] == 2 and f["largest_difference"] < 1e-5 for f in facts)
    told = "audit  24 rows and "
    assert told in command("stage=status").out
    assert "24 rows and " in (tmp_path / "run/report/val.html").read_text()


def test_wrong_gradients_take_the_checkpoint_back_and_the_loop_makes_it_anew(
    command: Launch,
    tmp_path: Path,
    arguments: list[str],
    by_loop: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    thorough: None,
) -> None:
    assert command(*arguments, "stage=plan").code == 0
    monkeypatch.setattr(featurizer, "HookGradients", Swapping)
    assert command().code == 0
    run = open_run(tmp_path / "run")
    assert run.plan.gradients == "hooks"
    assert {r.facts["gradients"] for r in run.receipts("featurize").values()} == {"loop"}
    assert np.linalg.norm(run.scores("val") - by_loop) <= 1e-5 * np.linalg.norm(by_loop)
    status = command("stage=status").out
    assert "audit  checkpoint 0 by loop, since featurize/0/train/" in status
    assert "has different gradients in its batch, by hooks, than alone: " in status
    assert json.loads(status.splitlines()[-1])["complete"]


def test_what_was_made_of_wrong_gradients_is_made_again(
    command: Launch,
    tmp_path: Path,
    arguments: list[str],
    by_loop: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    thorough: None,
) -> None:
    assert command(*arguments).code == 0
    run = open_run(tmp_path / "run")
    damaged = FeaturizeCell(0, "train", Rows(20, 30))
    run._run.receipts.revoke(damaged, why="for this test")
    monkeypatch.setattr(featurizer, "HookGradients", Swapping)
    assert command().code == 0
    again = open_run(tmp_path / "run")
    of_first = [r for r in again.receipts("featurize").values() if "/0/" in r.cell]
    assert {r.facts["gradients"] for r in of_first} == {"loop"}
    assert np.linalg.norm(again.scores("val") - by_loop) <= 1e-5 * np.linalg.norm(by_loop)
    assert command("stage=verify").code == 0


def test_wrong_gradients_by_hooks_that_were_asked_for_fail_and_the_loop_is_a_way_out(
    command: Launch,
    tmp_path: Path,
    arguments: list[str],
    by_loop: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    thorough: None,
) -> None:
    assert command(*arguments, "stage=plan", "featurize.gradients=hooks").code == 0
    monkeypatch.setattr(featurizer, "HookGradients", Swapping)
    ended = command()
    assert ended.code == 1
    status = command("stage=status").out
    assert "has different gradients in its batch, by hooks, than alone: " in status
    assert "next:  featurize.gradients=loop with the same run_dir" in status
    ended = command("featurize.gradients=loop")
    assert ended.code == 0, ended.err
    run = open_run(tmp_path / "run")
    assert run.plan.gradients == "loop"
    assert np.array_equal(run.scores("val"), by_loop)
    ended = command("featurize.gradients=vmap")
    assert ended.code == 2
    assert "the run has scores, whose gradients are by loop" in ended.err


def test_a_batch_without_a_rule_goes_one_by_one(
    command: Launch,
    tmp_path: Path,
    arguments: list[str],
    by_loop: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert command(*arguments, "stage=plan").code == 0
    monkeypatch.setattr(featurizer, "HookGradients", Refusing)
    assert command().code == 0
    run = open_run(tmp_path / "run")
    slower = [r.facts["slower_batches"] for r in run.receipts("featurize").values()]
    assert 0 < sum(slower) < 24
    assert f"{sum(slower)} batches computed one by one" in command("stage=status").out
    assert np.linalg.norm(run.scores("val") - by_loop) <= 1e-5 * np.linalg.norm(by_loop)


def test_one_batch_in_so_many_is_checked_whole_and_rows_are_drawn_from_all() -> None:
    drawn = [Audit.sample_for_cell(f"key {i}", 640, 64) for i in range(2000)]
    assert drawn[0] == Audit.sample_for_cell("key 0", 640, 64)
    whole = sum(one.batch is not None for one in drawn)
    assert abs(whole - 2000 * 10 / BATCHES) < 100
    rows = {row for one in drawn for row in one.rows}
    assert len(rows) > 620
    assert all(
        Audit.sample_for_cell(f"key {i}", 64 * BATCHES, 64).batch is not None for i in range(50)
    )
