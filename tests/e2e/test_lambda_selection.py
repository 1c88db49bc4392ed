"""`reduce.lambda_reg=auto`, and a ground truth that the members of a sweep share."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_trained

from trak_dist import open_run
from trak_dist.launch import main
from trak_dist.ops import lds
from trak_dist.stages import report
from trak_dist.store.run import Run

pytestmark = pytest.mark.long

SUBSETS, SEEDS = 6, 2
TRUTH = (f"ground_truth.subsets={SUBSETS}", f"ground_truth.seeds={SEEDS}")
SWEEP = ("-m", "reduce.lambda_reg=1.0,auto")


def given(run_dir: Path) -> list[str]:
    return [
        *("problem._target_=tiny_trained.problem", f"run_dir={run_dir}", "cluster=debug"),
        *("proj_dim=16", "featurize.batch_rows=4", "featurize.cell_rows=8"),
        *("targets=all", "checkpoints.train=2"),
    ]


def quick(patch: pytest.MonkeyPatch) -> None:
    """Intervals are tested elsewhere, pictures cost most of the time."""
    patch.setattr(lds, "RESAMPLES", 49)
    patch.setattr(report, "lds_picture", lambda found, title: b"picture")


@dataclass(frozen=True)
class Made:
    """The sweep's run, and what was printed."""

    run: Path
    out: str

    @property
    def member(self) -> Path:
        """The run of the λ that was chosen."""
        (member,) = (self.run / "sweeps").iterdir()
        return member


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`-m reduce.lambda_reg=1.0,auto` with a ground truth, in one command."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch, (root / "out").open("w") as out:
        quick(patch)
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.argv", ["trak-dist", *given(root / "run"), *SWEEP, *TRUTH])
        main()
    return Made(root / "run", (root / "out").read_text())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


@pytest.fixture
def fork(made: Made, tmp_path: Path) -> Made:
    """A copy of the sweep's run."""
    return Made(shutil.copytree(made.run, tmp_path / "run"), "")


def figures(run_dir: Path, name: str) -> dict[str, Any]:
    return json.loads((run_dir / f"report/{name}.json").read_bytes())


def best(run_dir: Path, dim: int = 16) -> tuple[float, float]:
    """The λ with the highest LDS, the mean over both target sets, and that mean."""
    means = []
    for name in ("val", "test"):
        found = figures(run_dir, name)
        (curve,) = (c for c in found["curves"] if (c["checkpoints"], c["proj_dim"]) == (2, dim))
        means.append([one["mean"] for one in curve["by_lambda"]])
    average = np.mean(means, axis=0)
    return found["lambdas"][int(average.argmax())], float(average.max())


# Chosen -----------------------------------------------------------------------------------------


def why(run_dir: Path) -> str:
    value, mean = best(run_dir)
    rounded = float(f"{value:.3g}")
    return (
        f"λ = {rounded} of the mean diagonal, the best of 20 by the mean LDS of val, test: "
        f"{mean:.3f}"
    )


def test_the_second_task_has_the_lambda_with_the_highest_mean_lds(made: Made) -> None:
    value, mean = best(made.run)
    plan, base = open_run(made.member).plan, open_run(made.run).plan
    assert plan.spec.reduce.lambda_reg == pytest.approx(value, rel=5e-3)
    assert (plan.spec.reduce.lambda_unit, base.spec.reduce.lambda_reg) == ("mean_diagonal", 1.0)
    assert f"auto: {why(made.run)}\n" in made.out
    assert (plan.lambda_from, base.lambda_from) == (why(made.run), None)
    # Scores made with it have the LDS that was promised, but for its three digits.
    found = np.mean([figures(made.member, name)["lds"]["mean"] for name in ("val", "test")])
    assert found == pytest.approx(mean, abs=0.05)


