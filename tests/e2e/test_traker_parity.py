"""Scores against the reference implementation of TRAK, the package traker, without projection."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import oracle
import pytest
import small_cnn
import torch
from trak import TRAKer
from trak.projectors import NoOpProjector

from trak_dist import open_run

CHECKPOINTS, LAMBDA = 3, 0.05


def reference_scores(path: Path) -> np.ndarray:
    """The loop of traker's own quickstart, in batches of 15."""
    problem = small_cnn.problem(str(path / "checkpoints"))
    states = [torch.load(c) for c in problem.checkpoints]
    train, targets = problem.train, problem.targets["val"]
    traker = TRAKer(
        model=small_cnn.net(),
        task="image_classification",
        train_set_size=len(train),
        save_dir=str(path / "reference"),
        device="cpu",
        projector=NoOpProjector(device="cpu"),
        use_half_precision=False,
        lambda_reg=LAMBDA,
        logging_level=logging.ERROR,
    )
    for model_id, state in enumerate(states):
        traker.load_checkpoint(state, model_id=model_id)
        for start in range(0, len(train), 15):
            batch = (train.images[start : start + 15], train.labels[start : start + 15])
            traker.featurize(batch=batch, num_samples=len(batch[0]))
    traker.finalize_features()
    for model_id, state in enumerate(states):
        traker.start_scoring_checkpoint("val", state, model_id, num_targets=len(targets))
        traker.score(batch=(targets.images, targets.labels), num_samples=len(targets))
    return np.array(traker.finalize_scores(exp_name="val"))


@pytest.mark.filterwarnings("ignore:::trak")
def test_scores_equal_those_of_the_reference_implementation(launch, tmp_path: Path) -> None:
    small_cnn.write_checkpoints(tmp_path / "checkpoints", CHECKPOINTS)
    ended = launch(
        *("problem._target_=small_cnn.problem", f"run_dir={tmp_path / 'run'}", "cluster=debug"),
        *(f"+problem.directory={tmp_path / 'checkpoints'}", "projection=identity"),
        *("featurize.dtype=float32", "featurize.batch_rows=10", "featurize.cell_rows=20"),
        *("reduce.kernel_scale=mean_abs", "reduce.lambda_unit=absolute"),
        f"reduce.lambda_reg={LAMBDA}",
    )
    assert ended.code == 0, ended.err
    ours = open_run(tmp_path / "run").scores("val")
    theirs = reference_scores(tmp_path)
    assert ours.shape == theirs.shape == (60, 7)
    errors = oracle.column_errors(ours, theirs.astype(np.float64))
    print(f"relative errors against traker: {errors}")
    assert errors.max() <= 1e-3
