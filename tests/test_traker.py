"""TRAKer: TRAK's calls, what they refuse, and what the command line makes of what they wrote."""

from __future__ import annotations

import functools
import json
import logging
import random
import re
from pathlib import Path

import numpy as np
import oracle
import pytest
import small_cnn
import streaming_process
import torch
import zarr
from command_result import Launch
from streaming_process import batch, traker
from torch import nn

from trak_dist import (
    AbstractModelOutput,
    BasicProjector,
    FunctionalGradientComputer,
    ImageClassification,
    IterativeGradientComputer,
    ModelIDException,
    NoOpProjector,
    ProjectionType,
    TRAKer,
    open_run,
    worker,
)
from trak_dist.cells import KernelCell
from trak_dist.errors import (
    CellsFailed,
    CheckpointError,
    ConfigError,
    NonFiniteGradient,
    PlanMismatch,
    ProblemError,
)
from trak_dist.store.run import Run

TRAIN, TARGETS = streaming_process.TRAIN, 7


@pytest.fixture
def checkpoints(tmp_path: Path) -> str:
    small_cnn.write_checkpoints(tmp_path / "checkpoints")
    return str(tmp_path / "checkpoints")


def states(checkpoints: str) -> list[dict[str, torch.Tensor]]:
    return [torch.load(p, weights_only=True) for p in sorted(Path(checkpoints).glob("*.pt"))]


def featurized(fed: TRAKer, checkpoints: str, rows: range = range(TRAIN), size: int = 16) -> TRAKer:
    train = small_cnn.problem(checkpoints).train
    for model_id, state in enumerate(states(checkpoints)):
        fed.load_checkpoint(state, model_id=model_id)
        for start in range(rows.start, rows.stop, size):
            inds = np.arange(start, min(start + size, rows.stop))
            fed.featurize(batch(train, inds), inds=torch.from_numpy(inds))
    return fed


def scored(fed: TRAKer, checkpoints: str, name: str = "val") -> np.ndarray:
    targets = small_cnn.problem(checkpoints).targets["val"]
    for model_id, state in enumerate(states(checkpoints)):
        fed.start_scoring_checkpoint(
            exp_name=name, checkpoint=state, model_id=model_id, num_targets=TARGETS
        )
        for start in range(0, TARGETS, 3):
            rows = np.arange(start, min(start + 3, TARGETS))
            fed.score(batch=batch(targets, rows), num_samples=len(rows))
    return fed.finalize_scores(exp_name=name)


def whole(checkpoints: str, save_dir: Path, **arguments: object) -> np.ndarray:
    fed = featurized(traker(checkpoints, str(save_dir), **arguments), checkpoints)
    fed.finalize_features()
    return scored(fed, checkpoints)


# Scores ---------------------------------------------------------------------------------------


def test_scores_are_those_of_the_oracle(checkpoints: str, tmp_path: Path) -> None:
    found = whole(checkpoints, tmp_path / "run", projector=NoOpProjector(), lambda_reg=0.05)
    problem = small_cnn.problem(checkpoints)
    members = [
        oracle.member(small_cnn.net(), state, problem.train, problem.targets["val"])
        for state in states(checkpoints)
    ]
    reduce = {"lambda_reg": 0.05, "lambda_unit": "absolute", "kernel_scale": "mean_abs"}
    wanted, _ = oracle.scores(members, **reduce)
    assert found.dtype == np.float32
    assert found.shape == (TRAIN, TARGETS)
    assert oracle.column_errors(found, wanted).max() < 1e-3


def test_rows_in_any_order_and_batch_give_the_same_scores(checkpoints: str, tmp_path: Path) -> None:
    wanted = whole(checkpoints, tmp_path / "in order")
    shuffled = traker(checkpoints, str(tmp_path / "shuffled"))
    train = small_cnn.problem(checkpoints).train
    order = np.random.default_rng(0).permutation(TRAIN)
    for model_id, state in enumerate(states(checkpoints)):
        shuffled.load_checkpoint(state, model_id)
        for rows in np.array_split(order, 7):
            shuffled.featurize(batch(train, rows), inds=rows)
    shuffled.finalize_features()
    found = scored(shuffled, checkpoints)
    assert oracle.column_errors(found, wanted.astype(np.float64)).max() < 1e-4


def test_what_traker_made_is_an_array_and_a_run(checkpoints: str, tmp_path: Path) -> None:
    found = whole(checkpoints, tmp_path / "run")
    stored = zarr.open_array(tmp_path / "run" / "store.zarr" / "scores" / "val", mode="r")
    assert np.array_equal(stored[:], found)
    run = open_run(tmp_path / "run")
    assert np.array_equal(run.scores("val"), found)
    assert {r.facts["gradients"] for r in run.receipts("featurize").values()} == {"hooks"}
    assert not list((tmp_path / "run" / "parts").rglob("*.safetensors"))


