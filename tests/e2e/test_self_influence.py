"""Self-influence and the scores of an ensemble's halves, against float64 and other ensembles."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
import zarr

from trak_dist import open_run
from trak_dist.cells import score
from trak_dist.errors import ConfigError, MissingInputs
from trak_dist.launch import main
from trak_dist.ops import kernel, lds
from trak_dist.stages import report
from trak_dist.store.run import Run

pytestmark = pytest.mark.slow

ROWS, TARGETS, MODELS, LAMBDA = 30, 7, 5, 0.3


def given(root: Path, name: str = "run") -> list[str]:
    return [
        *("problem._target_=tiny_flipped.problem", f"+problem.directory={root / 'checkpoints'}"),
        *(f"run_dir={root / name}", "cluster=debug", "targets=val", "proj_dim=16"),
        *("featurize.batch_rows=4", "featurize.cell_rows=8", f"reduce.lambda_reg={LAMBDA}"),
        "reduce.curvature=none",
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints and a finished run of five of them lie, without self-influence."""
    root = tmp_path_factory.mktemp("made")
    tiny.write_checkpoints(root / "checkpoints", MODELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lds, "RESAMPLES", 49)
        patch.setattr("sys.argv", ["trak-dist", *given(root)])
        main()
    return root


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lds, "RESAMPLES", 49)


@pytest.fixture
def fork(made: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(made / "run", tmp_path / "run")


def stored(run_dir: Path, model_id: int) -> tuple[np.ndarray, np.ndarray]:
    """X (n, k) and Q (n,) of one checkpoint in float64, as stored."""
    group = zarr.open_group(run_dir / "store.zarr", mode="r")
    split = group[f"models/{model_id}/{Run.open(run_dir).plan.projection_id}/train"]
    x, scale, q = (
        np.asarray(split[name][:], np.float64) for name in ("grads", "row_scale", "out_to_loss")
    )
    return x * scale[:, None], q


def wanted(run_dir: Path, model_ids: range, kernel_scale: str = "mean_abs") -> np.ndarray:
    """mean of [scale · diag(X (XᵀX + λI)⁻¹ Xᵀ)] ⊙ mean of Q, in float64."""
    diagonals, out_to_loss = [], []
    for model_id in model_ids:
        x, q = stored(run_dir, model_id)
        found = oracle.kernel(
            x, lambda_reg=LAMBDA, lambda_unit="mean_diagonal", kernel_scale=kernel_scale
        )
        diagonals.append(np.diag(x @ found.inverse @ x.T))
        out_to_loss.append(q)
    return np.mean(diagonals, axis=0) * np.mean(out_to_loss, axis=0)


def figures(run_dir: Path, name: str = "train") -> dict[str, Any]:
    return json.loads((run_dir / f"report/{name}.json").read_bytes())


# Self-influence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_it_is_the_diagonal_of_the_rows_against_themselves(scale: float) -> None:
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    regular = (x.double().T @ x.double()).add(torch.eye(6), alpha=0.2)
    found = kernel.Primal(torch.linalg.cholesky(regular), scale).self_influence(x)
    expected = scale * np.diag(x.double().numpy() @ np.linalg.inv(regular.numpy()) @ x.numpy().T)
    assert (found.shape, found.dtype) == ((20, 1), torch.float64)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-12)
    assert bool((kernel.Primal(torch.linalg.cholesky(regular), 1.0).self_influence(x) < 1).all())


def test_switched_on_in_a_finished_run_it_costs_scores_alone_and_is_the_oracles(
    fork: Path, command, attempts: list[str]
) -> None:
    before = open_run(fork).scores("val")
    ended = command("stage=reduce", "self_influence=true")
    assert ended.code == 0, ended.err
    assert attempts == [f"score/train/0-{ROWS}"]
    found = open_run(fork).self_influence()
    assert (found.shape, found.dtype) == ((ROWS,), np.float32)
    np.testing.assert_allclose(found, wanted(fork, range(MODELS)), rtol=2e-6)
    np.testing.assert_array_equal(open_run(fork).scores("val"), before)
    attempts.clear()
    assert command().code == 0  # it stays switched on
    assert attempts == ["evaluate/train", "report/train"]
    attempts.clear()
    assert command().code == 0
    assert attempts == []


