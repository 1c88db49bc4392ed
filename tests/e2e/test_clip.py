"""Runs of two-tower models: scores, retrained models, pinned contrasts, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import safetensors.torch
import tiny_clip
import torch
from tiny_clip import CONTRAST, TARGETS, TRAIN, Pairs, towers
from torch import Tensor, nn
from torch.func import functional_call

import trak_dist
from trak_dist import NoOpProjector, TRAKer, open_run
from trak_dist.cells import parse_cell
from trak_dist.errors import ConfigError, PlanMismatch, ProblemError
from trak_dist.ops.model_outputs import BatchedModelOutput
from trak_dist.store import contents
from trak_dist.store.run import Run

LAMBDA = 0.05
SETTINGS: dict[str, Any] = {
    "cluster": "debug",
    "proj_dim": 16,
    "projection": {"kind": "identity"},
    "featurize": {"batch_rows": 5, "cell_rows": 10, "dtype": "float32"},
    "reduce": {"lambda_reg": LAMBDA, "lambda_unit": "absolute", "curvature": "none"},
}
SCORED = {"lambda_reg": LAMBDA, "lambda_unit": "absolute", "kernel_scale": "mean_abs"}


@pytest.fixture
def checkpoints(tmp_path: Path) -> str:
    tiny_clip.write_checkpoints(tmp_path / "checkpoints")
    return str(tmp_path / "checkpoints")


@pytest.fixture
def made(checkpoints: str) -> dict[str, str]:
    return {"_target_": "tiny_clip.problem", "directory": checkpoints}


def states(checkpoints: str) -> list[dict[str, Tensor]]:
    return [torch.load(p, weights_only=True) for p in sorted(Path(checkpoints).glob("*.pt"))]


def wanted_scores(checkpoints: str, fisher: bool = False) -> np.ndarray:
    """Of both checkpoints, each with the contrasts embedded by its own weights."""
    contrast, train, targets = Pairs(CONTRAST, 3), Pairs(TRAIN, 1), Pairs(TARGETS, 2)
    members = []
    for state in map(tiny_clip.exact, states(checkpoints)):
        x, g = (tiny_clip.gradients(state, contrast, pairs) for pairs in (train, targets))
        q, root = tiny_clip.out_to_loss(state, contrast, train), np.sqrt(x.shape[1])
        u = tiny_clip.fisher_rows(state, contrast, train) / root if fisher else None
        members.append(oracle.Member(x / root, g / root, q, u))
    return oracle.scores(members, **SCORED)[0]


def test_scores_of_a_run_are_those_of_the_oracle(
    made: dict[str, str], checkpoints: str, tmp_path: Path
) -> None:
    run = trak_dist.plan_run(problem=made, run_dir=tmp_path / "run", **SETTINGS)
    assert run.execute().complete
    found = open_run(tmp_path / "run")
    assert found.plan.gradients == "hooks"
    assert found.plan.curvatures == ("fisher", "none")
    errors = oracle.column_errors(found.scores("val"), wanted_scores(checkpoints))
    assert errors.max() < 2e-3


@pytest.mark.long
def test_the_curvature_of_a_run_is_the_fisher_matrix_of_both_choices(
    made: dict[str, str], checkpoints: str, tmp_path: Path
) -> None:
    """Scores by many draws, against those by the sum over all labels."""
    reduce = {**SETTINGS["reduce"], "curvature": "auto", "fisher_draws": 40}
    settings = {**SETTINGS, "reduce": reduce}
    run = trak_dist.plan_run(problem=made, run_dir=tmp_path / "run", **settings)
    run.execute().raise_for_failures()
    assert Run.open(tmp_path / "run").plan.curvature == "fisher"
    found = open_run(tmp_path / "run").scores("val")
    exact, other = (wanted_scores(checkpoints, fisher) for fisher in (True, False))
    errors, others = (oracle.column_errors(found, wanted).max() for wanted in (exact, other))
    assert errors < 0.5
    assert others > 5  # without the curvature they are others


@pytest.mark.parametrize("gradients", ["functional", "iterative"])
def test_checkpoints_that_take_turns_have_their_own_contrasts(
    gradients: str, checkpoints: str, tmp_path: Path
) -> None:
    computer = trak_dist.FunctionalGradientComputer
    if gradients == "iterative":
        computer = trak_dist.IterativeGradientComputer
    fed = TRAKer(
        towers(),
        tiny_clip.output(),
        TRAIN,
        save_dir=tmp_path / "run",
        projector=NoOpProjector(),
        use_half_precision=False,
        lambda_reg=LAMBDA,
        gradient_computer=computer,
    )
    train, targets = Pairs(TRAIN, 1).batch(), Pairs(TARGETS, 2).batch()
    for rows in (range(5), range(5, TRAIN)):
        for model_id, state in enumerate(states(checkpoints)):
            fed.load_checkpoint(state, model_id)
            fed.featurize([t[list(rows)] for t in train], inds=list(rows))
    fed.finalize_features()
    for model_id, state in reversed(list(enumerate(states(checkpoints)))):
        fed.start_scoring_checkpoint("val", state, model_id, TARGETS)
        fed.score(targets, num_samples=TARGETS)
    errors = oracle.column_errors(fed.finalize_scores("val"), wanted_scores(checkpoints))
    assert errors.max() < 2e-3


def test_retrained_models_embed_the_contrasts_by_their_own_weights(tmp_path: Path) -> None:
    """The margins of a ground truth; counterfactuals are computed by the same function."""
    made = {"_target_": "tiny_clip.problem", "trained": True}
    truth = {"ground_truth": {"subsets": 3, "seeds": 1}, "checkpoints": {"train": 1}}
    run = trak_dist.plan_run(
        problem=made, run_dir=tmp_path / "run", stage="train", **SETTINGS, **truth
    )
    assert run.execute().complete
    targets, contrast = Pairs(TARGETS, 2), Pairs(CONTRAST, 3)
    at, found = Run.open(tmp_path / "run"), []
    for subset in range(3):
        file = tmp_path / f"run/checkpoints/{subset}/0.safetensors"
        state = tiny_clip.exact(safetensors.torch.load_file(file))
        cell = parse_cell(f"margins/{subset}/0/val")
        found.append(contents.read(at, cell, "margins")[0])
        wanted = tiny_clip.values(state, contrast, targets)
        np.testing.assert_allclose(found[-1], wanted, rtol=1e-4, atol=1e-5)
    assert np.ptp(found, axis=0).min() > 1e-3  # they are different models


def test_other_contrasts_are_another_model_output(checkpoints: str, tmp_path: Path) -> None:
    fed = TRAKer(towers(), tiny_clip.output(3), TRAIN, save_dir=tmp_path / "streamed")
    fed.load_checkpoint(states(checkpoints)[0], 0)
    fed.featurize(Pairs(TRAIN, 1).batch(), num_samples=TRAIN)
    for other in (tiny_clip.output(4), tiny_clip.output(3, temperature=0.5)):
        with pytest.raises(PlanMismatch, match="the model, or the model output"):
            TRAKer(towers(), other, TRAIN, save_dir=tmp_path / "streamed")


def test_contrasts_that_a_file_now_gives_otherwise_are_refused(
    made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trak_dist.plan_run(problem=made, run_dir=tmp_path / "run", **SETTINGS)
    monkeypatch.setattr(tiny_clip, "CONTRAST", CONTRAST - 1)
    told = r"the model or the model output of tiny_clip.problem changed since planning"
    outcome = run.execute()
    assert not outcome.complete
    assert all(re.search(told, failure.error) for failure in outcome.failed.values())
    with pytest.raises(ProblemError, match=told):
        trak_dist.plan_run(problem=made, run_dir=tmp_path / "run", **SETTINGS)


def test_the_task_called_clip_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not say which pairs") as refused:
        TRAKer(towers(), "clip", TRAIN, save_dir=tmp_path)
    assert "trak_dist.CLIP(contrast=loader)" in str(refused.value)


# Negatives from the batch -----------------------------------------------------------------------


class BatchSoftmax(BatchedModelOutput):
    """The loss as it is trained: the others of the batch are the negatives."""

    def get_batch_output(self, *arguments: Any) -> Tensor:
        s = similarities(*arguments)
        return s.log_softmax(1).diagonal() + s.log_softmax(0).diagonal()

    def get_out_to_loss_grad(self, *arguments: Any) -> Tensor:
        return torch.ones(len(similarities(*arguments)))


class BatchSigmoid(BatchSoftmax):
    """SigLIP's: each pair of the batch is a yes or a no."""

    def get_batch_output(self, *arguments: Any) -> Tensor:
        s = similarities(*arguments)
        return nn.functional.logsigmoid((2 * torch.eye(len(s)) - 1) * s).sum(1)


