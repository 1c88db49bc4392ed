"""Models retrained without their most helpful rows: which rows, which seeds, what is concluded."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import tiny_trained
import torch
from torch.utils.data import Subset

from trak_dist import open_run
from trak_dist.launch import main
from trak_dist.ops import lds
from trak_dist.stages import report
from trak_dist.store.record import Receipt
from trak_dist.store.run import Run

pytestmark = pytest.mark.long

ROWS, TARGETS, REMOVE, SEEDS = 24, (0, 5), (2, 4), 2  # of six targets
ASKED = (
    *("counterfactuals.targets=2", "counterfactuals.remove=[2,4]"),
    f"counterfactuals.seeds={SEEDS}",
)
CELLS = [
    f"counterfactual/val/{whose}/{removed}/{seed}"
    for whose in (*TARGETS, "random")
    for removed in REMOVE
    for seed in range(SEEDS)
]
PAGES = ["evaluate/val", "report/val"]


def given(run_dir: Path) -> list[str]:
    return [
        *("problem._target_=tiny_trained.problem", f"run_dir={run_dir}", "cluster=debug"),
        *("proj_dim=16", "featurize.batch_rows=4", "featurize.cell_rows=8"),
        *("targets=val", "checkpoints.train=2"),
    ]


@dataclass
class Trained:
    """What `train_checkpoint` was called with, by seed and rows."""

    calls: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    die_at: int = 0

    def __call__(self, dataset: Any, seed: int, device: torch.device) -> Any:
        if isinstance(dataset, Subset):
            self.calls.append((seed, tuple(dataset.indices)))
            if len(self.calls) == self.die_at:
                raise KeyboardInterrupt
        return TRAIN(dataset, seed, device)


TRAIN, PICTURE = tiny_trained.train_checkpoint, report.counterfactual_picture


def quick(patch: pytest.MonkeyPatch) -> None:
    """Intervals are tested elsewhere, pictures cost most of the time."""
    patch.setattr(lds, "RESAMPLES", 49)
    for name in ("lds_picture", "counterfactual_picture"):
        patch.setattr(report, name, lambda found, title: b"picture")


@dataclass(frozen=True)
class Made:
    """Runs without and with counterfactuals, and what the latter's models were trained on."""

    plain: Path
    run: Path
    trained: Trained


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("made")
    trained = Trained()
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        patch.setattr(tiny_trained, "train_checkpoint", trained)
        for asked in ((), ASKED):
            patch.setattr(report, "counterfactual_picture", PICTURE)
            patch.setattr("sys.argv", ["trak-dist", *given(root / "run"), *asked])
            main()
            if not asked:
                shutil.copytree(root / "run", root / "plain")
    return Made(root / "plain", root / "run", trained)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    found = Trained()
    monkeypatch.setattr(tiny_trained, "train_checkpoint", found)
    return found


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


@pytest.fixture
def plain(made: Made, tmp_path: Path) -> Path:
    """A copy of the finished run without counterfactuals."""
    return shutil.copytree(made.plain, tmp_path / "run")


@pytest.fixture
def finished(made: Made, tmp_path: Path) -> Path:
    """A copy of the finished run with them."""
    return shutil.copytree(made.run, tmp_path / "run")


def receipts(run_dir: Path) -> dict[str, Receipt]:
    found = open_run(run_dir).receipts("evaluate")
    return {i: r for i, r in found.items() if i.startswith("counterfactual/")}


def facts(run_dir: Path) -> dict[str, Any]:
    return {cell: receipt.facts for cell, receipt in receipts(run_dir).items()}


def figures(run_dir: Path) -> list[dict[str, Any]]:
    return json.loads((run_dir / "report/val.json").read_bytes())["counterfactuals"]


