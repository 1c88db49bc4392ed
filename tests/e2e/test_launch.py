"""The command line on the tiny problem, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import zarr

from trak_dist import open_run


def test_all_makes_scores_that_any_zarr_reader_opens(launch, tiny_run, tmp_path: Path) -> None:
    ended = launch(*tiny_run)
    assert ended.code == 0, ended.err
    scores = zarr.open_array(tmp_path / "run/store.zarr/scores/val", mode="r")
    assert scores.shape == (50, 7)
    assert scores.dtype == np.float32
    assert np.isfinite(scores[:]).all()
    assert scores.attrs["model_ids"] == [0, 1, 2]
    group = zarr.open_group(tmp_path / "run/store.zarr", mode="r")
    np.testing.assert_array_equal(
        group["scores/test"][:], open_run(tmp_path / "run").scores("test")
    )


def test_run_dir_may_have_spaces_and_quotes(launch, tiny_run, tmp_path: Path) -> None:
    run_dir = tmp_path / 'a "run" für alle'
    ended = launch(*tiny_run, f"run_dir='{run_dir}'", "cluster=debug")
    assert ended.code == 0, ended.err
    assert open_run(run_dir).scores("val").shape == (50, 7)


def test_status_ends_with_the_json_line(launch, tiny_run, tmp_path: Path) -> None:
    launch(*tiny_run)
    ended = launch("stage=status", f"run_dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    last = json.loads(ended.out.splitlines()[-1])
    assert last["complete"] is True
    counts = {"done": 27, "total": 27, "failed": 0, "running": 0, "queued": 0}
    assert last["stage"]["featurize"] == counts
