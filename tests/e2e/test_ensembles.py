"""Ensembles told exactly: `checkpoints.use`, and what is missing of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from command_result import Launch
from sweeping import small_runs

from trak_dist import open_run, plan_file
from trak_dist.cells import FeaturizeCell
from trak_dist.errors import CheckpointError
from trak_dist.stages import featurize
from trak_dist.store.run import Run

pytestmark = pytest.mark.slow


@pytest.fixture
def run(launch: Launch, tiny_run: list[str], tmp_path: Path) -> Callable:
    """A command on a run of the tiny problem with 20 rows, 3 checkpoints and one target set."""
    return small_runs(launch, tiny_run, tmp_path)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Let checkpoint 1 fail, or not."""
    works = featurize.featurize

    def fails(session, cell: FeaturizeCell) -> object:
        if cell.model_id == 1:
            raise CheckpointError("bad luck")
        return works(session, cell)

    return lambda yes: monkeypatch.setattr(featurize, "featurize", fails if yes else works)


def test_the_ensemble_is_exactly_the_checkpoints_named(run, tmp_path: Path) -> None:
    ended = run("run", "checkpoints.use=[2,0]")
    assert ended.code == 0, ended.err
    assert "plan: 20 train rows, 2 checkpoints, " in ended.out
    scores = zarr.open_array(tmp_path / "run/store.zarr/scores/val", mode="r")
    assert scores.attrs["model_ids"] == [0, 2]
    results = open_run(tmp_path / "run")
    assert {i.split("/")[1] for i in results.receipts("featurize")} == {"0", "2"}
    assert len(results.plan.checkpoints) == 3
    assert not (tmp_path / "run/store.zarr/models/1").exists()
    status = run("run", "stage=status")
    assert '"complete": true' in status.out
    assert "\n1           " not in status.out
    assert run("run").code == 0
    assert open_run(tmp_path / "run").plan.model_ids == (0, 2), "it comes from the plan"


@pytest.mark.parametrize(
    ("use", "why"),
    [
        ("[0,3]", "checkpoints.use=[0, 3] is no ensemble: 3 is unknown"),
        ("[1,0,1]", "checkpoints.use=[0, 1, 1] is no ensemble: 1 is there 2 times"),
        ("-1", "checkpoints.use=[-1] is no ensemble: -1 is unknown"),
    ],
)
def test_ids_that_name_no_ensemble(run, tmp_path: Path, use: str, why: str) -> None:
    ended = run("run", f"checkpoints.use={use}")
    assert ended.code == 2
    assert ended.err == (
        f"error: {why}\n"
        "  where: checkpoints.use\n"
        "  next:  name each checkpoint once; there are 0 to 2\n"
    )
    assert not (tmp_path / "run").exists()


def test_what_is_no_list_of_numbers(run) -> None:
    ended = run("run", "checkpoints.use=[0,one]")
    assert "  checkpoints.use: [0, 'one'] is not a number or a list of numbers" in ended.err


def test_another_ensemble_is_taken_until_there_are_scores(run, tmp_path: Path) -> None:
    assert run("run", "checkpoints.use=[0,1]", "stage=featurize").code == 0
    before = open_run(tmp_path / "run").receipts("featurize")
    assert run("run", "checkpoints.use=[0,2]").code == 0
    after = open_run(tmp_path / "run").receipts("featurize")
    kept = {i: r for i, r in before.items() if i.startswith("featurize/0")}
    assert {i: after[i] for i in kept} == kept
    ended = run("run", "checkpoints.use=[0,1]")
    assert ended.code == 2
    assert ended.err.startswith(
        "error: the run has scores made with another proj_dim, reduce or ensemble\n"
    )
    assert run("run", "checkpoints.use=[0,1]", "stage=status").err.startswith(
        "error: the run directory belongs to another spec:\n"
        "  checkpoints.use: [0, 2] in the plan, [0, 1] now\n"
    )


def test_all_of_them_named_are_the_same_scores(run, tmp_path: Path) -> None:
    assert run("run").code == 0
    before = open_run(tmp_path / "run").receipts("reduce")
    assert run("run", "checkpoints.use=[0,1,2]").code == 0
    assert open_run(tmp_path / "run").receipts("reduce") == before


def test_a_missing_checkpoint_is_an_error_unless_allowed(run, broken, tmp_path: Path) -> None:
    broken(True)
    assert run("run").code == 1
    ended = run("run", "stage=reduce")
    assert ended.code == 2
    assert "stage=reduce needs featurize, of which 4 of 12 cells are missing" in ended.err
    ended = run("run", "stage=reduce", "checkpoints.allow_missing=true")
    assert ended.code == 0, ended.err
    assert "not featurized, left out of the ensemble: [1]; it is [0, 2]\n" in ended.out
    assert open_run(tmp_path / "run").plan.use == (0, 2)
    broken(False)
    assert run("two", "checkpoints.use=[0,2]").code == 0
    ours, separate = (open_run(tmp_path / name).scores("val") for name in ("run", "two"))
    np.testing.assert_array_equal(ours, separate)


def test_allowing_what_is_not_missing_changes_nothing(run, tmp_path: Path) -> None:
    assert run("run").code == 0
    ended = run("run", "stage=reduce", "checkpoints.allow_missing=true")
    assert ended.code == 0, ended.err
    assert "left out" not in ended.out
    assert Run.open(tmp_path / "run").generation == 0


def test_an_ensemble_of_none(run, tmp_path: Path) -> None:
    assert run("run", "stage=plan").code == 0
    ended = run("run", "stage=reduce", "checkpoints.allow_missing=true")
    assert ended.code == 2
    assert ended.err == (
        "error: checkpoints.allow_missing leaves no ensemble: none of the 3 checkpoints is "
        "featurized\n"
        f"  where: {tmp_path / 'run'}\n"
        f"  next:  python -m trak_dist.launch stage=featurize run_dir={tmp_path / 'run'}\n"
    )
    ended = run("run", "checkpoints.allow_missing=true")
    assert "  checkpoints.allow_missing: only stage=reduce takes it\n" in ended.err


def test_a_plan_written_before_there_were_ensembles_is_read(run, tmp_path: Path) -> None:
    from trak_dist.plan import digest

    assert run("run", "stage=plan").code == 0
    raw = json.loads((tmp_path / "run/plan.json").read_text())
    del raw["use"], raw["digest"]
    text = json.dumps({**raw, "digest": digest(raw)}).encode()
    assert plan_file.load(text, where="here") == Run.open(tmp_path / "run").plan