def seed_of(seed: int) -> int:
    """What a retrained model is seeded with."""
    digest = hashlib.blake2b(repr((1, "counterfactual", seed)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**31


def complement(rows: Any) -> tuple[int, ...]:
    return tuple(sorted(set(range(ROWS)) - {int(row) for row in rows}))


def most_helpful(scores: np.ndarray, target: int, count: int) -> list[int]:
    return sorted(range(ROWS), key=lambda row: (-scores[row, target], row))[:count]


# Which rows, which seeds --------------------------------------------------------------------------


def test_each_model_sees_the_complement_of_the_most_helpful_rows(made: Made) -> None:
    results = open_run(made.run)
    scores, calls = results.scores("val"), made.trained.calls
    assert list(receipts(made.run)) == CELLS
    assert len(calls) == len(CELLS), "the ensemble's own see the whole train set"
    seen = dict(zip(CELLS, calls, strict=True))
    for cell, (seed, rows) in seen.items():
        _, _, whose, removed, number = cell.split("/")
        assert seed == seed_of(int(number)), "one seed for all that is compared"
        assert len(rows) == ROWS - int(removed)
        if whose != "random":
            (top,) = results.top("val", [int(whose)], int(removed))
            assert rows == complement(top.helpful)
            assert rows == complement(most_helpful(scores, int(whose), int(removed)))


def test_random_rows_are_others_for_each_seed_and_more_of_the_same_where_more_go(
    made: Made,
) -> None:
    rows = {cell: set(r) for cell, (_, r) in zip(CELLS, made.trained.calls, strict=True)}
    for seed in range(SEEDS):
        two, four = (rows[f"counterfactual/val/random/{n}/{seed}"] for n in REMOVE)
        assert four < two
    gone = [set(range(ROWS)) - rows[f"counterfactual/val/random/4/{seed}"] for seed in (0, 1)]
    assert gone[0] != gone[1]


def test_outputs_are_those_of_models_trained_here(made: Made) -> None:
    torch.set_num_threads(1)
    problem = tiny_trained.problem()
    examples = [*problem.targets["val"]]
    found = facts(made.run)
    for cell, (seed, rows) in zip(CELLS, made.trained.calls, strict=True):
        state = TRAIN(Subset(problem.train, list(rows)), seed, torch.device("cpu"))
        net = tiny.net()
        net.load_state_dict(state)
        net = net.double()
        with torch.no_grad():
            outputs = [
                float(oracle.margin_and_out_to_loss(net(x.double()[None])[0], int(y))[0])
                for x, y in examples
            ]
        assert found[cell].keys() == {"outputs"}
        np.testing.assert_allclose(found[cell]["outputs"], outputs, rtol=1e-4, atol=1e-5)


def test_other_target_sets_lose_the_same_random_rows(plain: Path, command, trained) -> None:
    ended = command("targets=all", *ASKED, "counterfactuals.remove=[3]")
    assert ended.code == 0, ended.err
    order = [c for c in open_run(plain).receipts("evaluate") if c.startswith("counter")]
    rows = dict(zip(order, trained.calls, strict=True))
    for seed in range(SEEDS):
        ours, theirs = (rows[f"counterfactual/{n}/random/3/{seed}"] for n in ("val", "test"))
        assert ours == theirs
    scores = open_run(plain).scores("test")
    for target in (0, 3):
        (_, left) = rows[f"counterfactual/test/{target}/3/1"]
        assert left == complement(most_helpful(scores, target, 3))


# What is concluded --------------------------------------------------------------------------------


def test_figures_are_means_of_the_models_outputs_and_their_differences(made: Made) -> None:
    found, outputs = figures(made.run), facts(made.run)
    assert [one["removed"] for one in found] == list(REMOVE)
    for one in found:
        assert one["targets"] == list(TARGETS)

        def each(whose: object, target: int, removed: int = one["removed"]) -> list[float]:
            cells = [f"counterfactual/val/{whose}/{removed}/{seed}" for seed in range(SEEDS)]
            return [outputs[cell]["outputs"][target] for cell in cells]

        random = np.array([each("random", target) for target in TARGETS])
        helpful = np.array([each(target, target) for target in TARGETS])
        assert one["without_random"] == pytest.approx(random.mean(axis=1))
        assert one["without_helpful"] == pytest.approx(helpful.mean(axis=1))
        drops = random - helpful
        assert one["drop"]["mean"] == pytest.approx(drops.mean())
        # Of two targets and two seeds the bootstrap draws one model alone in a sixteenth of cases.
        assert one["drop"]["low"] == pytest.approx(drops.min())
        assert one["drop"]["high"] == pytest.approx(drops.max())
    assert found[1]["drop"]["mean"] > 0, "the rows that are called most helpful do help"


def test_receipt_page_and_last_lines_say_the_same(finished: Path, command) -> None:
    found = figures(finished)
    assert open_run(finished).receipts("evaluate")["evaluate/val"].facts == {
        "counterfactuals": found
    }
    ended = command()
    for one in found:
        drop = "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**one["drop"])
        assert (
            f"remove: val {one['removed']} most helpful rows: output drops by {drop}, "
            "against random rows\n"
        ) in ended.out
        assert f'<td class="score">{drop}</td>' in (finished / "report/val.html").read_text()
    picture = finished / "report/val.counterfactuals.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert f"report: {picture}\n" in ended.out
    assert "LDS" not in ended.out


def test_they_stand_beside_a_ground_truth(plain: Path, command, attempts: list[str]) -> None:
    truth = ("ground_truth.subsets=3", "ground_truth.seeds=1")
    assert command(*truth).code == 0
    lds_before = json.loads((plain / "report/val.json").read_bytes())
    attempts.clear()
    ended = command("counterfactuals.targets=2", "counterfactuals.remove=2")
    assert ended.code == 0, ended.err
    assert [i for i in attempts if not i.startswith("counterfactual/")] == PAGES
    both = json.loads((plain / "report/val.json").read_bytes())
    assert {**both, "counterfactuals": 0} == {**lds_before, "counterfactuals": 0}
    assert "LDS:    val " in ended.out
    assert "remove: val 2 most helpful rows" in ended.out


# Killed, grown ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "die_at", [pytest.param(1, marks=pytest.mark.slow), 6, pytest.param(12, marks=pytest.mark.slow)]
)
def test_killed_amid_retraining_it_resumes_to_the_same_outputs(
    made: Made, plain: Path, command, trained: Trained, attempts: list[str], die_at: int
) -> None:
    trained.die_at = die_at
    assert command(*ASKED).code == 130
    assert list(receipts(plain)) == CELLS[: die_at - 1]
    assert attempts == CELLS[:die_at]
    trained.calls.clear()
    trained.die_at = 0
    attempts.clear()
    ended = command()
    assert ended.code == 0, ended.err
    assert attempts == [*CELLS[die_at - 1 :], *PAGES]
    assert trained.calls == made.trained.calls[die_at - 1 :]
    assert facts(plain) == facts(made.run)
    assert figures(plain) == figures(made.run)


def test_lost_receipts_cost_their_own_models_alone(
    made: Made, finished: Path, command, attempts: list[str]
) -> None:
    lost = CELLS[3]
    Run.open(finished).layout.receipt(Run.open(finished).plan, _cell(lost)).unlink()
    assert command().code == 0
    assert attempts == [lost]
    assert facts(finished) == facts(made.run)


def _cell(cell_id: str) -> Any:
    from trak_dist.cells import parse_cell

    return parse_cell(cell_id)


@pytest.mark.parametrize(
    ("more", "new"),
    [
        ("counterfactuals.seeds=3", {f"{w}/{n}/2" for w in ("0", "5", "random") for n in REMOVE}),
        pytest.param(
            "counterfactuals.remove=[2,4,7]",
            {f"{w}/7/{s}" for w in ("0", "5", "random") for s in (0, 1)},
            marks=pytest.mark.slow,
        ),
        pytest.param("counterfactuals.remove=[4]", set(), marks=pytest.mark.slow),
        pytest.param("counterfactuals.seeds=1", set(), marks=pytest.mark.slow),
    ],
)
def test_more_or_fewer_later_retrain_only_the_new_ones(
    made: Made, finished: Path, command, attempts: list[str], more: str, new: set[str]
) -> None:
    ended = command(more)
    assert ended.code == 0, ended.err
    counterfactuals = [i for i in attempts if i not in PAGES]
    assert sorted(counterfactuals) == sorted(f"counterfactual/val/{one}" for one in new)
    assert attempts[-2:] == PAGES
    before, after = facts(made.run), facts(finished)
    assert {i: after[i] for i in before if i in after} == {
        i: before[i] for i in before if i in after
    }
    asked = Run.open(finished).plan.counterfactuals
    assert [one["removed"] for one in figures(finished)] == list(asked.remove)
    assert len(after) == 3 * len(asked.remove) * asked.seeds
    attempts.clear()
    assert command(*ASKED).code == 0
    assert attempts == PAGES, "what was there before still is"
    assert facts(finished) == before
    assert figures(finished) == figures(made.run)


def test_a_checkpoint_that_joins_makes_them_anew_of_the_new_scores(
    finished: Path, command, trained: Trained
) -> None:
    ended = command("checkpoints.train=3", "counterfactuals.remove=[4]", "counterfactuals.seeds=1")
    assert ended.code == 0, ended.err
    scores = open_run(finished).scores("val")
    assert [rows for _, rows in trained.calls][:2] == [
        complement(most_helpful(scores, target, 4)) for target in TARGETS
    ]


def test_a_members_models_lose_the_rows_most_helpful_by_its_own_scores(
    finished: Path, command, trained: Trained, made: Made
) -> None:
    assert command("-m", "reduce.lambda_reg=0.001").code == 0
    (name,) = Run.open(finished).layout.members()
    member = finished / "sweeps" / name
    assert not trained.calls, "a member is given models of its own only where it is asked for them"
    asked = ("targets=2", "remove=[4]", "seeds=1")
    ended = command("-m", "reduce.lambda_reg=0.001", *(f"counterfactuals.{a}" for a in asked))
    assert ended.code == 0, ended.err
    scores, of_run = open_run(member).scores("val"), open_run(finished).scores("val")
    own = [complement(most_helpful(scores, target, 4)) for target in TARGETS]
    assert [rows for _, rows in trained.calls][:2] == own
    assert own != [complement(most_helpful(of_run, target, 4)) for target in TARGETS]
    assert list(receipts(member)) == [
        f"counterfactual/val/{whose}/4/0" for whose in (*TARGETS, "random")
    ]
    cell = "counterfactual/val/random/4/0"
    assert facts(member)[cell] == facts(made.run)[cell], "without random rows nothing differs"
    assert facts(finished) == facts(made.run)
    assert len(figures(member)) == 1


# What is refused --------------------------------------------------------------------------------


def test_without_train_checkpoint(launch, tmp_path: Path) -> None:
    tiny.write_checkpoints(tmp_path / "checkpoints", 1)
    asked = [o for o in given(tmp_path / "run") if not o.startswith("problem")]
    brought = (
        "problem._target_=tiny.problem",
        f"+problem.directory={tmp_path / 'checkpoints'}",
    )
    ended = launch(*asked, *brought, "counterfactuals.targets=2", "stage=plan")
    assert (ended.code, ended.err) == (
        2,
        (
            "error: the problem has no train_checkpoint to retrain models with\n"
            "  where: counterfactuals.targets\n  next:  give it one\n"
        ),
    )
    assert not (tmp_path / "run/plan.json").exists()


@pytest.mark.parametrize(("remove", "most"), [("[2,24]", 24), ("30", 30), ("[25,1]", 25)])
def test_more_rows_than_there_are(plain: Path, command, remove: str, most: int) -> None:
    before = Run.open(plain).plan
    ended = command("counterfactuals.targets=2", f"counterfactuals.remove={remove}", "stage=plan")
    assert (ended.code, ended.err) == (
        2,
        (
            f"error: {most} of 24 train rows can't be removed\n"
            "  where: counterfactuals.remove\n  next:  counterfactuals.remove=1\n"
        ),
    )
    assert Run.open(plain).plan == before


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("counterfactuals.remove=0", "counterfactuals.remove: 0 is not a number of rows of at"),
        ("counterfactuals.remove=[4,-2]", "counterfactuals.remove: -2 is not a number of rows of"),
        ("counterfactuals.remove=[]", "counterfactuals.remove: [] "),
        (
            "counterfactuals.seeds=0",
            "counterfactuals.seeds: 0 is not a finite number of at least 1",
        ),
        ("counterfactuals.targets=-1", "counterfactuals.targets: -1 is not a finite number of at"),
    ],
)
def test_settings_that_make_no_counterfactuals(plain, command, asked: str, said: str) -> None:
    ended = command("counterfactuals.targets=2", asked, "stage=plan")
    assert ended.code == 2
    assert ended.err.startswith(f"error: the configuration is not valid:\n  {said}")