@pytest.mark.parametrize("proj_dim", [1, 3, 100, 513])
def test_any_dimension_works(proj_dim: int, checkpoints: str, tmp_path: Path) -> None:
    found = whole(checkpoints, tmp_path / "run", proj_dim=proj_dim)
    assert np.isfinite(found).all()


def test_lambda_is_in_units_of_trak(checkpoints: str, tmp_path: Path) -> None:
    """TRAK's dense matrices have no factor 1/√k, so its Gram is k times ours."""
    projector = BasicProjector(grad_dim=9, proj_dim=64, seed=1, proj_type=ProjectionType.rademacher)
    whole(checkpoints, tmp_path / "run", projector=projector, lambda_reg=0.5)
    reduce = open_run(tmp_path / "run").plan.spec.reduce
    assert (reduce.lambda_reg, reduce.lambda_unit) == (0.5 / 64, "absolute")


def test_rows_are_weighted_by_their_curvature(checkpoints: str, tmp_path: Path) -> None:
    """Asked for at once, or of a run that has other scores; by default they are TRAK's again."""
    asked = {"projector": NoOpProjector(), "lambda_reg": 0.05}
    plain = whole(checkpoints, tmp_path / "run", **asked)
    found = whole(checkpoints, tmp_path / "other", **asked, curvature="output")
    again = whole(checkpoints, tmp_path / "run", **asked, curvature="output")
    problem = small_cnn.problem(checkpoints)
    members = [
        oracle.member(
            *(small_cnn.net(), state, problem.train, problem.targets["val"]), weighted=True
        )
        for state in states(checkpoints)
    ]
    reduce = {"lambda_reg": 0.05, "lambda_unit": "absolute", "kernel_scale": "mean_abs"}
    wanted, _ = oracle.scores(members, **reduce)
    for scores in (found, again):
        assert oracle.column_errors(scores, wanted).max() < 1e-3
    assert open_run(tmp_path / "run").plan.curvature == "output"
    assert np.array_equal(whole(checkpoints, tmp_path / "run", **asked, curvature="none"), plain)


@pytest.mark.parametrize(
    ("curvature", "what"),
    [
        ("fisher", "fisher, for which labels are drawn, needs a problem and the launcher"),
        ("auto", "a task that declares loss = 'logistic'"),
    ],
)
def test_a_curvature_that_can_not_be_is_refused(
    checkpoints: str, tmp_path: Path, curvature: str, what: str
) -> None:
    with pytest.raises(ConfigError, match=what):
        traker(checkpoints, str(tmp_path / "run"), curvature=curvature)


# Resuming -------------------------------------------------------------------------------------