def test_pages_of_it_come_with_the_rest(made: Path, fork: Path, command) -> None:
    ended = command("self_influence=true")
    assert ended.code == 0, ended.err
    page = (fork / "report/train.html").read_text()
    assert "Train examples to look at first" in page
    influence, found = open_run(fork).self_influence(), figures(fork)
    assert (found["targets"], found["model_ids"]) == ("train", [0, 1, 2, 3, 4])
    order = sorted(range(ROWS), key=lambda row: -influence[row])
    assert [one["row"] for one in found["largest"]] == order
    assert [one["self_influence"] for one in found["largest"]] == [influence[r] for r in order]
    listed = [int(row) for row in re.findall(r"<li>.*?#(\d+) <span", page)]
    assert listed == order
    assert f"scores: {fork / 'store.zarr/scores/train'}\n" in ended.out
    assert f"report: {fork / 'report/train.html'}\n" in ended.out
    verified = command("stage=verify")
    assert verified.code == 0, verified.out


def test_the_paper_s_kernel_and_another_ensemble_have_their_own(
    fork: Path, command, made: Path
) -> None:
    asked = ("-m", "stage=reduce", "self_influence=true", "checkpoints.use=[1,2]")
    ended = command(*asked, "reduce.kernel_scale=none")
    assert ended.code == 0, ended.err
    (name,) = Run.open(fork).layout.members()
    found = open_run(fork / "sweeps" / name).self_influence()
    np.testing.assert_allclose(found, wanted(fork, range(1, 3), "none"), rtol=2e-6)
    assert not open_run(fork).plan.self_influence
    assert not (fork / "store.zarr/scores/train").exists()


def test_it_can_be_switched_off_again(fork: Path, command, attempts: list[str]) -> None:
    assert command("self_influence=true").code == 0
    attempts.clear()
    ended = command("self_influence=false")
    assert ended.code == 0, ended.err
    assert attempts == []
    assert "train.html" not in ended.out
    assert "labels:" not in ended.out
    assert command("self_influence=true").code == 0
    assert attempts == [], "what was computed before is still valid"


def test_without_it_there_is_what_to_type(made: Path, fork: Path, command) -> None:
    with pytest.raises(ConfigError) as raised:
        open_run(made / "run").self_influence()
    assert str(raised.value) == (
        "the run does not compute self-influence\n"
        "  next:  python -m trak_dist.launch stage=reduce self_influence=true "
        f"run_dir={made / 'run'}"
    )
    with pytest.raises(ConfigError) as raised:
        open_run(made / "run").scores("train")
    assert str(raised.value) == (
        "train is no target set\n  next:  self_influence() is what there is"
    )
    assert command("stage=plan", "self_influence=true").code == 0
    with pytest.raises(MissingInputs) as missing:
        open_run(fork).self_influence()
    assert str(missing.value) == (
        "1 of 1 score cells of 'train' are missing\n"
        f"  where: {fork}\n  next:  python -m trak_dist.launch run_dir={fork}"
    )


# Wrong labels -----------------------------------------------------------------------------------


def counted(values: np.ndarray, positive: np.ndarray) -> float:
    pairs = [(a > b) + 0.5 * (a == b) for a in values[positive] for b in values[~positive]]
    return float(np.mean(pairs))


def test_known_wrong_labels_give_an_auc_in_figures_and_on_the_last_lines(
    fork: Path, command
) -> None:
    ended = command("self_influence=true")
    influence, wrong = open_run(fork).self_influence(), np.arange(ROWS) < 6
    found = figures(fork)["mislabelled"]
    assert found["rows"] == 6
    assert found["auc"]["mean"] == pytest.approx(counted(influence, wrong))
    q = np.mean([stored(fork, m)[1] for m in range(MODELS)], axis=0)
    assert found["auc_of_out_to_loss"]["mean"] == pytest.approx(counted(q, wrong))
    order = sorted(range(ROWS), key=lambda row: -influence[row])
    for share, rows in (("0.05", 2), ("0.1", 3), ("0.2", 6), ("0.3", 9)):
        assert found["found_by_share"][share] == pytest.approx(wrong[order[:rows]].sum() / 6)
    a, b = (
        "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**found[k])
        for k in ("auc", "auc_of_out_to_loss")
    )
    assert (
        f"labels: AUC {a} of self-influence, {b} of out-to-loss alone, for 6 wrong ones\n"
    ) in ended.out
    (receipt,) = open_run(fork).receipts("evaluate").values()
    assert receipt.facts["mislabelled"] == found
    assert "labels known to be wrong" in (fork / "report/train.html").read_text()