def test_stage_evaluate_makes_them_and_needs_scores(
    plain: Path, command, attempts: list[str]
) -> None:
    ended = command("stage=evaluate", "counterfactuals.targets=2", "counterfactuals.remove=2")
    assert ended.code == 0, ended.err
    assert attempts[-1] == "evaluate/val"
    assert not [i for i in attempts[:-1] if not i.startswith("counterfactual/val/")]
    (plain / "receipts/score").rename(plain / "receipts/lost")
    ended = command("stage=evaluate", "counterfactuals.seeds=4")
    assert ended.code == 2
    assert ended.err.startswith("error: stage=evaluate needs reduce, of which 1 of ")


def test_with_nothing_to_hold_scores_against(plain: Path, command) -> None:
    ended = command("stage=evaluate")
    assert ended.code == 2
    assert ended.err.startswith("error: there is no ground truth to compare the scores with\n")


# Damaged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deleted", pytest.param("edited", marks=pytest.mark.slow)])
def test_damaged_figures_are_found_and_repaired(
    made: Made, finished: Path, command, attempts: list[str], way: str
) -> None:
    file = finished / "report/val.json"
    before = file.read_bytes()
    assert command("stage=verify").code == 0
    if way == "deleted":
        file.unlink()
    else:
        file.write_bytes(before.replace(b'"removed": 2', b'"removed": 3'))
    found = "none" if way == "deleted" else hashlib.sha256(file.read_bytes()).hexdigest()[:32]
    written = hashlib.sha256(before).hexdigest()[:32]
    ended = command("stage=verify")
    assert ended.code == 1
    assert (
        f"damaged evaluate/val: figures: digest {found}, the receipt says {written}\n"
    ) in ended.out
    assert command().code == 0
    assert not file.exists() or file.read_bytes() != before, "not before it is asked for"
    attempts.clear()
    ended = command("stage=verify", "repair=true")
    assert (ended.code, attempts) == (0, [])
    ended = command()
    assert ended.code == 0, ended.err
    assert attempts == ["evaluate/val"]
    assert file.read_bytes() == before
    assert command("stage=verify").code == 0