def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of batches whose gradients are computed."""
    sizes: list[int] = []
    from trak_dist.ops.hooks import HookGradients

    call = HookGradients.__call__

    def counting(self, examples, take):
        sizes.append(len(examples[0]))
        return call(self, examples, take)

    monkeypatch.setattr(HookGradients, "__call__", counting)
    return sizes


def test_a_batch_that_is_there_in_part_skips_only_those_rows(
    checkpoints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = whole(checkpoints, tmp_path / "whole")
    featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints, range(10, 30))
    sizes = computed(monkeypatch)
    fed = featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints)
    assert sum(sizes) == 3 * (TRAIN - 20)
    sizes.clear()
    featurized(fed, checkpoints)
    assert not sizes
    fed.finalize_features()
    featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints)
    assert not sizes, "rows that are in cells are there too"
    assert oracle.column_errors(scored(fed, checkpoints), wanted.astype(float)).max() < 1e-4


def test_num_samples_counts_on_and_each_checkpoint_starts_over(
    checkpoints: str, tmp_path: Path
) -> None:
    fed, train = traker(checkpoints, str(tmp_path / "run")), small_cnn.problem(checkpoints).train
    for model_id, state in enumerate(states(checkpoints)):
        fed.load_checkpoint(state, model_id)
        for rows in np.array_split(np.arange(TRAIN), 5):
            fed.featurize(batch(train, rows), num_samples=len(rows))
    fed.finalize_features()
    assert (
        oracle.column_errors(
            scored(fed, checkpoints), whole(checkpoints, tmp_path / "other").astype(float)
        ).max()
        < 1e-4
    )


def test_targets_may_follow_after_scores_were_finalized(checkpoints: str, tmp_path: Path) -> None:
    fed = featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints)
    wanted, targets = scored(fed, checkpoints), small_cnn.problem(checkpoints).targets["val"]
    fed.score(batch=batch(targets, np.arange(3)), num_samples=3)  # they are there already
    assert np.array_equal(fed.finalize_scores(exp_name="val"), wanted)


def test_the_process_keeps_its_random_numbers_and_threads(checkpoints: str, tmp_path: Path) -> None:
    fed = featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints)
    torch.set_num_threads(2)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    wanted = random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    fed.finalize_features()
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == wanted  # noqa: NPY002
    assert torch.get_num_threads() == 2


def test_another_lambda_makes_other_scores_of_the_same_grads(
    checkpoints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = whole(checkpoints, tmp_path / "run")
    sizes = computed(monkeypatch)
    second = traker(checkpoints, str(tmp_path / "run"), lambda_reg=50.0).finalize_scores("val")
    assert not sizes
    assert oracle.column_errors(second, first.astype(float)).max() > 0.01


def test_del_grads_destroys_nothing(
    checkpoints: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fed = featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints)
    fed.finalize_features(del_grads=True)
    assert "the grads are kept, since scores are computed from them" in caplog.text
    assert np.isfinite(scored(fed, checkpoints)).all()


# Ensembles ------------------------------------------------------------------------------------


def test_scores_of_some_checkpoints_are_those_of_a_run_of_them(
    checkpoints: str, tmp_path: Path
) -> None:
    fed = featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints)
    fed.finalize_features(model_ids=[0, 2])
    every = scored(fed, checkpoints)
    some = fed.finalize_scores("val", model_ids=[2, 0])
    assert not np.array_equal(some, every)
    Path(checkpoints, "1.pt").unlink()
    small = traker(checkpoints, str(tmp_path / "small"))
    train, targets = small_cnn.problem(checkpoints).train, small_cnn.Images(TARGETS, seed=2)
    for model_id, state in zip((0, 2), states(checkpoints), strict=True):
        small.load_checkpoint(state, model_id)
        small.featurize(batch(train, np.arange(TRAIN)), num_samples=TRAIN)
        small.start_scoring_checkpoint("val", state, model_id, TARGETS)
        small.score(batch(targets, np.arange(TARGETS)), num_samples=TARGETS)
    wanted = small.finalize_scores("val")
    assert oracle.column_errors(some, wanted.astype(float)).max() < 1e-4
    assert np.array_equal(fed.finalize_scores("val"), every)


def test_checkpoints_outside_the_ensemble_keep_their_calls(
    checkpoints: str, tmp_path: Path
) -> None:
    fed = featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints)
    every = scored(fed, checkpoints)
    fed.finalize_scores("val", model_ids=[0])
    other = traker(checkpoints, str(tmp_path / "run"), lambda_reg=50.0)
    other.finalize_features()
    run = Run.open(tmp_path / "run")
    assert run.plan.model_ids == (0,)
    kernels = [KernelCell(model_id) for model_id in range(3)]
    assert list(run.receipts.done(kernels)) == kernels
    assert np.isfinite(scored(other, checkpoints, "more")).all()
    assert np.array_equal(fed.finalize_scores("val"), every)


def test_missing_targets_are_named_or_their_checkpoint_skipped(
    checkpoints: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fed = featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints)
    targets = small_cnn.problem(checkpoints).targets["val"]
    for model_id, state in enumerate(states(checkpoints)):
        fed.start_scoring_checkpoint("val", state, model_id, TARGETS)
        rows = np.array([0, 1, 2, 5] if model_id == 1 else range(TARGETS))
        fed.score(batch(targets, rows), inds=rows)
    message = "3 of 7 targets of 'val' are missing for model_id 1: 3-4, 6"
    with pytest.raises(ModelIDException, match=message):
        fed.finalize_scores("val")
    found = fed.finalize_scores("val", allow_skip=True)
    assert f"skipped: {message}" in caplog.text
    assert np.array_equal(found, fed.finalize_scores("val", model_ids=[0, 2]))


def test_missing_train_rows_are_named(checkpoints: str, tmp_path: Path) -> None:
    fed = featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints, range(3, 50))
    message = "13 of 60 train rows are missing for model_id 0: 0-2, 50-59"
    with pytest.raises(ModelIDException, match=message):
        fed.finalize_features()


# Guards ---------------------------------------------------------------------------------------


def test_other_weights_under_a_known_id_are_refused(checkpoints: str, tmp_path: Path) -> None:
    featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints)
    first, second, _ = states(checkpoints)
    with pytest.raises(CheckpointError, match="model_id 1 has other weights than those"):
        traker(checkpoints, str(tmp_path / "run")).load_checkpoint(first, model_id=1)
    with pytest.raises(CheckpointError, match="model_id 0 has other weights than those"):
        traker(checkpoints, str(tmp_path / "run")).start_scoring_checkpoint("a", second, 0, 3)


def test_other_weights_are_refused_also_where_another_process_created_the_run(
    checkpoints: str, tmp_path: Path
) -> None:
    first, second, _ = states(checkpoints)
    train = small_cnn.problem(checkpoints).train
    one, other = (traker(checkpoints, str(tmp_path / "run")) for _ in range(2))
    one.load_checkpoint(first, model_id=0)
    other.load_checkpoint(second, model_id=0)  # there is no run yet to check it by
    one.featurize(batch(train, np.arange(8)), num_samples=8)
    parts = sorted(tmp_path.rglob("parts/**/*.safetensors"))
    assert len(parts) == 1
    for _ in range(2):
        with pytest.raises(CheckpointError, match="model_id 0 has other weights than those"):
            other.featurize(batch(train, np.arange(8, 16)), inds=np.arange(8, 16))
    assert sorted(tmp_path.rglob("parts/**/*.safetensors")) == parts
    other.load_checkpoint(second, model_id=1)
    other.featurize(batch(train, np.arange(8)), num_samples=8)


def test_after_a_refusal_nothing_is_streamed_until_a_checkpoint_is_loaded(
    checkpoints: str, tmp_path: Path
) -> None:
    fed = featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints, range(10))
    some = batch(small_cnn.problem(checkpoints).train, np.arange(10, 14))
    with pytest.raises(CheckpointError, match="has other weights"):
        fed.load_checkpoint(states(checkpoints)[0], model_id=1)
    with pytest.raises(ModelIDException, match="no checkpoint is loaded"):
        fed.featurize(some, num_samples=4)
    with pytest.raises(CheckpointError, match="not a state dict of named tensors: keys"):
        fed.load_checkpoint({"model": states(checkpoints)[0], "epoch": 3}, model_id=1)
    fed.load_checkpoint(states(checkpoints)[1], model_id=1)
    with pytest.raises(ConfigError, match="3 rows for a batch of 4"):
        fed.featurize(some, num_samples=3)
    fed.featurize(batch(small_cnn.problem(checkpoints).train, np.arange(4)), num_samples=4)


def test_other_parameters_with_gradients_are_refused(checkpoints: str, tmp_path: Path) -> None:
    featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints)
    model = small_cnn.net()
    model[0].requires_grad_(False)
    with pytest.raises(PlanMismatch, match="parameters that require gradients: 232 in the run"):
        TRAKer(model, "image_classification", TRAIN, tmp_path / "run", device="cpu")


def test_scores_of_other_experiments_stay(checkpoints: str, tmp_path: Path) -> None:
    fed = featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints)
    first = scored(fed, checkpoints, "first")
    fed.load_checkpoint(small_cnn.state(9), model_id=9)
    train = small_cnn.problem(checkpoints).train
    fed.featurize(batch(train, np.arange(TRAIN)), num_samples=TRAIN)
    fed.start_scoring_checkpoint("second", small_cnn.state(9), 9, TARGETS)
    targets = batch(small_cnn.problem(checkpoints).targets["val"], np.arange(TARGETS))
    fed.score(targets, num_samples=TARGETS)
    fed.finalize_scores("second", model_ids=[9])
    there = zarr.open_array(tmp_path / "run/store.zarr/scores/first", mode="r")[:]
    assert np.array_equal(there, first)


def test_a_checkpoint_that_another_process_brings_meanwhile_does_no_harm(
    checkpoints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = whole(checkpoints, tmp_path / "alone")
    fed = featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints)
    run_cells, interruptions = worker.run_cells, [3, 2]

    def interrupted(
        run_dir: str, fingerprint: str, device: str, cells: list[str], **more: object
    ) -> object:
        if interruptions and any(cell.startswith("score/") for cell in cells):
            other = traker(checkpoints, str(tmp_path / "run"))
            other.load_checkpoint(small_cnn.state(10 + len(interruptions)), interruptions.pop() + 5)
        return run_cells(run_dir, fingerprint, device, cells, **more)

    monkeypatch.setattr(worker, "run_cells", interrupted)
    scored_by = functools.partial(fed.finalize_scores, model_ids=[0, 1, 2])
    monkeypatch.setattr(fed, "finalize_scores", scored_by)
    assert np.array_equal(scored(fed, checkpoints), wanted)
    assert not interruptions


def test_the_same_weights_under_two_ids_are_reported(
    checkpoints: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fed = featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints)
    fed.load_checkpoint(states(checkpoints)[0], model_id=7)
    assert "model_ids 0 and 7 have the same weights" in caplog.text


def test_checkpoints_that_were_shown_other_examples_are_refused(
    checkpoints: str, tmp_path: Path
) -> None:
    fed, train = traker(checkpoints, str(tmp_path / "run")), small_cnn.problem(checkpoints).train
    for model_id, state in enumerate(states(checkpoints)):
        fed.load_checkpoint(state, model_id)
        shown = np.random.default_rng(model_id).permutation(TRAIN)  # a loader that shuffles
        fed.featurize(batch(train, shown), num_samples=TRAIN)
    with pytest.raises(CellsFailed, match="disagree on inputs_digest"):
        scored(fed, checkpoints)


def test_padding_makes_no_other_example() -> None:
    from trak_dist.ingest.streamed_rows import row_digests

    short = torch.tensor([[5, 6, 7], [8, 9, 0]])
    long = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 0, 0, 0]])
    assert np.array_equal(row_digests((short,), 2), row_digests((long,), 2))
    other = torch.tensor([[5, 6, 7], [8, 0, 9]])
    assert not np.array_equal(row_digests((short,), 2)[1], row_digests((other,), 2)[1])


def test_what_the_attention_mask_masks_is_padding() -> None:
    from trak_dist.ingest.streamed_rows import row_digests

    def text(ids: list[list[int]], mask: list[list[int]]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    right = text([[5, 6, 7, 1], [8, 9, 1, 1]], [[1, 1, 1, 0], [1, 1, 0, 0]])
    left = text([[1, 1, 5, 6, 7], [1, 1, 1, 8, 9]], [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]])
    wanted = row_digests((right,), 2)
    assert np.array_equal(row_digests((left,), 2), wanted)
    ids, mask, labels = right["input_ids"], right["attention_mask"], torch.tensor([0, 1])
    tuples = [
        (i, 0 * i, m, labels) for i, m in ((ids, mask), (left["input_ids"], left["attention_mask"]))
    ]
    assert np.array_equal(*(row_digests(t, 2) for t in tuples))
    other = text([[5, 6, 7, 1], [8, 3, 1, 1]], [[1, 1, 1, 0], [1, 1, 0, 0]])
    assert not np.array_equal(row_digests((other,), 2)[1], wanted[1])


def test_a_gradient_that_is_not_finite_is_named_and_nothing_kept(
    checkpoints: str, tmp_path: Path
) -> None:
    fed, train = traker(checkpoints, str(tmp_path / "run")), small_cnn.problem(checkpoints).train
    fed.load_checkpoint(states(checkpoints)[0], 0)
    images, labels = batch(train, np.arange(8))
    labels[5] = 99
    with pytest.raises(NonFiniteGradient, match=r"15; label 99 .* 4 logits; checkpoint 0"):
        fed.featurize((images, labels), inds=np.arange(10, 18))
    with pytest.raises(ModelIDException, match="60 of 60 train rows are missing"):
        fed.finalize_features()


SAYS = {
    "two ways to say rows": (
        lambda fed, b: fed.featurize(b, inds=np.arange(4), num_samples=4),
        "exactly one of inds and num_samples",
    ),
    "no way": (lambda fed, b: fed.featurize(b), "exactly one of inds and num_samples"),
    "too few rows": (
        lambda fed, b: fed.featurize(b, num_samples=3),
        "3 rows for a batch of 4 examples",
    ),
    "a row that is none": (
        lambda fed, b: fed.featurize(b, inds=[0, 1, 2, 60]),
        "row 60 is not one of the 60 of 'train'",
    ),
    "a mask instead of rows": (
        lambda fed, b: fed.featurize(b, inds=np.ones(4, dtype=bool)),
        "inds of dtype bool are not whole numbers",
    ),
    "a row twice": (
        lambda fed, b: fed.featurize(b, inds=[0, 1, 2, 1]),
        "a row is there twice in one batch",
    ),
    "score before it was begun": (lambda fed, b: fed.score(b, num_samples=4), "no experiment"),
    "an experiment that is none": (
        lambda fed, b: fed.finalize_scores("other"),
        "there is no experiment 'other': none was begun",
    ),
    "a name that is a path": (
        lambda fed, b: fed.start_scoring_checkpoint("../up", fed.model.state_dict(), 0, 3),
        "the experiment '../up' is not usable as a name",
    ),
    "a name that is taken": (
        lambda fed, b: fed.start_scoring_checkpoint("train", fed.model.state_dict(), 0, 3),
        "an experiment can't be called 'train'",
    ),
    "an id that is none": (
        lambda fed, b: fed.load_checkpoint(fed.model.state_dict(), model_id=-1),
        "model_id -1 is not a whole number",
    ),
}


@pytest.mark.parametrize("mistake", SAYS)
def test_mistakes_in_calls_are_reported(mistake: str, checkpoints: str, tmp_path: Path) -> None:
    fed, train = traker(checkpoints, str(tmp_path / "run")), small_cnn.problem(checkpoints).train
    fed.load_checkpoint(states(checkpoints)[0], 0)
    fed.featurize(batch(train, np.arange(4)), num_samples=4)
    call, message = SAYS[mistake]
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        call(fed, batch(train, np.arange(4, 8)))


def test_featurize_without_a_checkpoint_is_refused(checkpoints: str, tmp_path: Path) -> None:
    fed, train = traker(checkpoints, str(tmp_path / "run")), small_cnn.problem(checkpoints).train
    with pytest.raises(ModelIDException, match="no checkpoint is loaded"):
        fed.featurize(batch(train, np.arange(4)), num_samples=4)


def test_scoring_a_checkpoint_that_was_never_featurized_is_refused(
    checkpoints: str, tmp_path: Path
) -> None:
    fed = featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints)
    with pytest.raises(ModelIDException, match=r"model_id 5 was never featurized; there are \[0"):
        fed.start_scoring_checkpoint("val", states(checkpoints)[0], 5, TARGETS)
    fed.start_scoring_checkpoint("val", states(checkpoints)[0], 0, TARGETS)
    with pytest.raises(ConfigError, match="experiment 'val' has 7 targets, not 8"):
        fed.start_scoring_checkpoint("val", states(checkpoints)[0], 0, TARGETS + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"proj_dim": 32}, "proj_dim: 64 in the run, 32 now"),
        ({"projector_seed": 3}, "projection.seed: 0 in the run, 3 now"),
        ({"projector": NoOpProjector()}, "projection.kind: 'sjlt' in the run, 'identity' now"),
        ({"grad_wrt": ["0.weight"]}, "featurize.params: "),
    ],
)
def test_other_arguments_for_a_run_are_refused(
    arguments: dict[str, object], message: str, checkpoints: str, tmp_path: Path
) -> None:
    featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints)
    with pytest.raises(PlanMismatch, match=message):
        traker(checkpoints, str(tmp_path / "run"), **arguments)


def test_another_train_set_or_model_for_a_run_is_refused(checkpoints: str, tmp_path: Path) -> None:
    featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints)
    common = {"task": "image_classification", "save_dir": tmp_path / "run", "device": "cpu"}
    with pytest.raises(PlanMismatch, match="train_set_size: 60 in the run, 61 now"):
        TRAKer(model=small_cnn.net(), train_set_size=61, **common)
    with pytest.raises(PlanMismatch, match="the model, or the model output"):
        TRAKer(model=nn.Linear(2, 2), train_set_size=TRAIN, **common)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"saver": dict}, "saver can't be replaced"),
        ({"score_computer": dict}, "score_computer can't be replaced"),
        ({"gradient_computer": dict}, "is not one of trak_dist's"),
        ({"projector": object()}, "projector object is not one of trak_dist's"),
        ({"proj_dim": 0}, "proj_dim 0 is not a whole number of at least 1"),
    ],
)
def test_arguments_that_can_not_be_are_refused(
    arguments: dict[str, object], message: str, checkpoints: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        featurized(traker(checkpoints, str(tmp_path / "run"), **arguments), checkpoints)


def test_a_task_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="task 'ranking' is none of image_classification"):
        TRAKer(model=small_cnn.net(), task="ranking", train_set_size=3, save_dir=tmp_path)


def test_a_singular_gram_is_reported_with_a_lambda_to_try(checkpoints: str, tmp_path: Path) -> None:
    fed = traker(checkpoints, str(tmp_path / "run"), lambda_reg=0.0)
    featurized(fed, checkpoints)
    with pytest.raises(CellsFailed, match="λ = 0 with proj_dim 64 > 60 train rows") as told:
        fed.finalize_features()
    proposed = re.search(r"TRAKer\(lambda_reg=(\S+)\)", str(told.value))
    assert proposed
    fed = traker(checkpoints, str(tmp_path / "run"), lambda_reg=float(proposed[1]))
    fed.finalize_features()
    receipts = open_run(tmp_path / "run").receipts("reduce").values()
    found = [r.facts["lambda_absolute"] for r in receipts if "lambda_absolute" in r.facts]
    assert found == [float(proposed[1]) / 64] * 3


# Gradients and outputs ------------------------------------------------------------------------


class OfTrak(AbstractModelOutput):
    """Written for TRAK: functional, per sample."""

    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def get_output(model, weights, buffers, image, label):
        logits = torch.func.functional_call(model, (weights, buffers), image.unsqueeze(0))
        index = torch.arange(1)
        correct = logits[index, label.unsqueeze(0)]
        others = logits.clone()
        others[index, label.unsqueeze(0)] = torch.tensor(-torch.inf)
        return (correct - others.logsumexp(dim=-1)).sum()

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        images, labels = batch
        logits = torch.func.functional_call(model, (weights, buffers), images)
        p = torch.softmax(logits, -1)[torch.arange(len(labels)), labels]
        return (1 - p).clone().detach().unsqueeze(-1)


class Branching(nn.Module):
    """What it computes depends on numbers: torch.func can't trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_cnn.net()
        self.scale = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner(x)
        both = torch.stack([out, self.scale.expand(out.shape)])
        return both.prod(0) if out.isfinite().all() else out


