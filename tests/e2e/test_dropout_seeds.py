"""`checkpoints.dropout_seeds`: several models of each checkpoint, from training to the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import tiny_dropout
import torch
from command_result import Ended, Launch
from dropout_masks import kept
from killing import Killed, kill_at
from torch import Tensor, nn

from trak_dist import PlannedRun, open_run, plan_run
from trak_dist.cells.score import halves_of
from trak_dist.errors import ConfigError
from trak_dist.ingest import streamed_plan
from trak_dist.plan_inputs import Streamed
from trak_dist.stages import featurize
from trak_dist.store.run import Run

pytestmark = pytest.mark.slow

SEEDS = 3
Command = Callable[..., Ended]


@pytest.fixture
def run(launch: Launch, tmp_path: Path) -> Command:
    """A command on the run `tmp_path / name`: 2 checkpoints, which it trains, 3 masks each."""

    def command(name: str, *overrides: str) -> Ended:
        return launch(
            *("problem._target_=tiny_dropout.problem", "targets=val", "proj_dim=16"),
            *("featurize.batch_rows=4", "featurize.cell_rows=8", "checkpoints.train=2"),
            *(f"run_dir={tmp_path / name}", f"checkpoints.dropout_seeds={SEEDS}"),
            *([] if any(o.startswith("cluster=") for o in overrides) else ["cluster=debug"]),
            *overrides,
        )

    return command


class Thinned(nn.Module):
    """h ⊙ m / (1 − p), with the mask of a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        left = kept(seed, tiny_dropout.DROPOUT, tiny_dropout.HIDDEN, 0.5)
        self.factors = torch.tensor([2.0 * (i in left) for i in range(tiny_dropout.HIDDEN)])

    def forward(self, h: Tensor) -> Tensor:
        return h * self.factors


def write_checkpoints(directory: Path, count: int = 2) -> None:
    directory.mkdir()
    for seed in range(count):
        torch.manual_seed(seed)
        torch.save(tiny_dropout.net().state_dict(), directory / f"{seed}.pt")


def provided(directory: Path) -> str:
    return f"+problem.directory={directory}"


def test_scores_are_those_of_the_thinned_networks(run, tmp_path: Path) -> None:
    write_checkpoints(tmp_path / "checkpoints")
    setting = {"lambda_reg": 0.05, "lambda_unit": "mean_diagonal", "kernel_scale": "mean_abs"}
    ended = run(
        *("run", provided(tmp_path / "checkpoints"), "projection=identity"),
        *("featurize.dtype=float32", *(f"reduce.{k}={v}" for k, v in setting.items())),
    )
    assert ended.code == 0, ended.err
    problem = tiny_dropout.problem()
    members = []
    for path in sorted((tmp_path / "checkpoints").glob("*.pt")):
        for seed in range(SEEDS):
            model = tiny_dropout.net()
            model[2] = Thinned(seed)
            targets = problem.targets["val"]
            members.append(
                oracle.member(model, torch.load(path), problem.train, targets, weighted=True)
            )
    expected, _ = oracle.scores(members, **setting)
    found = open_run(tmp_path / "run").scores("val")
    assert oracle.column_errors(found, expected).max() <= 1e-4
    plain, _ = oracle.scores(members[::SEEDS], **setting)
    assert oracle.column_errors(found, plain).min() > 0.01


def test_a_run_says_what_its_ensemble_is(run, tmp_path: Path) -> None:
    ended = run("run")
    assert ended.code == 0, ended.err
    assert "plan: 24 train rows, 2 checkpoints x 3 dropout masks, val 6 targets, " in ended.out
    assert "gradients by hooks" in ended.out
    results = open_run(tmp_path / "run")
    assert results.plan.model_ids == tuple(range(6))
    assert [c.model_id for c in results.plan.checkpoints] == [0, 3]
    assert sorted(results.receipts("train")) == ["train/full/0", "train/full/1"]
    assert {i.split("/")[1] for i in results.receipts("featurize")} == set("012345")
    status = run("run", "stage=status")
    assert '"complete": true' in status.out
    grid = [line[:12].strip() for line in status.out.splitlines() if " mask " in line[:12]]
    assert grid == [f"{c} mask {s}" for c in range(2) for s in range(SEEDS)]
    assert "audit  " in status.out
    assert run("run", "stage=verify").code == 0
    page = (tmp_path / "run/report/val.html").read_text()
    assert "2 checkpoints x 3 dropout masks" in page
    assert "(1 each)" in page, "halves are of checkpoints"