@pytest.mark.parametrize(
    ("marked", "flags", "said"), [(3, 29, "29 flags"), (3, 31, "31 flags")], ids=["few", "many"]
)
def test_flags_that_do_not_fit_the_train_set_are_reported(
    made: Path, tmp_path: Path, command, marked: int, flags: int, said: str
) -> None:
    small = (
        *given(made)[:2],
        *given(made)[4:],
        f"run_dir={tmp_path / 'run'}",
        "self_influence=true",
    )
    asked = (f"+problem.marked={marked}", f"+problem.flags={flags}", "checkpoints.use=[0]")
    ended = command(*small, *asked)
    assert ended.code == 2
    assert (
        f"error: mislabelled has {said} for 30 train rows\n"
        "  where: trak_dist.Problem\n"
        "  next:  a flag for each train row, or None\n"
    ) in ended.err
    assert not (tmp_path / "run/plan.json").exists()


@pytest.mark.parametrize("marked", [0, 30])
def test_without_wrong_or_right_labels_there_is_no_auc(
    made: Path, tmp_path: Path, command, marked: int
) -> None:
    small = (*given(made)[:2], *given(made)[4:], f"run_dir={tmp_path / 'run'}")
    ended = command(
        *small, "self_influence=true", f"+problem.marked={marked}", "checkpoints.use=[0]"
    )
    assert ended.code == 0, ended.err
    assert "mislabelled" not in figures(tmp_path / "run")
    assert "labels:" not in ended.out


def test_a_limit_cuts_the_flags_with_the_rows(made: Path, tmp_path: Path, command) -> None:
    small = (*given(made)[:2], *given(made)[4:], f"run_dir={tmp_path / 'run'}", "limit=12")
    ended = command(*small, "self_influence=true", "checkpoints.use=[0]")
    assert ended.code == 0, ended.err
    assert figures(tmp_path / "run")["mislabelled"]["rows"] == 6
    assert len(figures(tmp_path / "run")["largest"]) == 12


# Halves -----------------------------------------------------------------------------------------


def test_halves_are_the_scores_of_ensembles_of_every_other_checkpoint(
    fork: Path, command, attempts: list[str]
) -> None:
    halves = open_run(fork).halves("val")
    assert (halves.shape, halves.dtype) == ((ROWS, 2, TARGETS), np.float32)
    ended = command("-m", "stage=reduce", "checkpoints.use=[0,2],[1,3]")
    assert ended.code == 0, ended.err
    assert not [i for i in attempts if i.startswith(("featurize", "gram", "kernel", "precond"))]
    there = {
        open_run(path).plan.use: open_run(path).scores("val")
        for path in (fork / "sweeps").iterdir()
    }
    for half, use in enumerate([(0, 2), (1, 3)]):
        np.testing.assert_allclose(halves[:, half], there[use], rtol=1e-6)
    assert np.abs(halves[:, 0] - halves[:, 1]).max() > 0.1 * np.abs(halves).max()


def test_of_an_even_number_no_checkpoint_is_left_out(fork: Path, command) -> None:
    ended = command("-m", "stage=reduce", "checkpoints.use=[1,2,3,4],[1,3],[2,4]")
    assert ended.code == 0, ended.err
    there = {open_run(path).plan.use: open_run(path) for path in (fork / "sweeps").iterdir()}
    halves = there[1, 2, 3, 4].halves("val")
    np.testing.assert_allclose(halves[:, 0], there[1, 3].scores("val"), rtol=1e-6)
    np.testing.assert_allclose(halves[:, 1], there[2, 4].scores("val"), rtol=1e-6)