def test_an_output_written_for_trak_runs_as_it_is(
    checkpoints: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = whole(checkpoints, tmp_path / "run")
    found = whole(checkpoints, tmp_path / "theirs", task=OfTrak())
    assert oracle.column_errors(found, wanted.astype(float)).max() < 1e-3
    assert "gradients by vmap, not by hooks: OfTrak has no get_batch_output" in caplog.text


def test_gradients_one_by_one_are_those_of_hooks(checkpoints: str, tmp_path: Path) -> None:
    wanted = whole(checkpoints, tmp_path / "run", gradient_computer=FunctionalGradientComputer)
    one_by_one = {"gradient_computer": IterativeGradientComputer}
    found = whole(
        checkpoints, tmp_path / "loop", task="iterative_image_classification", **one_by_one
    )
    assert oracle.column_errors(found, wanted.astype(float)).max() < 1e-3
    assert open_run(tmp_path / "loop").plan.gradients == "loop"


class OfTraksBatches(AbstractModelOutput):
    """Written for TRAK's iterative computer: of a batch, by the model with its weights in it."""

    @staticmethod
    def get_output(model, weights, buffers, images, labels):
        logits = model(images)
        index = torch.arange(logits.shape[0])
        correct = logits[index, labels]
        others = logits.clone()
        others[index, labels] = torch.tensor(-torch.inf)
        return correct - others.logsumexp(dim=-1)

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        images, labels = batch
        p = torch.softmax(model(images), -1)[torch.arange(len(labels)), labels]
        return (1 - p).clone().detach().unsqueeze(-1)


def test_an_output_written_for_traks_iterative_computer_runs_as_it_is(
    checkpoints: str, tmp_path: Path
) -> None:
    wanted = whole(checkpoints, tmp_path / "run")
    one_by_one = {"gradient_computer": IterativeGradientComputer}
    found = whole(checkpoints, tmp_path / "theirs", task=OfTraksBatches(), **one_by_one)
    assert oracle.column_errors(found, wanted.astype(float)).max() < 1e-3


def test_a_model_that_can_not_be_traced_is_looped_over_and_that_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Branching()
    fed = TRAKer(model, ImageClassification(), 20, tmp_path / "run", device="cpu", proj_dim=8)
    fed.load_checkpoint(model.state_dict(), 0)
    fed.featurize(batch(small_cnn.Images(20, 1), np.arange(20)), num_samples=20)
    assert open_run(tmp_path / "run").plan.gradients == "loop"
    assert "gradients by loop, not by hooks: scale (in torch.stack), not by vmap: " in caplog.text


def test_frozen_parameters_are_left_out(checkpoints: str, tmp_path: Path) -> None:
    model = small_cnn.net()
    model[0].requires_grad_(False)
    fed = TRAKer(model, "image_classification", TRAIN, tmp_path / "run", device="cpu", proj_dim=8)
    featurized(fed, checkpoints)
    left = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert open_run(tmp_path / "run").plan.parameters == left


@pytest.mark.parametrize("kind", [iter, set, reversed])
def test_grad_wrt_may_be_any_iterable(kind, checkpoints: str, tmp_path: Path) -> None:
    names = ["5.weight", "0.weight"]
    for _ in range(2):
        fed = traker(checkpoints, str(tmp_path / "run"), grad_wrt=kind(names))
        featurized(fed, checkpoints)
    assert set(open_run(tmp_path / "run").plan.spec.featurize.params) == set(names)


def test_a_single_row_may_have_no_gradient(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.ReLU(), nn.Linear(5, 4))
    state = {n: t.clone() for n, t in model.state_dict().items()}
    state["1.bias"] -= 100.0  # no neuron of the first layer is alive
    fed = TRAKer(
        model,
        "image_classification",
        8,
        tmp_path / "run",
        device="cpu",
        grad_wrt=["1.*"],
        proj_dim=4,
    )
    fed.load_checkpoint(state, 0)
    images = small_cnn.Images(8, seed=1)
    with pytest.raises(ProblemError, match="all gradients of the 4 rows are zero"):
        fed.featurize(batch(images, np.arange(4)), num_samples=4)
    fed.featurize(batch(images, np.arange(1)), num_samples=1)


def test_grad_wrt_names_the_parameters(checkpoints: str, tmp_path: Path) -> None:
    featurized(traker(checkpoints, str(tmp_path / "run"), grad_wrt=["5.weight"]), checkpoints)
    assert open_run(tmp_path / "run").plan.parameters == 36 * small_cnn.CLASSES


# With the command line ------------------------------------------------------------------------


def status(launch: Launch, run_dir: Path) -> dict[str, dict[str, int]]:
    return json.loads(launch("stage=status", f"run_dir={run_dir}").out.splitlines()[-1])["stage"]


def test_the_command_line_reduces_and_reports_what_traker_featurized(
    launch: Launch, checkpoints: str, tmp_path: Path
) -> None:
    wanted = whole(checkpoints, tmp_path / "whole")
    fed = featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints)
    with pytest.raises(ModelIDException):
        scored_without_end(fed, checkpoints)
    assert status(launch, tmp_path / "run")["featurize"]["done"] == 0
    ended = launch(f"run_dir={tmp_path / 'run'}", "cluster=debug")
    assert ended.code == 0, ended.err
    assert np.array_equal(open_run(tmp_path / "run").scores("val"), wanted)
    assert (tmp_path / "run" / "report" / "val.html").exists()
    found = status(launch, tmp_path / "run")
    assert all(counts["done"] == counts["total"] for counts in found.values())


