"""Scores as a frame of pandas."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from trak_dist import open_run, plan_run
from trak_dist.errors import ConfigError


def test_scores_are_a_frame_by_rows_and_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pandas = pytest.importorskip("pandas")
    tiny.write_checkpoints(tmp_path / "checkpoints")
    made = {"_target_": "tiny.problem", "directory": str(tmp_path / "checkpoints")}
    plan_run(problem=made, run_dir=tmp_path / "run", cluster="debug", proj_dim=16).execute()
    run = open_run(tmp_path / "run")
    frame, scores = run.to_pandas("val"), run.scores("val")
    assert isinstance(frame, pandas.DataFrame)
    assert (frame.index.name, frame.columns.name) == ("train", "val")
    assert (frame.dtypes == np.float32).all()
    assert np.array_equal(frame.to_numpy(), scores)
    best = frame[1].nlargest(3).index
    assert best.tolist() == run.top("val", [1], count=3)[0].helpful.tolist()
    with pytest.raises(ConfigError, match="nothing"):
        run.to_pandas("nothing")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="pandas is not installed"):
        run.to_pandas("val")