@pytest.mark.long
def test_every_executor_gives_the_same_scores(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(Path(tiny_dropout.__file__).parent)
    assert run("debug").code == 0
    ended = run("local", "cluster=local", "cluster.workers=2")
    assert ended.code == 0, ended.err
    scores = [open_run(tmp_path / name).scores("val") for name in ("debug", "local")]
    assert np.array_equal(*scores)
    assert np.isfinite(scores[0]).all()


def test_a_killed_run_resumes_to_the_same_scores(run, tmp_path: Path, monkeypatch) -> None:
    assert run("whole").code == 0
    with monkeypatch.context() as patch:
        kill_at(patch, 9, (featurize, "featurize"))
        with pytest.raises(Killed):
            run("killed")
    before = open_run(tmp_path / "killed").receipts("featurize")
    assert len(before) == 8
    assert run("killed").code == 0
    after = open_run(tmp_path / "killed").receipts("featurize")
    assert {i: after[i] for i in before} == before
    scores = [open_run(tmp_path / name).scores("val") for name in ("whole", "killed")]
    assert np.array_equal(*scores)


def test_a_checkpoint_that_is_added_leaves_the_models_that_there_are(
    run, launch: Launch, tmp_path: Path
) -> None:
    assert run("run").code == 0
    before = {s: open_run(tmp_path / "run").receipts(s) for s in ("train", "featurize")}
    ended = launch(f"run_dir={tmp_path / 'run'}", "cluster=debug", "checkpoints.train=3")
    assert ended.code == 0, ended.err
    assert f"checkpoints.dropout_seeds={SEEDS}" in ended.out, "it comes from the plan"
    assert "3 checkpoints x 3 dropout masks" in ended.out
    results = open_run(tmp_path / "run")
    for stage, receipts in before.items():
        after = results.receipts(stage)
        assert {i: after[i] for i in receipts} == receipts
    assert set(results.receipts("train")) - set(before["train"]) == {"train/full/2"}
    assert run("new", "checkpoints.train=3").code == 0
    assert np.array_equal(results.scores("val"), open_run(tmp_path / "new").scores("val"))


def test_some_of_the_models_make_an_ensemble(run, tmp_path: Path) -> None:
    ended = run("run", "checkpoints.use=[1,2]")
    assert ended.code == 0, ended.err
    assert "2 models of 1 checkpoints x 3 dropout masks" in ended.out
    results = open_run(tmp_path / "run")
    assert sorted(results.receipts("train")) == ["train/full/0"]
    with pytest.raises(ConfigError, match="an ensemble of 1 has no halves"):
        results.halves("val")
    ended = run("other", "checkpoints.use=[0,6]")
    assert ended.code == 2
    assert ended.err == (
        "error: checkpoints.use=[0, 6] is no ensemble: 6 is unknown\n"
        "  where: checkpoints.use\n"
        "  next:  name each checkpoint once; there are 0 to 5\n"
    )


def test_halves_of_the_ensemble_share_no_checkpoint(run, tmp_path: Path) -> None:
    assert run("run", "checkpoints.train=3", "stage=plan").code == 0
    plan = Run.open(tmp_path / "run").plan
    assert halves_of(plan) == ([0, 1, 2], [3, 4, 5])
    assert halves_of(replace(plan, dropout_seeds=0)) == ([0], [3])


def test_the_lds_is_evaluated_for_checkpoints_with_all_their_masks(run, tmp_path: Path) -> None:
    ended = run("run", "ground_truth.subsets=4", "checkpoints.train=3")
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "run/report/val.json").read_text())
    assert [c["checkpoints"] for c in report["curves"]] == [3, 6, 9]