def scored_without_end(fed: TRAKer, checkpoints: str) -> None:
    """All targets, then something that fails before scores are made."""
    targets = small_cnn.problem(checkpoints).targets["val"]
    for model_id, state in enumerate(states(checkpoints)):
        fed.start_scoring_checkpoint("val", state, model_id, TARGETS)
        for start in range(0, TARGETS, 3):
            rows = np.arange(start, min(start + 3, TARGETS))
            fed.score(batch(targets, rows), num_samples=len(rows))
    fed.finalize_scores("val", model_ids=[9])


def test_the_command_line_says_what_rows_are_missing(
    launch: Launch, checkpoints: str, tmp_path: Path
) -> None:
    fed = featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints, range(5, TRAIN))
    del fed
    ended = launch(f"run_dir={tmp_path / 'run'}", "cluster=debug")
    assert ended.code == 1
    assert "5 of 60 rows of 'train' are not featurized for model_id 0: 0-4" in ended.out + ended.err


def test_what_takes_a_problem_is_refused_for_a_streamed_run(
    launch: Launch, checkpoints: str, tmp_path: Path
) -> None:
    featurized(traker(checkpoints, str(tmp_path / "run")), checkpoints)
    ended = launch(f"run_dir={tmp_path / 'run'}", "cluster=debug", "ground_truth.subsets=5")
    assert ended.code == 2
    assert "ground_truth.subsets: this run has no problem to take it from" in ended.err