def test_kernels_page_and_printed_lds_say_where_lambda_is_from(made: Made) -> None:
    for run_dir, said in ((made.run, "settings"), (made.member, why(made.run))):
        reduced = open_run(run_dir).receipts("reduce")
        assert {reduced[f"kernel/{m}"].facts["lambda_from"] for m in (0, 1)} == {said}
    pages = [(d / "report/val.html").read_text() for d in (made.run, made.member)]
    assert "Chosen:" not in pages[0]
    assert f"<p>Chosen: {why(made.run)}. The LDS of these scores is taken on the same" in pages[1]
    lines = [line.strip() for line in made.out.splitlines() if "LDS:  " in line]
    flattered = [line for line in lines if "(95 %, λ chosen on these targets), with" in line]
    fair = [line for line in lines if "(95 %), with λ chosen on other targets" in line]
    # Of each target set once at the end of its task, and once in the summary.
    assert (len(flattered), len(fair)) == (4, 4)
    assert lines[-4:] == [*fair[-2:], *flattered[-2:]]
    own = "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**figures(made.member, "val")["lds"])
    assert flattered[0].startswith(f"LDS:    val {own} (95 %, λ chosen on these targets), with λ")


def test_repeated_nothing_is_computed_again(fork: Made, command, attempts: list[str]) -> None:
    for again in ((*SWEEP, *TRUTH), ("-m", "reduce.lambda_reg=auto")):
        ended = command(*again)
        assert ended.code == 0, ended.err
        assert f"auto: {why(fork.run)}\n" in ended.out
        assert "λ chosen on these targets" in ended.out
    assert attempts == []
    assert open_run(fork.member).plan.lambda_from == why(fork.run)
    assert command("-m", "stage=verify", "reduce.lambda_reg=auto").code == 0


def test_the_members_models_are_those_of_the_run(made: Made) -> None:
    assert not (made.member / "checkpoints").exists()
    models = {f"{s}/{m}" for s in range(SUBSETS) for m in range(SEEDS)}
    files = (made.run / "checkpoints").rglob("*.safetensors")
    found = {str(f.relative_to(made.run / "checkpoints").with_suffix("")) for f in files}
    assert found == models | {"full/0", "full/1"}
    assert open_run(made.member).receipts("train") == open_run(made.run).receipts("train")


def test_another_lambda_by_hand_is_not_said_to_be_chosen(fork: Made, command) -> None:
    member = fork.member
    ended = command("-m", "reduce.lambda_reg=7.5")
    assert ended.code == 0, ended.err
    (other,) = set((fork.run / "sweeps").iterdir()) - {member}
    assert open_run(other).plan.lambda_from is None
    assert "λ chosen on these targets" not in ended.out
    ended = command(f"run_dir={member}")
    assert "λ chosen on these targets" in ended.out


NONE_YET = (
    "error: auto chooses λ from an evaluation against retrained models, and there is none yet of "
    "{what}\n"
    "  where: reduce.lambda_reg\n"
    "  next:  first the same command with reduce.lambda_reg=1.0 ground_truth.subsets=100 "
    "ground_truth.seeds=3; on Slurm wait until it is done\n"
)
ALL = NONE_YET.format(what="sjlt to 16, checkpoints all")


@pytest.mark.parametrize("way", [(), ("-m",)], ids=["alone", "sweep"])
def test_without_a_run_there_is_nothing_to_choose_from(tmp_path, command, way: tuple) -> None:
    ended = command(*given(tmp_path / "run"), *way, "reduce.lambda_reg=auto", *TRUTH)
    assert (ended.code, ended.err) == (2, ALL)
    assert not (tmp_path / "run/plan.json").exists()


