"""`featurize.gradients`: what a plan takes, what it says of it, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from command_result import Launch
from torch import Tensor, nn

import trak_dist
from trak_dist import open_run, plan_file
from trak_dist.plan import digest


class Squashed(nn.Module):
    """One use of a parameter that hooks have no rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(tiny.FEATURES, 5), nn.Linear(5, tiny.CLASSES)
        self.slope = nn.Parameter(torch.tensor([0.2]))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.stack([x, self.slope.expand(x.shape)]).prod(0))


class Meeting(nn.Module):
    """Examples see each other, where there are several."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(tiny.FEATURES, 5), nn.Linear(5, tiny.CLASSES)
        nn.init.zeros_(self.last.weight)  # with which no gradient but its own would differ

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(x - 0.5 * x.mean(0) if len(x) > 1 else 0.5 * x)


class Branching(nn.Module):
    """A value decides the way, which neither hooks nor torch.func can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(tiny.FEATURES, tiny.CLASSES)
        self.slope = nn.Parameter(torch.tensor([0.2]))

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([x, self.slope.expand(x.shape)])
        return self.last(both.prod(0) if x.abs().max().item() > 0 else x)


class OfTrak:
    """A model output written for TRAK."""

    def __init__(self) -> None:
        inner = trak_dist.ImageClassification()
        self.get_output, self.get_out_to_loss_grad = inner.get_output, inner.get_out_to_loss_grad


class Halved(trak_dist.ImageClassification):
    """Another function of a batch than of its examples."""

    def get_batch_output(self, *arguments: object) -> Tensor:
        return super().get_batch_output(*arguments) / 2

    def get_output(self, *arguments: object) -> Tensor:
        return 2 * super().get_output(*arguments)