def test_traker_scores_more_targets_with_a_run_of_the_command_line(
    launch: Launch, checkpoints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        *("problem._target_=small_cnn.problem", f"+problem.directory={checkpoints}"),
        *("cluster=debug", f"run_dir={tmp_path / 'run'}", "proj_dim=64"),
        *(
            "featurize.dtype=float32",
            "reduce.lambda_unit=absolute",
            f"reduce.lambda_reg={0.5 / 64}",
        ),
    ]
    assert launch(*arguments).code == 0
    sizes = computed(monkeypatch)
    fed = TRAKer(small_cnn.net(), "image_classification", TRAIN, tmp_path / "run", device="cpu")
    found = scored(featurized(fed, checkpoints), checkpoints, "again")
    assert sum(sizes) == 3 * TARGETS, "no train row is computed again"
    wanted = open_run(tmp_path / "run").scores("val")
    assert oracle.column_errors(found, wanted.astype(float)).max() < 1e-4
    assert launch(*arguments[:4], f"run_dir={tmp_path / 'run'}").code == 0
    with pytest.raises(ConfigError, match="model_id 3 is not of this run, whose problem provides"):
        fed.load_checkpoint(small_cnn.state(7), model_id=3)


def test_traker_computes_in_the_type_that_a_run_is_planned_in(
    launch: Launch, checkpoints: str, tmp_path: Path
) -> None:
    scores = {}
    for compute in ("model", "bfloat16"):
        run = tmp_path / compute
        ended = launch(
            *("problem._target_=small_cnn.problem", f"+problem.directory={checkpoints}"),
            *("cluster=debug", f"run_dir={run}", "proj_dim=64", "featurize.dtype=float32"),
            *("reduce.lambda_unit=absolute", f"reduce.lambda_reg={0.5 / 64}"),
            f"featurize.compute={compute}",
        )
        assert ended.code == 0, ended.err
        fed = TRAKer(small_cnn.net(), "image_classification", TRAIN, run, device="cpu")
        scored(fed, checkpoints, "again")
        scores[compute] = open_run(run).scores("val"), open_run(run).scores("again")
    between = np.linalg.norm(scores["model"][0] - scores["bfloat16"][0])
    for by_launcher, by_traker in scores.values():
        assert np.linalg.norm(by_launcher - by_traker) < 0.1 * between


def test_the_log_level_is_the_one_asked_for(checkpoints: str, tmp_path: Path) -> None:
    traker(checkpoints, str(tmp_path / "run"), logging_level=logging.ERROR)
    assert logging.getLogger("trak_dist").level == logging.ERROR
    traker(checkpoints, str(tmp_path / "run"), logging_level=logging.INFO)
