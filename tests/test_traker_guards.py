"""TRAKer: what scripts do by mistake is refused, or does no harm; no result is silently wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import small_cnn
import torch
from command_result import Launch
from streaming_process import batch, traker
from test_traker import TARGETS, TRAIN, featurized, scored, states, whole
from torch import nn

from trak_dist import BasicProjector, ImageClassification, TRAKer, open_run
from trak_dist.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    NonFiniteGradient,
    PlanMismatch,
    ProblemError,
)
from trak_dist.store.run import Run


@pytest.fixture
def checkpoints(tmp_path: Path) -> str:
    small_cnn.write_checkpoints(tmp_path / "checkpoints")
    return str(tmp_path / "checkpoints")


@pytest.mark.parametrize("finalized", [True, False])
def test_other_examples_for_rows_that_are_there_are_refused(
    finalized: bool, checkpoints: str, tmp_path: Path
) -> None:
    fed = featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints)
    problem = small_cnn.problem(checkpoints)
    train, targets = problem.train, problem.targets["val"]
    state, order = states(checkpoints)[0], np.array([1, 0, 3, 2, 5, 4, 6])
    fed.start_scoring_checkpoint("val", state, 0, TARGETS)
    fed.score(batch(targets, np.arange(TARGETS)), num_samples=TARGETS)
    if finalized:
        wanted = scored(fed, checkpoints)
        fed = traker(checkpoints, str(tmp_path / "run"))
    fed.start_scoring_checkpoint("val", state, 0, TARGETS)
    told = r"2 of 7 rows of 'val' were computed before from other examples.*: 2-3"
    with pytest.raises(DatasetError, match=told) as refused:
        fed.score(batch(targets, np.array([0, 1, 3, 2, 4, 5, 6])), num_samples=TARGETS)
    assert "or another exp_name" in str(refused.value)
    fed.score(batch(targets, order), inds=order)
    fed.load_checkpoint(state, 0)
    with pytest.raises(DatasetError, match="3 of 3 rows of 'train'") as refused:
        fed.featurize(batch(train, np.arange(4, 7)), inds=np.arange(3))
    assert "or another save_dir" in str(refused.value)
    if finalized:
        assert np.array_equal(fed.finalize_scores("val"), wanted)


BATCHES = {
    "another dtype": (lambda x, y: (x.double(), y), ProblemError, "should be the same"),
    "labels that are no class": (lambda x, y: (x, y + 9), NonFiniteGradient, "in 2 of 2 rows"),
    "labels with a dimension": (
        lambda x, y: (x, y[:, None].expand(-1, 2)),
        ProblemError,
        r"labels of shape \(1, 2\)",
    ),
    "arrays": (lambda x, y: (x.numpy(), y.numpy()), ProblemError, "where: the batch"),
}


@pytest.mark.parametrize("mistake", BATCHES)
def test_a_mistaken_first_batch_makes_no_run(
    mistake: str, checkpoints: str, tmp_path: Path
) -> None:
    spoil, error, message = BATCHES[mistake]
    fed, train = traker(checkpoints, str(tmp_path / "run")), small_cnn.problem(checkpoints).train
    fed.load_checkpoint(states(checkpoints)[0], 0)
    with pytest.raises(error, match=message):
        fed.featurize(spoil(*batch(train, np.arange(8))), num_samples=8)
    assert not Run.exists(tmp_path / "run")
    fed.featurize(batch(train, np.arange(0)), num_samples=0)
    assert not Run.exists(tmp_path / "run")
    fed.featurize(batch(train, np.arange(8)), num_samples=8)
    assert open_run(tmp_path / "run").plan.gradients == "hooks"


def test_a_model_in_training_mode_is_put_back_in_evaluation_mode(
    checkpoints: str, tmp_path: Path
) -> None:
    wanted = whole(checkpoints, tmp_path / "run")
    fed, train = traker(checkpoints, str(tmp_path / "other")), small_cnn.problem(checkpoints).train
    for model_id, state in enumerate(states(checkpoints)):
        fed.load_checkpoint(state, model_id)
        fed.model.train()
        for rows in np.split(np.arange(TRAIN), [16, 32, 48]):
            fed.featurize(batch(train, rows), num_samples=len(rows))
    assert np.array_equal(scored(fed, checkpoints), wanted)


def test_weights_that_were_changed_since_they_were_loaded_are_refused(
    checkpoints: str, tmp_path: Path
) -> None:
    fed, train = traker(checkpoints, str(tmp_path / "run")), small_cnn.problem(checkpoints).train
    state, other, _ = states(checkpoints)
    fed.load_checkpoint(state, 0)
    fed.featurize(batch(train, np.arange(4)), num_samples=4)
    fed.model.load_state_dict(other)
    with pytest.raises(CheckpointError, match="weights were changed since load_checkpoint"):
        fed.featurize(batch(train, np.arange(4, 8)), num_samples=4)


def test_what_is_given_counts_also_where_it_is_the_default(
    checkpoints: str, tmp_path: Path
) -> None:
    featurized(traker(checkpoints, str(tmp_path / "run"), proj_dim=8), checkpoints)
    save_dir = str(tmp_path / "run")
    with pytest.raises(PlanMismatch, match="proj_dim: 8 in the run, 2048 now"):
        traker(checkpoints, save_dir, proj_dim=2048)
    with pytest.raises(
        PlanMismatch, match=r"featurize\.dtype: 'float32' in the run, 'float16' now"
    ):
        traker(checkpoints, save_dir, proj_dim=8, use_half_precision=True)
    scores = {
        lambda_reg: scored(
            traker(checkpoints, save_dir, proj_dim=8, lambda_reg=lambda_reg), checkpoints
        )
        for lambda_reg in (1.0, 0.0, None)
    }
    assert not np.allclose(scores[0.0], scores[1.0])
    assert np.array_equal(scores[None], scores[0.0]), "what is left out comes from the run"


class Tempered(ImageClassification):
    def __init__(self, temperature: float) -> None:
        self.temperature = temperature


def test_a_model_output_with_other_settings_is_another_one(
    checkpoints: str, tmp_path: Path
) -> None:
    save_dir = str(tmp_path / "run")
    featurized(traker(checkpoints, save_dir, task=Tempered(1.0)), checkpoints)
    traker(checkpoints, save_dir, task=Tempered(1.0))
    with pytest.raises(PlanMismatch, match="the model, or the model output"):
        traker(checkpoints, save_dir, task=Tempered(5.0))


def test_numbers_may_be_those_of_numpy(checkpoints: str, tmp_path: Path) -> None:
    fed = TRAKer(
        small_cnn.net(),
        "image_classification",
        np.int64(TRAIN),
        tmp_path,
        device="cpu",
        proj_dim=np.int64(8),
        projector_seed=np.int32(1),
        lambda_reg=np.float32(0.5),
    )
    problem, state = small_cnn.problem(checkpoints), states(checkpoints)[0]
    fed.load_checkpoint(state, np.int64(0))
    fed.featurize(batch(problem.train, np.arange(TRAIN)), num_samples=np.int64(TRAIN))
    fed.start_scoring_checkpoint("val", state, np.int64(0), np.int64(TARGETS))
    fed.score(batch(problem.targets["val"], np.arange(TARGETS)), num_samples=TARGETS)
    assert fed.finalize_scores("val").shape == (TRAIN, TARGETS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_set_size": 60.0}, r"train_set_size 60\.0 is not a whole number of at least 1"),
        ({"train_set_size": 0}, "train_set_size 0 is not a whole number of at least 1"),
        ({"proj_dim": "8"}, "proj_dim '8' is not a whole number of at least 1"),
        ({"projector_seed": 0.5}, r"projector_seed 0\.5 is not a whole number"),
        ({"projector": BasicProjector(proj_dim=0)}, "proj_dim 0 is not a whole number of at least"),
        ({"task": ImageClassification}, "not its class"),
    ],
)
def test_what_is_no_number_is_refused(
    arguments: dict[str, object], message: str, tmp_path: Path
) -> None:
    given = {"task": "image_classification", "train_set_size": TRAIN, **arguments}
    with pytest.raises(ConfigError, match=message):
        TRAKer(small_cnn.net(), save_dir=tmp_path, device="cpu", **given)


def test_a_module_is_no_checkpoint(checkpoints: str, tmp_path: Path) -> None:
    fed = traker(checkpoints, str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="not a state dict of named tensors: Sequential"):
        fed.load_checkpoint(small_cnn.net(), 0)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_wrappers_are_taken_off(wrap, checkpoints: str, tmp_path: Path) -> None:
    wanted = whole(checkpoints, tmp_path / "run")
    found = whole(checkpoints, tmp_path / "wrapped", model=wrap(small_cnn.net()))
    assert np.array_equal(found, wanted)


def test_rows_that_were_damaged_are_to_be_streamed_again(
    launch: Launch, checkpoints: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    wanted = whole(checkpoints, run_dir)
    chunk = next((run_dir / "store.zarr").rglob("train/inputs/c/*/*"))
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"\0")
    ended = launch("stage=verify", "repair=true", f"run_dir={run_dir}")
    assert "stream the rows of these cells again, by the same calls of TRAKer" in ended.out
    assert np.array_equal(whole(checkpoints, run_dir), wanted)