def test_without_an_evaluation_of_each_target_set_neither(fork: Made, command) -> None:
    before = Run.open(fork.run).plan
    (fork.run / "receipts/evaluate/evaluate_test.json").unlink()
    shutil.rmtree(fork.run / "sweeps")
    ended = command("-m", "reduce.lambda_reg=auto")
    assert (ended.code, ended.err) == (2, ALL)
    assert command("ground_truth.subsets=0", "stage=plan").code == 0
    ended = command("-m", "reduce.lambda_reg=auto", "stage=plan")
    assert (ended.code, ended.err) == (2, ALL)
    assert Run.open(fork.run).plan.spec == before.spec


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        (("projection=gaussian",), "gaussian to 16, checkpoints all"),
        (("projection.seed=1",), "sjlt to 16, checkpoints all"),
        (("proj_dim=8",), "sjlt to 8, checkpoints all"),
        (("checkpoints.use=1",), "sjlt to 16, checkpoints [1]"),
        (("reduce.kernel_scale=none",), "sjlt to 16, checkpoints all"),
    ],
    ids=["kind", "seed", "dimension", "ensemble", "scale"],
)
def test_an_evaluation_of_something_else_tells_nothing(fork, command, asked, what: str) -> None:
    ended = command("-m", "reduce.lambda_reg=auto", *asked)
    assert (ended.code, ended.err) == (2, NONE_YET.format(what=what))
    assert [*(fork.run / "sweeps").iterdir()] == [fork.member]


def test_the_evaluation_of_a_member_is_asked_where_the_run_has_none(fork: Made, command) -> None:
    (fork.run / "receipts/evaluate/evaluate_test.json").unlink()
    ended = command("-m", "reduce.lambda_reg=auto", "stage=plan")
    assert ended.code == 0, ended.err
    assert f"auto: λ = {best(fork.member)[0]:.3g} of the mean diagonal" in ended.out


def test_an_absolute_lambda_is_not_chosen(fork: Made, command) -> None:
    ended = command("-m", "reduce.lambda_reg=auto", "reduce.lambda_unit=absolute")
    assert (ended.code, ended.err) == (
        2,
        (
            "error: auto chooses λ as a multiple of the Gram's mean diagonal\n"
            "  where: reduce.lambda_reg\n  next:  reduce.lambda_unit=mean_diagonal\n"
        ),
    )


def test_in_the_run_itself_another_lambda_would_replace_its_scores(fork: Made, command) -> None:
    ended = command("reduce.lambda_reg=auto")
    assert ended.code == 2
    assert ended.err == (
        "error: the run has scores made with another proj_dim, reduce or ensemble\n"
        f"  where: {fork.run}\n  next:  run_dir={fork.member} is the run with these settings\n"
    )


def test_no_other_word_is_a_lambda(fork: Made, command) -> None:
    ended = command("-m", "reduce.lambda_reg=otto")
    assert ended.code == 2
    assert "  reduce.lambda_reg: " in ended.err


# A ground truth that shrinks, grows, and is shared ----------------------------------------------


def masks(run_dir: Path) -> np.ndarray:
    return np.load(run_dir / "ground_truth/masks.npy")


def models(run_dir: Path) -> dict[str, bytes]:
    """Every checkpoint of a subset by path."""
    files = (run_dir / "checkpoints").glob("[0-9]*/*.safetensors")
    return {str(f.relative_to(run_dir)): f.read_bytes() for f in files}


def pages(run_dir: Path) -> dict[str, bytes]:
    return {n: (run_dir / f"report/{n}.json").read_bytes() for n in ("val", "test")}


CONCLUDED = ["evaluate/val", "evaluate/test", "report/val", "report/test"]


