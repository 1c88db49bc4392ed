"""Scores against the reference implementation of TRAK, the package traker."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import parity
import pytest
import small_cnn
import torch
from trak import TRAKer
from trak.projectors import BasicProjector, NoOpProjector, ProjectionType

import trak_dist
from trak_dist import open_run

PROCESSES = 3


def reference_scores(path: Path, case: parity.Case) -> np.ndarray:
    return quickstart(TRAKer, case, path / "reference", NoOpProjector(device="cpu"))


def quickstart(kind: type[Any], case: parity.Case, save_dir: Path, projector: object) -> np.ndarray:
    """The loop of traker's own quickstart, in batches of 15."""
    traker = kind(
        projector=projector,
        logging_level=logging.ERROR,
        **parity.arguments(case, str(save_dir)),
    )
    for model_id, state in enumerate(case.states):
        traker.load_checkpoint(state, model_id=model_id)
        for start in range(0, parity.TRAIN, 15):
            batch = tuple(t[start : start + 15] for t in case.train)
            traker.featurize(batch=batch, num_samples=len(batch[0]))
    traker.finalize_features()
    for model_id, state in enumerate(case.states):
        traker.start_scoring_checkpoint("val", state, model_id, num_targets=parity.TARGETS)
        traker.score(batch=case.targets, num_samples=parity.TARGETS)
    return np.array(traker.finalize_scores(exp_name="val"))


def assert_equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape == (parity.TRAIN, parity.TARGETS)
    errors = oracle.column_errors(ours, theirs.astype(np.float64))
    print(f"relative errors against traker: {errors}")
    assert errors.max() <= 1e-3


@pytest.mark.filterwarnings("ignore:::trak")
def test_scores_equal_those_of_the_reference_implementation(launch, tmp_path: Path) -> None:
    small_cnn.write_checkpoints(tmp_path / "checkpoints", parity.CHECKPOINTS)
    ended = launch(
        *("problem._target_=small_cnn.problem", f"run_dir={tmp_path / 'run'}", "cluster=debug"),
        *(f"+problem.directory={tmp_path / 'checkpoints'}", "projection=identity"),
        *("featurize.dtype=float32", "featurize.batch_rows=10", "featurize.cell_rows=20"),
        *("reduce.kernel_scale=mean_abs", "reduce.lambda_unit=absolute"),
        f"reduce.lambda_reg={parity.LAMBDA}",
        "reduce.curvature=none",
    )
    assert ended.code == 0, ended.err
    assert_equal(
        open_run(tmp_path / "run").scores("val"), reference_scores(tmp_path, parity.image())
    )


@pytest.mark.parametrize("name", ["image", pytest.param("text", marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore:::trak")
def test_scores_of_traker_equal_those_of_the_reference_implementation(
    name: str, tmp_path: Path
) -> None:
    case = parity.CASES[name]()
    save_dir = str(tmp_path / "run")
    command = [sys.executable, parity.__file__, name, save_dir]
    environment = {**os.environ, "PYTHONPATH": str(Path(small_cnn.__file__).parent)}
    processes = [
        subprocess.Popen(
            [*command, str(part), str(PROCESSES)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in range(PROCESSES)
    ]
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    traker = trak_dist.TRAKer(
        projector=trak_dist.NoOpProjector(), **parity.arguments(case, save_dir)
    )
    traker.finalize_features()
    for model_id in (1, 2, 0):
        traker.start_scoring_checkpoint("val", case.states[model_id], model_id, parity.TARGETS)
        for rows in (torch.tensor([6, 0, 3]), torch.tensor([5, 1, 4, 2])):
            traker.score(batch=tuple(t[rows] for t in case.targets), inds=rows)
    assert_equal(traker.finalize_scores("val"), reference_scores(tmp_path, case))
    assert open_run(save_dir).plan.gradients == "hooks"


@pytest.mark.filterwarnings("ignore:::trak")
def test_the_size_of_projected_scores_differs_by_the_dimension(tmp_path: Path) -> None:
    case, dim = parity.image(), 128
    theirs = BasicProjector(
        grad_dim=sum(p.numel() for p in case.net().parameters()),
        proj_dim=dim,
        seed=0,
        proj_type=ProjectionType.normal,
        device="cpu",
    )
    reference = quickstart(TRAKer, case, tmp_path / "reference", theirs)
    ours = quickstart(
        trak_dist.TRAKer, case, tmp_path / "run", trak_dist.BasicProjector(proj_dim=dim)
    )
    ratio = np.linalg.norm(reference) / np.linalg.norm(ours) / dim
    print(f"norm of traker's scores, per dimension: {ratio:.3f} of ours")
    assert 0.8 < ratio < 1.25