class Dropping(nn.Module):
    """Drops at random, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(tiny.FEATURES, 16), nn.Linear(16, tiny.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.dropout(torch.tanh(self.first(x)), 0.5))


MODELS = {
    "dropping": Dropping,
    "plain": tiny.net,
    "squashed": Squashed,
    "meeting": Meeting,
    "branching": Branching,
}
OUTPUTS = {"plain": trak_dist.ImageClassification, "trak": OfTrak, "halved": Halved}


def problem(directory: str, model: str = "plain", output: str = "plain") -> trak_dist.Problem:
    """Called by name in a job."""
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        paths.append(Path(directory) / f"{model}-{seed}.pt")
        if not paths[-1].exists():
            torch.save(MODELS[model]().state_dict(), paths[-1])
    return trak_dist.Problem(
        model=MODELS[model](),
        model_output=OUTPUTS[output](),
        train=tiny.Rows(20, seed=1),
        targets={"val": tiny.Rows(4, seed=2), "test": tiny.Rows(3, seed=3)},
        checkpoints=paths,
    )


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setitem(sys.modules, "test_gradients_chosen", sys.modules[__name__])
    return [
        *("problem._target_=test_gradients_chosen.problem", f"+problem.directory={tmp_path}"),
        *("cluster=debug", "proj_dim=16", "featurize.dtype=float32", "targets=val"),
    ]


def test_auto_takes_hooks_where_they_cover_the_model_and_the_plan_keeps_it(
    launch: Launch, tmp_path: Path, arguments: list[str]
) -> None:
    ended = launch(*arguments, f"run_dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    assert "gradients by hooks, sjlt to 16" in ended.out
    assert "by vmap" not in ended.out
    run = open_run(tmp_path / "run")
    assert run.plan.gradients == "hooks"
    assert {r.facts["gradients"] for r in run.receipts("featurize").values()} == {"hooks"}
    ended = launch(*arguments, f"run_dir={tmp_path / 'run'}", "featurize.gradients=auto")
    assert ended.code == 0, ended.err
    assert open_run(tmp_path / "run").plan == run.plan


def test_hooks_and_vmap_give_the_same_scores_and_other_fingerprints(
    launch: Launch, tmp_path: Path, arguments: list[str]
) -> None:
    runs = {}
    for asked in ("auto", "hooks", "vmap"):
        ended = launch(*arguments, f"run_dir={tmp_path / asked}", f"featurize.gradients={asked}")
        assert ended.code == 0, ended.err
        runs[asked] = open_run(tmp_path / asked)
    assert runs["auto"].plan.fingerprint == runs["hooks"].plan.fingerprint
    assert runs["vmap"].plan.fingerprint != runs["hooks"].plan.fingerprint
    by_hooks, by_vmap = runs["auto"].scores("val"), runs["vmap"].scores("val")
    assert np.linalg.norm(by_hooks - by_vmap) <= 1e-4 * np.linalg.norm(by_vmap)
    ended = launch(*arguments, f"run_dir={tmp_path / 'auto'}", "featurize.gradients=vmap")
    assert ended.code == 2
    assert "the run has scores, whose gradients are by hooks" in ended.err


WHY = {
    "+problem.model=squashed": "slope (in torch.stack)",
    "+problem.output=trak": "OfTrak has no get_batch_output",
    "+problem.output=halved": "0.bias has other gradients than one by one in a batch of 20 "
    "(difference ",
}


@pytest.mark.parametrize("change", WHY)
def test_auto_falls_back_to_vmap_and_says_why(
    launch: Launch, tmp_path: Path, arguments: list[str], change: str
) -> None:
    ended = launch(*arguments, f"run_dir={tmp_path / 'run'}", change)
    assert ended.code == 0, ended.err
    assert f"gradients by vmap, not by hooks: {WHY[change]}" in ended.out
    assert "gradients by vmap, sjlt to 16" in ended.out
    assert open_run(tmp_path / "run").plan.gradients == "vmap"


def test_what_neither_hooks_nor_vmap_can_do_goes_one_by_one(
    launch: Launch, tmp_path: Path, arguments: list[str]
) -> None:
    ended = launch(*arguments, f"run_dir={tmp_path / 'run'}", "+problem.model=branching")
    assert ended.code == 0, ended.err
    assert "gradients by loop, not by hooks: slope (in torch.stack), not by vmap: " in ended.out
    assert open_run(tmp_path / "run").plan.gradients == "loop"


@pytest.mark.parametrize("change", WHY)
def test_hooks_that_were_asked_for_and_would_be_wrong_are_refused(
    launch: Launch, tmp_path: Path, arguments: list[str], change: str
) -> None:
    asked = "featurize.gradients=hooks"
    ended = launch(*arguments, f"run_dir={tmp_path / 'run'}", change, asked)
    assert ended.code == 2
    assert f"error: hooks can't compute the gradients: {WHY[change]}" in ended.err
    assert "  where: featurize.gradients\n  next:  featurize.gradients=auto, " in ended.err
    assert not (tmp_path / "run/plan.json").exists()


def test_parameters_that_hooks_do_not_cover_may_be_left_out(
    launch: Launch, tmp_path: Path, arguments: list[str]
) -> None:
    chosen = ("+problem.model=squashed", "featurize.params=['*.weight']")
    ended = launch(*arguments, f"run_dir={tmp_path / 'run'}", *chosen)
    assert ended.code == 0, ended.err
    assert open_run(tmp_path / "run").plan.gradients == "hooks"


def test_a_plan_made_before_there_were_hooks_resumes_by_vmap(
    launch: Launch, tmp_path: Path, arguments: list[str]
) -> None:
    plan = tmp_path / "run/plan.json"
    launch(*arguments, f"run_dir={tmp_path / 'run'}", "stage=plan", "featurize.gradients=vmap")
    raw = json.loads(plan.read_text())
    del raw["gradients"], raw["spec"]["featurize"]["gradients"], raw["digest"]
    plan.write_text(json.dumps({**raw, "digest": digest(raw)}))
    assert plan_file.load(plan.read_bytes(), where="").fingerprint == raw["fingerprint"]
    ended = launch(*arguments, f"run_dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    assert "gradients by vmap, sjlt" in ended.out


def test_random_outputs_are_refused_or_the_same_for_the_same_example(
    launch: Launch, tmp_path: Path, arguments: list[str]
) -> None:
    dropping = "+problem.model=dropping"
    ended = launch(*arguments, f"run_dir={tmp_path / 'run'}", dropping)
    assert ended.code == 2
    assert "when it is computed again" in ended.err
    assert "featurize.random=by_example" in ended.err
    scores = []
    for name, more in (("a", []), ("b", ["featurize.batch_rows=3", "featurize.cell_rows=6"])):
        where = (f"run_dir={tmp_path / name}", dropping, "featurize.random=by_example")
        ended = launch(*arguments, *where, *more)
        assert ended.code == 0, ended.err
        run = open_run(tmp_path / name)
        assert run.plan.gradients == "loop"
        scores.append(run.scores("val"))
    assert np.linalg.norm(scores[0] - scores[1]) <= 1e-5 * np.linalg.norm(scores[0])