@pytest.mark.parametrize(
    "fewer",
    [
        ("ground_truth.subsets=4",),
        pytest.param(("ground_truth.seeds=1",), marks=pytest.mark.slow),
        pytest.param(("ground_truth.subsets=3", "ground_truth.seeds=1"), marks=pytest.mark.slow),
    ],
)
def test_fewer_models_train_nothing_and_more_later_only_new_ones(
    fork: Made, command, attempts: list[str], fewer: tuple[str, ...]
) -> None:
    all_models, all_masks, all_pages = models(fork.run), masks(fork.run), pages(fork.run)
    ended = command(*fewer)
    assert ended.code == 0, ended.err
    assert attempts == CONCLUDED
    truth = Run.open(fork.run).plan.ground_truth
    found = figures(fork.run, "val")
    assert (found["subsets"], found["seeds"]) == (truth.subsets, truth.seeds)
    assert pages(fork.run)["val"] != all_pages["val"]
    assert models(fork.run) == all_models
    np.testing.assert_array_equal(masks(fork.run), all_masks)
    attempts.clear()
    assert command(*TRUTH).code == 0
    assert attempts == CONCLUDED
    assert pages(fork.run) == all_pages
    attempts.clear()
    assert command("ground_truth.subsets=7").code == 0
    assert [i for i in attempts if i.startswith("train/")] == ["train/6/0", "train/6/1"]
    assert len([i for i in attempts if i.startswith("margins/6/")]) == 4
    assert len(attempts) == 6 + len(CONCLUDED)
    assert {k: v for k, v in models(fork.run).items() if k in all_models} == all_models
    np.testing.assert_array_equal(masks(fork.run)[:SUBSETS], all_masks)
    assert masks(fork.run).shape == (7, 24)


def test_the_figures_of_fewer_models_are_those_of_a_run_that_never_had_more(
    fork: Made, tmp_path: Path, command
) -> None:
    fewer = ("ground_truth.subsets=3", "ground_truth.seeds=1")
    assert command(*fewer).code == 0
    other = tmp_path / "other"
    assert command(*given(other), *fewer).code == 0
    assert pages(fork.run) == pages(other)


def test_a_member_may_hold_itself_against_fewer_than_the_run(
    fork: Made, command, attempts: list[str]
) -> None:
    before = pages(fork.run)
    ended = command(*SWEEP[:1], "reduce.lambda_reg=5", "ground_truth.subsets=4")
    assert ended.code == 0, ended.err
    assert not [i for i in attempts if i.startswith(("train/", "margins/"))]
    assert Run.open(fork.run).plan.ground_truth.subsets == SUBSETS
    assert masks(fork.run).shape == (SUBSETS, 24)
    attempts.clear()
    assert command().code == 0
    assert (attempts, pages(fork.run)) == ([], before)
    assert command("stage=verify").code == 0


REFUSED = (
    "error: the run has another ground truth: 6 subsets, 2 seeds, alpha 0.5, masks ''\n"
    "  where: ground_truth\n"
    "  next:  ground_truth.alpha=0.5 and no masks, or use another run_dir\n"
)


def test_members_with_another_alpha_are_refused(fork: Made, command, attempts) -> None:
    before, there = masks(fork.run), [*(fork.run / "sweeps").iterdir()]
    for where in ((), (f"run_dir={fork.member}",), ("-m", "reduce.lambda_reg=5")):
        ended = command(*where, "ground_truth.alpha=0.3")
        assert (ended.code, ended.err) == (2, REFUSED), where
    ended = command("-m", "reduce.lambda_reg=5,6", "ground_truth.alpha=0.3", *TRUTH)
    assert (ended.code, ended.err) == (2, REFUSED * 2)
    assert attempts == []
    assert [*(fork.run / "sweeps").iterdir()] == there
    np.testing.assert_array_equal(masks(fork.run), before)


def test_a_run_may_not_differ_from_its_members_ground_truth(fork: Made, command) -> None:
    """Its own is put aside; that of the member is made of the same files."""
    assert command("ground_truth.subsets=0", "stage=plan").code == 0
    ended = command(*TRUTH, "ground_truth.alpha=0.3", "stage=plan")
    assert (ended.code, ended.err) == (2, REFUSED)


def test_killed_trainings_of_a_member_are_resumed_by_the_run(
    fork: Made, command, attempts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = tiny_trained.train_checkpoint, []

    def deadly(dataset, seed: int, device) -> object:
        calls.append(seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(dataset, seed, device)

    monkeypatch.setattr(tiny_trained, "train_checkpoint", deadly)
    assert command("-m", "reduce.lambda_reg=5", "ground_truth.subsets=7").code == 130
    attempts.clear()
    assert command("ground_truth.subsets=7").code == 0
    assert [i for i in attempts if i.startswith("train/")] == ["train/6/1"]