def test_gradients_by_each_method_are_the_same(run, tmp_path: Path) -> None:
    methods = ("hooks", "vmap", "loop")
    for method in methods:
        ended = run(method, f"featurize.gradients={method}", "featurize.dtype=float32")
        assert ended.code == 0, ended.err
    by_hooks, *others = (open_run(tmp_path / m).scores("val") for m in methods)
    for scores in others:
        np.testing.assert_allclose(scores, by_hooks, rtol=1e-3, atol=1e-5)


# What is refused --------------------------------------------------------------------------------


def test_a_model_without_dropout_is_refused_when_planned(run, tmp_path: Path) -> None:
    ended = run("run", "+problem.rate=0.0")
    assert ended.code == 2
    assert ended.err == (
        "error: Sequential has no dropout module with a rate above 0: 2\n"
        "  where: checkpoints.dropout_seeds\n"
        "  next:  a model with nn.Dropout modules (torch.nn.functional.dropout is not seen), or "
        "leave checkpoints.dropout_seeds out\n"
    )
    assert not (tmp_path / "run").exists()


def test_another_number_of_masks_is_another_run(run, launch: Launch, tmp_path: Path) -> None:
    assert run("run", "stage=plan").code == 0
    ended = run("run", "checkpoints.dropout_seeds=4", "stage=plan")
    assert ended.code == 2
    assert ended.err == (
        "error: the run directory belongs to another spec:\n"
        "  checkpoints.dropout_seeds: 3 in the plan, 4 now\n"
        f"  where: {tmp_path / 'run'}\n"
        "  next:  leave these settings out to resume this run, or use another run_dir\n"
    )
    ended = run("negative", "checkpoints.dropout_seeds=-1")
    assert "  checkpoints.dropout_seeds: -1 is not a finite number of at least 0\n" in ended.err


def test_one_checkpoint_given_twice_is_still_an_error(run, tmp_path: Path) -> None:
    write_checkpoints(tmp_path / "checkpoints")
    (tmp_path / "checkpoints/1.pt").write_bytes((tmp_path / "checkpoints/0.pt").read_bytes())
    ended = run("run", provided(tmp_path / "checkpoints"))
    assert ended.code == 2
    assert "error: model_ids 0 and 3 have the same weights" in ended.err


def test_weights_that_changed_are_an_error_for_all_their_models(run, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    write_checkpoints(directory)
    assert run("run", provided(directory), "checkpoints.use=[5]", "stage=featurize").code == 0
    torch.save(tiny_dropout.net().state_dict(), directory / "1.pt")
    ended = run("run", provided(directory), "checkpoints.use=[4]")
    assert ended.code == 2
    assert (
        "error: model_id 3 has other weights than those it was first featurized with" in ended.err
    )


def test_rows_are_not_streamed_into_such_a_run(run, tmp_path: Path) -> None:
    assert run("run", "stage=plan").code == 0
    plan = Run.open(tmp_path / "run").plan
    with pytest.raises(ConfigError) as raised:
        streamed_plan.with_checkpoint(plan, 0, None)
    assert raised.value.what == (
        "the models of this run have dropout masks (checkpoints.dropout_seeds=3), which are not "
        "made here"
    )
    streaming = replace(plan, train=replace(plan.train, row_source=Streamed()))
    assert "dropout_seeds: rows are streamed, so no masks are made" in streaming.inconsistencies()


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Dropout(0.5)
        self.net = tiny_dropout.net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Never(Partly):
    def forward(self, x: Tensor) -> Tensor:
        return self.net[3](self.net[1](self.net[0](x)))


def planned(model: nn.Module, path: Path) -> PlannedRun:
    torch.save(model.state_dict(), path / "0.pt")
    return plan_run(
        problem=replace(tiny_dropout.problem(str(path)), model=model),
        run_dir=path / "run",
        cluster="debug",
        proj_dim=16,
        checkpoints={"dropout_seeds": 2},
    )


def test_dropout_modules_that_are_not_called_are_named(tmp_path: Path) -> None:
    note = "dropout modules that are not called in eval(), so not masked: ['unused']"
    assert note in planned(Partly(), tmp_path).notes


def test_a_model_that_calls_none_of_its_dropout_modules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        planned(Never(), tmp_path)
    assert raised.value.what == "Never calls none of its dropout modules in eval(): unused, net.2"
    assert not (tmp_path / "run").exists()