def test_of_many_targets_halves_are_kept_for_spread_ones(
    made: Path, tmp_path: Path, command, monkeypatch
) -> None:
    monkeypatch.setattr("trak_dist.cells.score.HALVES_TARGETS", 3)
    small = (*given(made)[:2], *given(made)[4:], f"run_dir={tmp_path / 'run'}", "stage=all")
    ended = command(*small, "checkpoints.use=[0,1]")
    assert ended.code == 0, ended.err
    found = open_run(tmp_path / "run")
    assert score.halves_targets(found.plan, "val") == [0, 3, 6]
    halves = found.halves("val")
    assert halves.shape == (ROWS, 2, 3)
    ended = command("-m", "stage=reduce", "checkpoints.use=[0],[1]")
    assert ended.code == 0, ended.err
    members = [open_run(path) for path in (tmp_path / "run/sweeps").iterdir()]
    alone = {member.plan.use: member.scores("val")[:, [0, 3, 6]] for member in members}
    for half in (0, 1):
        np.testing.assert_allclose(halves[:, half], alone[half,], rtol=1e-6)


def test_one_checkpoint_has_no_halves(made: Path, fork: Path, command) -> None:
    assert command("-m", "stage=reduce", "checkpoints.use=[3]").code == 0
    (member,) = (fork / "sweeps").iterdir()
    with pytest.raises(ConfigError) as raised:
        open_run(member).halves("val")
    assert str(raised.value) == (
        "an ensemble of 1 has no halves\n"
        "  next:  more checkpoints: checkpoints.train=… or the problem's own"
    )
    with pytest.raises(ConfigError, match="the run has no target set 'vla'\n  next:  one of val"):
        open_run(fork).halves("vla")
    assert not (fork / "store.zarr/sweeps" / member.name / "halves").exists()


def test_the_report_says_how_many_top_rows_the_halves_share(
    fork: Path, command, monkeypatch
) -> None:
    monkeypatch.setattr(report, "TOP_COUNTS", (3, 15, 16))
    (fork / "receipts/report/report_val.json").unlink()
    ended = command()
    assert ended.code == 0, ended.err
    halves = open_run(fork).halves("val")
    stability = open_run(fork).receipts("report")["report/val"].facts["stability"]
    assert stability.keys() == {"3", "15"}, "not more than half of the rows"
    for count in (3, 15):
        tops = np.argsort(-halves, axis=0, kind="stable")[:count]
        shares = [len({*tops[:, 0, t]} & {*tops[:, 1, t]}) / count for t in range(TARGETS)]
        found = stability[str(count)]
        assert found["mean"] == pytest.approx(np.mean(shares))
        assert found["low"] <= found["mean"] <= found["high"]
        streamed = open_run(fork).top_of_halves("val", count)
        np.testing.assert_array_equal(streamed, tops.transpose(1, 2, 0))
        assert (
            f"halves: val share {found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}] of "
            f"the {count} most helpful rows, by chance {count / 30:.2g}\n"
        ) in ended.out
    assert "Would another ensemble agree?" in (fork / "report/val.html").read_text()


def test_damaged_halves_and_self_influence_are_found_and_repaired(
    fork: Path, command, attempts: list[str]
) -> None:
    assert command("self_influence=true").code == 0
    for name in ("halves/val", "scores/train"):
        (chunk, *_) = (p for p in (fork / "store.zarr" / name / "c").rglob("*") if p.is_file())
        chunk.unlink()
    before = open_run(fork)
    found = command("stage=verify", "repair=true")
    assert f"damaged score/val/0-{ROWS}: halves: " in found.out
    assert f"damaged score/train/0-{ROWS}: scores: " in found.out
    attempts.clear()
    assert command().code == 0
    assert attempts == [f"score/val/0-{ROWS}", f"score/train/0-{ROWS}"]
    np.testing.assert_allclose(before.self_influence(), wanted(fork, range(MODELS)), rtol=2e-6)
    assert command("stage=verify").code == 0
