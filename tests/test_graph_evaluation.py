"""Cells of counterfactuals and self-influence in plan and graph: keys, tasks, and what waits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_graph import everything, ids, made_by, submit
from test_plan import PLAN, cells

from trak_dist import graph, plan_file
from trak_dist.cell_map import Owners
from trak_dist.cells import (
    CounterfactualCell,
    EvaluateCell,
    KernelCell,
    MarginsCell,
    ReportCell,
    ScoreCell,
    TrainCell,
    of_stage,
    parse_cell,
)
from trak_dist.cells.score import columns, halves_targets
from trak_dist.configuration.config import Counterfactuals, GroundTruth
from trak_dist.coordinates import AtRandom, HelpfulTo, Rows
from trak_dist.errors import ConfigError
from trak_dist.plan import Plan
from trak_dist.plan_inputs import Checkpoint, ProbedDataset, Split

ASKED = Counterfactuals(targets=2, remove=(2, 4), seeds=2)
WITHOUT = replace(PLAN, counterfactuals=ASKED)
ITSELF = replace(PLAN, self_influence=True)
BOTH = replace(WITHOUT, self_influence=True, ground_truth=GroundTruth(subsets=3, seeds=2))
OF_VAL = [
    f"counterfactual/val/{whose}/{removed}/{seed}"
    for whose in ("0", "2", "random")
    for removed in (2, 4)
    for seed in (0, 1)
]


# Cells ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [PLAN, WITHOUT, ITSELF, BOTH])
def test_every_id_parses_back_to_its_cell(plan: Plan) -> None:
    assert [parse_cell(c.id) for c in cells(plan)] == cells(plan)
    assert len(set(ids(cells(plan)))) == len(cells(plan))


@pytest.mark.parametrize(
    "text",
    [
        "counterfactual/val/0/2",
        "counterfactual/val/0/2/0/0",
        "counterfactual/val/0/-2/0",
        "counterfactual/val/0/02/0",
        "counterfactual/v l/0/2/0",
        "counterfactual/val//2/0",
        "counterfactual/val/00/2/0",
        "counterfactual/val/most/2/0",
    ],
)
def test_what_names_no_counterfactual(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a cell id"):
        parse_cell(text)


def test_the_models_of_each_target_set_are_those_of_evenly_spaced_ones_and_random_ones_last() -> (
    None
):
    assert ids(CounterfactualCell.of_targets(WITHOUT, "val")) == OF_VAL
    found = ids(CounterfactualCell.of(WITHOUT))
    assert found[: len(OF_VAL)] == OF_VAL
    assert {i.split("/")[2] for i in found[len(OF_VAL) :]} == {"0", "8", "random"}  # of 9 in test
    assert len(found) == 2 * len(OF_VAL)
    assert ids(of_stage(WITHOUT, "evaluate"))[-2:] == ["evaluate/val", "evaluate/test"]
    assert not list(of_stage(PLAN, "evaluate"))


def test_no_more_targets_than_there_are() -> None:
    many = replace(PLAN, counterfactuals=replace(ASKED, targets=50))
    whose = [str(c.selection) for c in CounterfactualCell.of_targets(many, "val")]
    assert list(dict.fromkeys(whose)) == ["0", "1", "2", "random"]


def test_self_influence_has_score_evaluation_and_page_of_train_and_no_counterfactuals() -> None:
    assert ids(ScoreCell.of(ITSELF)) == [
        "score/val/0-10",
        "score/test/0-10",
        "score/train/0-10",
    ]
    assert ids(EvaluateCell.of(ITSELF)) == ["evaluate/train"]
    assert ids(ReportCell.of(ITSELF)) == ["report/val", "report/test", "report/train"]
    assert ids(EvaluateCell.of(BOTH)) == [f"evaluate/{n}" for n in ("val", "test", "train")]
    assert not [c for c in CounterfactualCell.of(BOTH) if c.targets == "train"]
    assert (columns(ITSELF, "train"), halves_targets(ITSELF, "train")) == (1, [])


def test_halves_are_kept_of_up_to_64_spread_targets_where_there_are_two_checkpoints() -> None:
    wide = replace(PLAN, targets=(Split("val", 1000, 4, ProbedDataset("q")),))
    kept = halves_targets(wide, "val")
    assert (len(kept), kept[0], kept[-1]) == (64, 0, 999)
    assert halves_targets(PLAN, "test") == list(range(9))
    assert halves_targets(replace(PLAN, use=(1,)), "test") == []


# Tasks and needs --------------------------------------------------------------------------------


def test_a_counterfactual_task_is_one_target_or_the_random_ones() -> None:
    tasks = [ids(task) for task in graph.tasks(WITHOUT, "counterfactual")]
    assert tasks[:3] == [OF_VAL[:4], OF_VAL[4:8], OF_VAL[8:]]
    assert len(tasks) == 6
    skip = {CounterfactualCell("val", HelpfulTo(2), 4, 0)}
    again = graph.tasks(WITHOUT, "counterfactual", skip=skip)
    assert ids(again[1]) == [i for i in OF_VAL[4:8] if i != "counterfactual/val/2/4/0"]


def test_a_counterfactual_needs_all_scores_of_its_target_set_alone() -> None:
    cut = replace(PLAN, counterfactuals=ASKED, train=Split("train", 10**7, 512, ProbedDataset("p")))
    scores = ids(ScoreCell.of_targets(cut, "val"))
    assert len(scores) > 1
    cell = CounterfactualCell("val", HelpfulTo(0), 2, 0)
    assert ids(cell.dependencies(cut, ())) == scores
    assert ids(cell.dependencies(cut, set(ScoreCell.of_targets(cut, "val")))) == scores
    assert not ids(CounterfactualCell("val", AtRandom(), 2, 0).dependencies(cut, ()))


GRADS_OF_TRAIN = {f"featurize/{m}/train/{b}" for m in (0, 1) for b in ("0-4", "4-8", "8-10")}


def test_self_influence_needs_kernels_and_the_train_rows_grads_and_no_targets() -> None:
    cell = ScoreCell("train", Rows(0, 10))
    assert ids(cell.dependencies(ITSELF, ())) == ["kernel/0", "kernel/1"]
    done = {KernelCell(0), KernelCell(1)}
    found = ids(cell.dependencies(ITSELF, done))
    assert set(found) == {"kernel/0", "kernel/1"} | GRADS_OF_TRAIN
    assert len(found) == len(set(found))
    partly = set(ids(cell.dependencies(ITSELF, {KernelCell(1)})))
    assert partly == {"kernel/0", "kernel/1"} | {g for g in GRADS_OF_TRAIN if g[10] == "1"}


def test_the_evaluation_of_train_needs_its_scores_and_nothing_of_the_ground_truth() -> None:
    for plan in (ITSELF, BOTH):
        found = ids(EvaluateCell("train").dependencies(plan, ()))
        assert found == ["score/train/0-10"]
        found = ids(EvaluateCell("train").dependencies(plan, set(everything(plan))))
        assert set(found) == {"score/train/0-10"} | GRADS_OF_TRAIN
        assert ids(ReportCell("train").dependencies(plan, ())) == ["evaluate/train"]


def test_an_evaluation_of_counterfactuals_alone_needs_no_kernels() -> None:
    scores = set(ScoreCell.of_targets(WITHOUT, "val"))
    for done in ((), scores, set(everything(WITHOUT))):
        found = ids(EvaluateCell("val").dependencies(WITHOUT, done))
        assert found == ["score/val/0-10", *OF_VAL]
    both = set(ids(EvaluateCell("val").dependencies(BOTH, scores)))
    margins = {f"margins/{s}/{m}/val" for s in range(3) for m in range(2)}
    assert both == {"score/val/0-10", *OF_VAL, *margins, "kernel/0", "kernel/1"}


# Arrays -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [WITHOUT, ITSELF, BOTH])
def test_the_whole_graph_is_submitted_once_each_task_after_what_it_needs(plan: Plan) -> None:
    arrays = submit(plan, ())
    submitted = [c for a in arrays for task in a.tasks for c in task]
    assert sorted(ids(submitted)) == sorted(ids(cells(plan)))
    assert not any(a.missing_inputs for a in arrays)
    made = made_by(arrays)
    for array in arrays:
        for task in array.tasks:
            needed = {c for cell in task for c in cell.dependencies(plan, ())} - set(task)
            assert {made[c] for c in needed} == set(array.after), ids(task)


def test_a_subsets_task_whose_later_cell_needs_a_model_that_another_makes_waits_for_it() -> None:
    """A target set joined while the models of seed 1 were being trained again elsewhere."""
    plan = replace(PLAN, ground_truth=GroundTruth(subsets=3, seeds=2))
    todo = {MarginsCell("1", 0, "test"), MarginsCell("1", 1, "test")}
    elsewhere = TrainCell("1", 1)
    done = set(everything(plan)) - todo - {elsewhere}
    owners = Owners(plan)
    owners.take([elsewhere], "7_0")
    arrays = list(
        graph.task_groups(plan, ["train"], done=done, owners=owners, skip=(), rows_per_task=1)
    )
    (array,) = arrays
    assert set(array.tasks[0]) == todo
    assert (array.after | array.after_any, array.missing_inputs) == ({"7_0"}, ())
    none = Owners(plan)
    nobody = list(
        graph.task_groups(
            plan, ["train"], done=done, owners=none, skip={elsewhere}, rows_per_task=1
        )
    )
    assert [a.missing_inputs for a in nobody] == [(elsewhere,)]
    own = list(graph.task_groups(plan, ["train"], done=done, owners=none, skip=(), rows_per_task=1))
    assert [(set(a.tasks[0]), a.after, a.after_any, a.missing_inputs) for a in own] == [
        ({*todo, elsewhere}, frozenset(), frozenset(), ())
    ]


def test_what_lacks_scores_is_reported_and_not_made() -> None:
    lost = ScoreCell("val", Rows(0, 10))
    arrays = submit(
        WITHOUT, set(everything(WITHOUT)) - set(of_stage(WITHOUT, "evaluate")) - {lost}, skip={lost}
    )
    lacking = {
        (a.step, a.tasks[0][0].targets): a.missing_inputs for a in arrays if a.missing_inputs
    }  # type: ignore[union-attr]
    assert lacking[("counterfactual", "val")] == (lost,)
    assert ("counterfactual", "test") not in lacking


# Keys -------------------------------------------------------------------------------------------


def changed(old: Plan, new: Plan) -> set[str]:
    """The ids of the cells of `old` that `new` has with another key, or has not."""
    kept = {c.id for c in set(cells(old)) & set(cells(new)) if c.key(old) == c.key(new)}
    return set(ids(cells(old))) - kept


PAGES = {f"{kind}/{name}" for kind in ("evaluate", "report") for name in ("val", "test")}
MADE = {c.id for c in CounterfactualCell.of(WITHOUT)}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (replace(ASKED, seeds=3), PAGES),
        (replace(ASKED, remove=(2, 4, 6)), PAGES),
        (replace(ASKED, remove=(2,)), PAGES | {i for i in MADE if i.split("/")[3] == "4"}),
        (replace(ASKED, targets=3), PAGES),
    ],
    ids=["seeds", "more removed", "fewer removed", "targets"],
)
def test_more_seeds_or_rows_removed_leave_the_models_that_are_there(asked, expected) -> None:
    assert changed(WITHOUT, replace(WITHOUT, counterfactuals=asked)) == expected


def test_what_is_switched_on_leaves_everything_but_what_is_concluded() -> None:
    assert changed(PLAN, ITSELF) == set()
    assert changed(PLAN, WITHOUT) == {"report/val", "report/test"}
    assert changed(WITHOUT, BOTH) == PAGES


def test_another_kernel_or_ensemble_makes_counterfactuals_anew() -> None:
    other = replace(PLAN.spec, reduce=replace(PLAN.spec.reduce, lambda_reg=3.0))
    more = (*PLAN.checkpoints, Checkpoint(2, "2.pt", False))
    for plan in (replace(BOTH, spec=other), replace(BOTH, checkpoints=more)):
        found = changed(BOTH, plan)
        own = {i for i in MADE if "/random/" not in i}
        assert found >= own | PAGES | {"score/train/0-10", "evaluate/train", "report/train"}
        assert not {i for i in found if "/random/" in i}, "they depend on no score"
        assert not {i for i in found if i.startswith(("train/", "margins/"))}


def test_a_plan_with_all_of_it_comes_back_from_its_file() -> None:
    plan = replace(BOTH, lambda_from="λ = 0.3, since")
    assert plan_file.load(plan_file.dump(plan).encode(), where="plan.json") == plan
