"""Kernels of the loss's curvature: scores against the float64 oracle, members, refusals."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import test_oracle
import tiny
import torch
from command_result import Launch

import trak_dist
from trak_dist import open_run
from trak_dist.cells import FeaturizeCell, FisherCell, GramCell, KernelCell, of_run
from trak_dist.ops.curvature import uniform_of_rows
from trak_dist.ops.draws import some_rows
from trak_dist.store.run import Run

ROWS = 50
RELATIVE = {"lambda_reg": 0.05, "lambda_unit": "mean_diagonal"}
CPU = torch.device("cpu")


def plain_output() -> trak_dist.Problem:
    """The tiny problem with a model output that says nothing of its loss."""

    class Plain:
        def get_output(self, model, weights, buffers, features, label) -> torch.Tensor:
            logits = torch.func.functional_call(model, (weights, buffers), (features[None],))
            return logits[0, label]

        def get_out_to_loss_grad(self, model, weights, buffers, batch) -> torch.Tensor:
            return torch.ones(len(batch[0]))

    problem = tiny.problem("checkpoints")
    return trak_dist.Problem(
        model=problem.model,
        model_output=Plain(),
        train=problem.train,
        targets=problem.targets,
        checkpoints=problem.checkpoints,
    )


@dataclass(frozen=True)
class Setting:
    curvature: str
    form: str
    projection: str
    kernel_scale: str
    draws: int = 1
    sample: int = 0
    gram_rows: int = 0


def wanted(path: Path, setting: Setting) -> list[oracle.Member]:
    uniform: list[dict[int, float]] = []
    if setting.curvature == "fisher":
        rows = some_rows(0, ROWS, setting.sample or ROWS).tolist()
        draws = range(setting.draws)
        numbers = [uniform_of_rows(rows, draw, CPU)(1)[:, 0].tolist() for draw in draws]
        uniform = [dict(zip(rows, one, strict=True)) for one in numbers]
    built = tiny.problem(str(path / "checkpoints"))
    return [
        oracle.member(
            *(tiny.net(), torch.load(checkpoint), built.train, built.targets["val"]),
            projection=test_oracle.projection_matrix(setting.projection, tiny, model_id),
            weighted=setting.curvature == "output",
            uniform=uniform,
        )
        for model_id, checkpoint in enumerate(built.checkpoints)
    ]


@pytest.mark.parametrize(
    "setting",
    [
        Setting("none", "dual", "sjlt", "mean_abs"),
        Setting("output", "primal", "sjlt", "mean_abs", gram_rows=20),
        Setting("output", "dual", "identity", "none"),
        Setting("fisher", "primal", "identity", "mean_abs"),
        Setting("fisher", "primal", "sjlt", "none", draws=3, gram_rows=40),
        Setting("fisher", "dual", "sjlt", "mean_abs", draws=2, sample=21),
    ],
    ids=lambda s: f"{s.curvature}{s.draws}-{s.form}-{s.projection}",
)
def test_scores_agree_with_a_float64_oracle(
    launch: Launch, tmp_path: Path, setting: Setting
) -> None:
    settings = RELATIVE | {"kernel_scale": setting.kernel_scale}
    found = test_oracle.run(
        launch,
        tmp_path,
        "tiny",
        *(f"projection={setting.projection}", f"projection.seed={test_oracle.SEED}"),
        *("proj_dim=16", "featurize.dtype=float32", "self_influence=true"),
        *(f"reduce.{name}={value}" for name, value in settings.items()),
        *(f"reduce.curvature={setting.curvature}", f"reduce.kernel_form={setting.form}"),
        *(f"reduce.fisher_draws={setting.draws}", f"reduce.fisher_rows={setting.sample}"),
        f"reduce.gram_rows={setting.gram_rows}",
    )
    assert bool(plan_of(tmp_path / "run").gram_parts) == bool(setting.gram_rows)
    members = wanted(tmp_path, setting)
    expected, _ = oracle.scores(members, **settings)
    assert oracle.column_errors(found, expected).max() < 1e-4

    kernels = [oracle.kernel(m.rows, **settings).inverse for m in members]
    own = np.mean(
        [np.diag(m.train @ k @ m.train.T) for m, k in zip(members, kernels, strict=True)], axis=0
    )
    own *= np.mean([m.out_to_loss for m in members], axis=0)
    np.testing.assert_allclose(open_run(tmp_path / "run").self_influence(), own, rtol=1e-4)


def plan_of(run_dir: Path) -> Any:
    return Run.open(run_dir).plan


def test_auto_is_output_for_classification_and_none_where_nothing_is_known(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_checkpoints(tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    for target, extra, curvature in (
        ("tiny.problem", ["+problem.directory=checkpoints"], "output"),
        ("test_curvature.plain_output", [], "none"),
    ):
        run_dir = tmp_path / curvature
        command = (f"problem._target_={target}", *extra, "proj_dim=16", "limit=30")
        ended = launch(*command, f"run_dir={run_dir}", "cluster=debug", "stage=plan")
        assert ended.code == 0, ended.err
        assert plan_of(run_dir).curvature == curvature
        assert ("curvature output" in ended.out) == (curvature == "output")


def test_more_columns_than_rows_are_factorised_as_dual(command: Launch) -> None:
    ended = command("problem=mnist", "limit=30", "proj_dim=64", "stage=plan")
    assert ended.code == 0
    assert "curvature output, dual of 30 rows" in ended.out


def test_members_share_all_but_kernels_and_scores(
    launch: Launch, tiny_run: list[str], attempts: list[str]
) -> None:
    run = (*tiny_run, "-m", "reduce.curvature=none,output,fisher", "reduce.fisher_draws=2")
    ended = launch(*run, "targets=val")
    assert ended.code == 0, ended.err
    shared = [c for c in attempts if c.startswith(("featurize", "fisher"))]
    assert len(shared) == len(set(shared))
    assert len([c for c in attempts if c.startswith("gram")]) == 3 * 3
    attempts.clear()
    more = (*tiny_run, "-m", "reduce.curvature=fisher", "reduce.fisher_draws=3")
    assert launch(*more, "targets=val").code == 0
    assert not [c for c in attempts if c.startswith("featurize")]
    assert {c.split("/")[2] for c in attempts if c.startswith("fisher")} == {"2"}


def test_a_finished_run_takes_another_curvature(
    launch: Launch, tiny_run: list[str], tmp_path: Path
) -> None:
    assert launch(*tiny_run, "reduce.curvature=none", "targets=val").code == 0
    run = Run.open(next(Path(o.split("=")[1]) for o in tiny_run if o.startswith("run_dir")))
    before = {c: r.facts for c, r in run.receipts.done(of_run(run.plan)).items()}
    ended = launch(
        f"run_dir={run.layout.run_dir}", "cluster=debug", "-m", "reduce.curvature=output"
    )
    assert ended.code == 0, ended.err
    member = Run.open(run.layout.run_dirs()[1])
    assert member.plan.curvature == "output"
    assert {c: r.facts for c, r in run.receipts.done(of_run(run.plan)).items()} == before
    assert not np.array_equal(
        open_run(run.layout.run_dir).scores("val"), open_run(member.layout.run_dir).scores("val")
    )
    refused = launch(f"run_dir={run.layout.run_dir}", "reduce.curvature=output", "stage=reduce")
    assert refused.code == 2
    assert "the run has scores made with another proj_dim, reduce or ensemble" in refused.err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["reduce.curvature=output"],
            "output is not offered by the model output, which has none",
        ),
        (
            ["reduce.curvature=fisher"],
            "or a model output with draw_labels and get_batch_log_likelihood",
        ),
    ],
)
def test_what_is_not_offered_is_refused(
    launch: Launch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    said: str,
) -> None:
    tiny.write_checkpoints(tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    ended = launch(
        *("problem._target_=test_curvature.plain_output", "cluster=debug", *overrides),
        f"run_dir={tmp_path / 'run'}",
    )
    assert ended.code == 2
    assert said in ended.err
    assert "reduce.curvature=none" in ended.err
    assert not (tmp_path / "run" / "plan.json").exists()


def test_a_sample_of_more_rows_than_there_are_is_refused(
    launch: Launch, tiny_run: list[str]
) -> None:
    ended = launch(*tiny_run, "reduce.curvature=fisher", "reduce.fisher_rows=51")
    assert ended.code == 2
    assert "labels of 51 rows can't be drawn from 50 train rows" in ended.err


def test_no_lambda_and_a_dual_are_refused(launch: Launch, tiny_run: list[str]) -> None:
    ended = launch(*tiny_run, "reduce.lambda_reg=0", "reduce.kernel_form=dual")
    assert ended.code == 2
    assert "λ = 0 has no dual form" in ended.err
    assert "reduce.kernel_form=primal" in ended.err


class DrawsNothing(trak_dist.ImageClassification):
    def draw_labels(self, model, weights, buffers, batch, uniform) -> None:
        return None


class DrawsOne(trak_dist.ImageClassification):
    def draw_labels(self, model, weights, buffers, batch, uniform) -> tuple[torch.Tensor, ...]:
        return tuple(part[:1] for part in batch)


def drawn_by(kind: str, directory: str) -> trak_dist.Problem:
    problem = tiny.problem(directory)
    return replace(problem, model_output=globals()[kind]())


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("DrawsNothing", "draw_labels of DrawsNothing, of examples of train raised TypeError"),
        ("DrawsOne", "a batch of 4 examples came back with 1"),
    ],
)
def test_labels_that_can_not_be_drawn_are_found_when_planning(
    launch: Launch, tiny_run: list[str], kind: str, said: str
) -> None:
    others = [o for o in tiny_run if "_target_" not in o]
    target = ("problem._target_=test_curvature.drawn_by", f"+problem.kind={kind}")
    ended = launch(*others, *target, "reduce.curvature=fisher")
    assert ended.code == 2
    assert said in ended.err


def test_fisher_rows_are_computed_in_bfloat16(launch: Launch, tiny_run: list[str]) -> None:
    asked = ("reduce.curvature=fisher", "featurize.compute=bfloat16", "stage=featurize")
    ended = launch(*tiny_run, "targets=val", *asked)
    assert ended.code == 0, ended.err


def test_fisher_rows_of_other_data_are_revoked(
    launch: Launch, tiny_run: list[str], tmp_path: Path
) -> None:
    fisher = (*tiny_run, "targets=val", "reduce.curvature=fisher", "stage=featurize")
    assert launch(*fisher).code == 0
    run = Run.open(tmp_path / "run")
    first = next(FeaturizeCell.of_split(run.plan, 0, "train"))
    run.receipts.mark_stale(first, "computed from other rows than 'train' has at 0-4")
    assert launch(f"run_dir={tmp_path / 'run'}", "stage=verify", "repair=true").code == 0
    left = run.receipts.done([*FisherCell.of(run.plan)])
    assert {c.model_id for c in left} == {1, 2}


def test_traker_leaves_the_curvature_of_a_launched_run(
    launch: Launch, tiny_run: list[str], tmp_path: Path
) -> None:
    assert launch(*tiny_run, "targets=val", "reduce.curvature=fisher").code == 0
    before = open_run(tmp_path / "run").scores("val")
    own = trak_dist.TRAKer(
        tiny.net(), "image_classification", train_set_size=ROWS, save_dir=tmp_path / "run"
    )
    assert np.array_equal(own.finalize_scores("val"), before)
    assert plan_of(tmp_path / "run").curvature == "fisher"


def test_weights_that_are_all_zero_say_so(
    launch: Launch, tiny_run: list[str], tmp_path: Path
) -> None:
    label = int(tiny.Rows(1, seed=1).labels[0])
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        state = torch.load(path)
        state["2.bias"][label] += 1e4
        torch.save(state, path)
    ended = launch(*tiny_run, "limit=1", "targets=val")
    assert ended.code == 1
    assert "the weight Q(1 − Q) of every train row is zero" in ended.err
    assert "reduce.curvature=none" in ended.err


def test_lambda_of_an_ensemble_of_five_needs_no_evaluation(
    launch: Launch, tiny_run: list[str], tmp_path: Path
) -> None:
    for planned, said in (
        (3, "auto chooses λ from an evaluation"),
        (5, "auto: λ = 0.64 of the mean diagonal, which is twice the mean squared norm"),
    ):
        tiny.write_checkpoints(tmp_path / "checkpoints", planned)
        assert launch(*tiny_run, "targets=val", "stage=featurize").code == 0
        ended = launch(*tiny_run, "stage=reduce", "-m", "reduce.lambda_reg=auto")
        assert said in ended.out + ended.err
    (member,) = Run.open(tmp_path / "run").layout.run_dirs()[1:]
    receipts = open_run(member).receipts("reduce")
    built = tiny.problem(str(tmp_path / "checkpoints"))
    exact = oracle.member(
        *(tiny.net(), torch.load(built.checkpoints[0]), built.train, built.targets["val"]),
        projection=test_oracle.projection_matrix("sjlt", tiny, 0, seed=0),
        weighted=True,
    )
    norms = np.square(exact.rows).sum(axis=1)
    found = receipts["kernel/0"].facts["lambda_absolute"]
    assert found == pytest.approx(2 * norms.mean(), rel=1e-3)


def test_identities_of_cells_follow_the_curvature(command: Launch, tmp_path: Path) -> None:
    """No two curvatures or forms share a Gram, a kernel, or a place for them."""
    assert command("problem=mnist", "limit=30", "proj_dim=16", "stage=plan").code == 0
    plan = plan_of(tmp_path / "run")
    found: dict[str, set[str]] = {"gram": set(), "kernel": set(), "path": set()}
    choices = list(itertools.product(("none", "output", "fisher"), ("primal", "dual")))
    for curvature, form in choices:
        reduce_ = plan.spec.reduce.__class__(curvature=curvature, kernel_form=form)
        other = plan.with_settings(plan.spec.__class__(**vars(plan.spec) | {"reduce": reduce_}), ())
        found["gram"].add(GramCell(0).key(other))
        found["kernel"].add(KernelCell(0).key(other))
        found["path"].add(GramCell(0).arrays(other)["gram"].path)
        train = next(FeaturizeCell.of_split(plan, 0, "train"))
        assert train.key(other) == train.key(plan)
        assert FisherCell.count(other) == (curvature == "fisher") * len(list(FisherCell.of(other)))
    assert {name: len(some) for name, some in found.items()} == dict.fromkeys(found, len(choices))


def test_the_receipt_of_a_kernel_says_what_it_is(
    launch: Launch, tiny_run: list[str], tmp_path: Path
) -> None:
    assert launch(*tiny_run, "targets=val").code == 0
    run_dir = next(o.split("=")[1] for o in tiny_run if o.startswith("run_dir"))
    metadata = json.loads((Path(run_dir) / "store.zarr/scores/val/zarr.json").read_text())
    assert metadata["attributes"]["curvature"] == "output"
