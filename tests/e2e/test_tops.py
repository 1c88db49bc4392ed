"""`scores.keep=top`: the strongest rows of each target are those of all scores; nothing else is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_result import Launch

from trak_dist import open_run
from trak_dist.cells import ScoreCell, TopCell, TopPartCell, top_part
from trak_dist.errors import ConfigError
from trak_dist.ops import lds

pytestmark = pytest.mark.slow

COUNT, HALVES, BLOCK, ROWS, TARGETS = 3, 5, 4, 24, 6
SETTINGS = (
    *("problem._target_=tiny_trained.problem", "cluster=debug", "targets=val"),
    *("proj_dim=128", "featurize.batch_rows=4", "featurize.cell_rows=8", "checkpoints.train=4"),
    *("ground_truth.subsets=8", "counterfactuals.targets=2", "counterfactuals.remove=[3]"),
    "counterfactuals.seeds=1",
)
TOPS = ("scores.keep=top", f"scores.count={COUNT}", f"scores.block_targets={BLOCK}")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one cell's rows, a few of them scored at once."""
    monkeypatch.setattr(top_part, "ROWS_PER_KEPT", 1)
    monkeypatch.setattr(top_part, "HALVES_COUNT", HALVES)
    for module in ("trak_dist.cells.top", "trak_dist.store.kept_tops"):
        monkeypatch.setattr(f"{module}.HALVES_COUNT", HALVES)
    monkeypatch.setattr(top_part, "BLOCK_SCORES", 3 * BLOCK)
    monkeypatch.setattr(lds, "RESAMPLES", 199)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps all scores."""
    run_dir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lds, "RESAMPLES", 199)
        patch.setattr("sys.argv", ["trak-dist", *SETTINGS, f"run_dir={run_dir}"])
        from trak_dist.launch import main

        main()
    return run_dir


@pytest.fixture
def run_dir(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def test_tops_are_those_of_all_scores(whole: Path, run_dir: Path, launch: Launch) -> None:
    ended = launch(f"run_dir={run_dir}", "cluster=debug", *TOPS)
    assert ended.code == 0, ended.err
    assert f"the {COUNT} strongest scores of each target of val" in ended.out
    assert f"scores: {run_dir}/store.zarr/top/val/0-4/top" in ended.out
    before, after = open_run(whole), open_run(run_dir)
    assert not list(ScoreCell.of(after.plan))
    assert [c.id for c in TopCell.of(after.plan)] == ["top/val/0-4", "top/val/4-6"]
    assert TopPartCell.count(after.plan) == 2 * 3
    scores = before.scores("val")
    for at, found in enumerate(after.top("val", [5, 0, 4], COUNT)):
        expected = before.top("val", [5, 0, 4], COUNT)[at]
        assert found.target == expected.target
        assert found.helpful.tolist() == expected.helpful.tolist()
        assert found.harmful.tolist() == expected.harmful.tolist()
        assert np.allclose(found.helpful_scores, scores[found.helpful, found.target], rtol=1e-6)
        assert np.allclose(found.harmful_scores, scores[found.harmful, found.target], rtol=1e-6)
        assert found.harmful.dtype == np.int64
        assert found.harmful_scores.dtype == np.float32
    halves = before.top_of_halves("val", HALVES)
    assert after.top_of_halves("val", HALVES).tolist() == halves.tolist()
    first = json.loads((whole / "report/val.json").read_text())
    again = json.loads((run_dir / "report/val.json").read_text())
    assert again["curves"] == first["curves"]
    assert np.allclose(again["lds_per_target"], first["lds_per_target"], atol=0.05)
    assert again["counterfactuals"] == first["counterfactuals"]


def test_what_is_not_kept_is_refused_with_the_setting_that_keeps_it(
    run_dir: Path, launch: Launch
) -> None:
    assert launch(f"run_dir={run_dir}", "cluster=debug", *TOPS).code == 0
    found = open_run(run_dir)
    with pytest.raises(ConfigError, match=r"only the 3 highest and lowest(.|\n)*scores.keep=all"):
        found.scores("val")
    with pytest.raises(ConfigError, match="no target set 'other'"):
        open_run(run_dir).top("other", [0])
    with pytest.raises(ConfigError, match=r"4 of each target were asked for, 3 are kept(.|\n)*=4"):
        found.top("val", [0], 4)
    more = launch(f"run_dir={run_dir}", "cluster=debug", "stage=reduce", "scores.count=4")
    assert more.code == 0, more.err
    assert len(open_run(run_dir).top("val", [0], 4)[0].helpful) == 4
    back = launch(f"run_dir={run_dir}", "cluster=debug", "stage=reduce", "scores.keep=all")
    assert back.code == 0, back.err
    assert open_run(run_dir).scores("val").shape == (ROWS, TARGETS)


def test_all_scores_in_blocks_of_targets_are_those_of_one(
    whole: Path, run_dir: Path, launch: Launch
) -> None:
    ended = launch(f"run_dir={run_dir}", "cluster=debug", "scores.block_targets=4", "stage=reduce")
    assert ended.code == 0, ended.err
    blocks = run_dir.glob("store.zarr/models/0/*/reduce/*/precond_blocks/val/*")
    assert sorted(p.name for p in blocks if p.is_dir()) == ["0-4", "4-6"]


def test_above_a_size_only_tops_are_kept_unless_the_user_says(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path
) -> None:
    plan = open_run(run_dir).plan
    monkeypatch.setattr("trak_dist.cells.score.ALL_BYTES", 4 * ROWS * TARGETS - 1)
    assert TopCell.count(plan) == 1
    assert ScoreCell.count(plan) == 0
    monkeypatch.setattr("trak_dist.cells.score.ALL_BYTES", 4 * ROWS * TARGETS)
    assert TopCell.count(plan) == 0