class Both(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        both = self.model.encode_image(images), self.model.encode_text(texts)
        x, y = (nn.functional.normalize(e) for e in both)
        return 3 * x @ y.mT


def similarities(model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
    state = {f"model.{name}": tensor for name, tensor in {**weights, **buffers}.items()}
    return functional_call(Both(model), state, tuple(batch))


MEET = "get_batch_output differs from get_output: examples meet"


@pytest.mark.parametrize("output", [BatchSoftmax(), BatchSigmoid()], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("gradients", ["auto", "vmap", "loop"])
def test_negatives_from_the_batch_are_refused(
    output: Any, gradients: str, checkpoints: str, tmp_path: Path
) -> None:
    problem = tiny_clip.problem(checkpoints, model_output=output)
    settings = {**SETTINGS, "featurize": {**SETTINGS["featurize"], "gradients": gradients}}
    with pytest.raises(ProblemError, match=MEET) as refused:
        trak_dist.plan_run(problem=problem, run_dir=tmp_path / "run", **settings)
    assert "trak_dist.CLIP(contrast=…)" in str(refused.value)
    assert not (tmp_path / "run/plan.json").exists()
    fed = TRAKer(towers(), output, TRAIN, save_dir=tmp_path / "streamed")
    fed.load_checkpoint(states(checkpoints)[0], 0)
    with pytest.raises(ProblemError, match=MEET):
        fed.featurize(Pairs(TRAIN, 1).batch(), num_samples=TRAIN)
    assert not (tmp_path / "streamed/plan.json").exists()
