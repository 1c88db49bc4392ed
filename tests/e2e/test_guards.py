"""What a run is checked against: weights, sources, models, data, and a user's own output."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import zarr
from command_result import Ended
from torch import nn
from trak.modelout_functions import ImageClassificationModelOutput

from trak_dist import ImageClassification, Problem, Rendered, open_run
from trak_dist.errors import PlanMismatch
from trak_dist.store.run import Run

pytestmark = pytest.mark.slow

SOURCE = "import dataclasses, tiny\n\n\ndef problem(directory):\n    return {}\n"
AS_IS = "tiny.problem(directory)"


@pytest.fixture
def run_problem(
    launch: Callable, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ended]:
    """Run the tiny problem with some fields replaced, as if in a fresh process."""
    real = tiny.problem

    def run(*overrides: str, **changes: object) -> Ended:
        monkeypatch.setattr(
            tiny, "problem", lambda directory: dataclasses.replace(real(directory), **changes)
        )
        return launch(*tiny_run, *overrides)

    return run


@pytest.fixture
def edited(
    launch: Callable, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ended]:
    """Run a problem whose file holds some text, as if in a fresh process."""
    monkeypatch.syspath_prepend(tmp_path)

    def run(text: str, *overrides: str) -> Ended:
        (tmp_path / "edited.py").write_text(text)
        sys.modules.pop("edited", None)
        return launch(*tiny_run, "problem._target_=edited.problem", *overrides)

    return run


def test_a_checkpoint_swapped_under_a_finished_run_is_noticed(
    launch, tiny_run, tmp_path: Path
) -> None:
    assert launch(*tiny_run).code == 0
    torch.save(tiny.state(9), tmp_path / "checkpoints/0.pt")
    ended = launch(*tiny_run)
    assert ended.code == 2
    assert "model_id 0 has other weights than those it was first featurized with" in ended.err


def test_an_edited_problem_file_resumes_where_the_user_accepts_it(edited) -> None:
    assert edited(SOURCE.format(AS_IS)).code == 0
    mended = SOURCE.format("dataclasses.replace(tiny.problem(directory), render=None)")
    refused = edited(mended)
    assert refused.code == 2
    assert "accept_source=true if it computes the same gradients as before" in refused.err
    accepted = edited(mended, "accept_source=true")
    assert accepted.code == 0, accepted.err
    assert "featurize: " not in accepted.out
    assert edited(mended).code == 0
    assert edited(SOURCE.format(AS_IS)).code == 0


def test_another_model_is_never_accepted(run_problem) -> None:
    assert run_problem().code == 0
    layers = list(tiny.net())
    other = nn.Sequential(layers[0], nn.ReLU(), layers[2])
    ended = run_problem("accept_source=true", model=other)
    assert ended.code == 2
    assert "the model or the model output of tiny.problem changed since planning" in ended.err


def test_an_example_that_differs_when_read_again_is_refused(run_problem) -> None:
    class Augmented(tiny.Rows):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            features, label = super().__getitem__(index)
            return features + torch.randn(()), label

    ended = run_problem(train=Augmented(50, seed=1))
    assert ended.code == 2
    assert "an example of 'train' differs when it is read again" in ended.err


class Averaged(ImageClassification):
    def get_out_to_loss_grad(self, *arguments: object) -> torch.Tensor:
        return super().get_out_to_loss_grad(*arguments).mean()


class Deaf(ImageClassification):
    def get_batch_output(self, model: nn.Module, weights, buffers, batch) -> torch.Tensor:
        return super().get_batch_output(model, dict(model.named_parameters()), buffers, batch)


def test_an_out_to_loss_that_is_averaged_is_refused(run_problem) -> None:
    ended = run_problem(model_output=Averaged())
    assert ended.code == 2
    assert "get_out_to_loss_grad gave () for 2 examples of 'train'" in ended.err


def test_an_output_that_ignores_its_weights_is_computed_with_the_models_own(
    run_problem, tmp_path: Path
) -> None:
    wanted = run_problem(f"run_dir={tmp_path / 'wanted'}")
    ended = run_problem(model_output=Deaf())
    assert (wanted.code, ended.code) == (0, 0), ended.err
    assert "gradients by loop, not by hooks: 0.bias has other gradients than one by" in ended.out
    found, own = (open_run(tmp_path / name).scores("val") for name in ("run", "wanted"))
    assert np.linalg.norm(found - own) < 1e-2 * np.linalg.norm(own)


class Constant(ImageClassification):
    def get_batch_output(self, model, weights, buffers, batch) -> torch.Tensor:
        return 0 * super().get_batch_output(model, weights, buffers, batch)


def test_an_output_without_any_gradient_is_refused(run_problem) -> None:
    ended = run_problem(model_output=Constant())
    assert ended.code == 1
    assert "all gradients of the 8 rows are zero" in ended.err
    assert "functional_call(model, (weights, buffers), inputs)" in ended.err


def test_traks_own_model_output_gives_the_same_scores(run_problem, tmp_path: Path) -> None:
    assert run_problem("reduce.curvature=none").code == 0
    ended = run_problem(
        f"run_dir={tmp_path / 'traks'}", model_output=ImageClassificationModelOutput()
    )
    assert ended.code == 0, ended.err
    ours, theirs = (open_run(tmp_path / name).scores("val") for name in ("run", "traks"))
    np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-4 * np.abs(ours).max())


def test_a_broken_render_is_refused_before_anything_is_planned(run_problem, tmp_path: Path) -> None:
    ended = run_problem(render=lambda example: "hello")
    assert ended.code == 2
    assert "render gave str, not trak_dist.Rendered" in ended.err
    assert not (tmp_path / "run").exists()


def test_what_a_report_shows_is_escaped(run_problem, tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script>"
    ended = run_problem(render=lambda example: Rendered(nasty, f"{nasty} $x^"))
    assert ended.code == 0, ended.err
    page = (tmp_path / "run/report/val.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(tiny.FEATURES, tiny.FEATURES)
        self.again = nn.Linear(tiny.FEATURES, tiny.FEATURES)
        self.again.weight = self.inner.weight
        self.out = nn.Linear(tiny.FEATURES, tiny.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.again(self.inner(x).tanh()))


def test_more_checkpoints_are_trained_for_a_finished_run_with_tied_weights(
    run_problem, tmp_path: Path
) -> None:
    def train_checkpoint(train, seed: int, device: torch.device) -> dict[str, torch.Tensor]:
        return Tied().state_dict()  # drawn from the seed that the worker sets

    changes = {"model": Tied(), "checkpoints": (), "train_checkpoint": train_checkpoint}
    ended = run_problem("checkpoints.train=2", **changes)
    assert ended.code == 0, ended.err
    before = open_run(tmp_path / "run").receipts("featurize")
    ended = run_problem("checkpoints.train=3", **changes)
    assert ended.code == 0, ended.err
    after = open_run(tmp_path / "run").receipts("featurize")
    assert {c: after[c].job for c in before} == {c: r.job for c, r in before.items()}
    made = zarr.open_array(tmp_path / "run/store.zarr/scores/val", mode="r")
    assert made.attrs["model_ids"] == [0, 1, 2]
    assert run_problem(**changes).code == 0
    assert run_problem("checkpoints.train=1", **changes).code == 2


def test_of_two_that_extend_a_run_at_once_one_is_reported(launch, tiny_run, tmp_path: Path) -> None:
    assert launch(*tiny_run, "targets=val", "stage=plan").code == 0
    run = Run.open(tmp_path / "run")
    split = dataclasses.replace(run.plan.targets[0], name="one")
    run.extend(dataclasses.replace(run.plan, targets=(*run.plan.targets, split)))
    other = dataclasses.replace(split, name="other")
    with pytest.raises(PlanMismatch, match="another process has just planned something else here"):
        run.extend(dataclasses.replace(run.plan, targets=(*run.plan.targets, other)))
    assert [s.name for s in Run.open(tmp_path / "run").plan.targets] == ["val", "one"]


def test_all_target_sets_are_added_where_all_are_asked_for(
    launch, tiny_run, tmp_path: Path
) -> None:
    assert launch(*tiny_run, "targets=val").code == 0
    assert launch(*tiny_run).code == 0
    assert [s.name for s in open_run(tmp_path / "run").plan.targets] == ["val"]
    assert launch(*tiny_run, "targets=all").code == 0
    assert open_run(tmp_path / "run").scores("test").shape == (50, 5)


@pytest.mark.parametrize("stage", ["status", "verify"])
def test_reading_stages_hold_given_keys_against_the_plan(launch, tiny_run, stage: str) -> None:
    assert launch(*tiny_run, "stage=plan").code == 0
    ended = launch(*tiny_run, f"stage={stage}", "reduce.lambda_reg=5")
    assert ended.code == 2
    assert "reduce.lambda_reg: 1.0 in the plan, 5.0 now" in ended.err


def test_lost_metadata_of_an_array_is_made_again(launch, tiny_run, tmp_path: Path) -> None:
    assert launch(*tiny_run).code == 0
    expected = open_run(tmp_path / "run").scores("val")
    (lost,) = (tmp_path / "run/store.zarr/models/1").glob("*/train/grads/zarr.json")
    lost.unlink()
    assert launch(*tiny_run, "stage=verify").code == 1
    assert launch(*tiny_run, "stage=plan").code == 0
    assert launch(*tiny_run, "stage=verify").code == 0
    np.testing.assert_array_equal(open_run(tmp_path / "run").scores("val"), expected)


def test_relative_paths_of_a_problem_mean_the_same_from_anywhere(
    launch, tiny_run, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    relative = [o for o in tiny_run if "directory" not in o]
    assert launch(*relative, "+problem.directory=checkpoints", "stage=plan").code == 0
    monkeypatch.chdir("/")
    ended = launch(tiny_run[2], "cluster=debug")
    assert ended.code == 0, ended.err


def test_a_problem_is_a_problem_only_with_fitting_fields() -> None:
    fields = {"model": tiny.net(), "model_output": ImageClassification(), "train": tiny.Rows(3, 0)}
    for bad in ({"checkpoints": "0.pt", "targets": {}}, {"checkpoints": [], "targets": [1]}):
        with pytest.raises(ValueError, match="checkpoints must be a sequence of paths"):
            Problem(**fields, **bad)
