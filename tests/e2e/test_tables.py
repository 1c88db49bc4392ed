"""Scores as a frame of pandas, and as a dataset of Hugging Face."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import tiny

from trak_dist import Results, open_run, plan_run
from trak_dist.errors import ConfigError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Results:
    root = tmp_path_factory.mktemp("tables")
    tiny.write_checkpoints(root / "checkpoints")
    made = {"_target_": "tiny.problem", "directory": str(root / "checkpoints")}
    plan_run(problem=made, run_dir=root / "run", cluster="debug", proj_dim=16).execute()
    return open_run(root / "run")


def test_scores_are_a_frame_by_rows_and_targets(
    run: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    pandas = pytest.importorskip("pandas")
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


def test_scores_are_a_dataset_that_stands_beside_the_train_set(
    run: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    found, scores = run.to_dataset("val"), run.scores("val")
    assert found.column_names == ["val"]
    feature = found.features["val"]
    assert (feature.length, feature.feature.dtype) == (scores.shape[1], "float32")
    assert np.array_equal(found.with_format("numpy")["val"][:], scores)
    train = datasets.Dataset.from_dict({"text": [f"example {row}" for row in range(len(scores))]})
    both = datasets.concatenate_datasets([train, found], axis=1)
    assert both[7] == {"text": "example 7", "val": scores[7].tolist()}
    with pytest.raises(ConfigError, match="nothing"):
        run.to_dataset("nothing")
    with pytest.raises(ConfigError, match="train is no target set"):
        run.to_dataset("train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="datasets is not installed"):
        run.to_dataset("val")
