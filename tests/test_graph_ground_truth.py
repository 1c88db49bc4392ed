"""The cells of an evaluation in plan and graph: which there are, their keys, and what waits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_graph import everything, ids, submit
from test_plan import PLAN, cells

from trak_dist import graph, plan_file
from trak_dist.cells import (
    Cell,
    EvaluateCell,
    KernelCell,
    MarginsCell,
    ReportCell,
    ScoreCell,
    TrainCell,
    of_stage,
    parse_cell,
)
from trak_dist.cells.train import retrained
from trak_dist.configuration.config import GroundTruth
from trak_dist.plan import Plan
from trak_dist.plan_inputs import Checkpoint, ImportedTruth, ProbedDataset, Split

TRAINED = replace(PLAN, ground_truth=GroundTruth(subsets=3, seeds=2))
BROUGHT = replace(
    PLAN,
    ground_truth=GroundTruth(masks="/m.npy", margins="/g.npy"),
    imported_truth=ImportedTruth("abc", "val"),
)


@pytest.mark.parametrize("cell_id", ["train/7/0", "margins/7/1/val", "evaluate/val"])
def test_ids_of_the_new_cells_parse_back(cell_id: str) -> None:
    cell = parse_cell(cell_id)
    assert cell.id == cell_id
    assert parse_cell(cell.id) == cell


def test_every_id_of_a_plan_with_a_ground_truth_parses_back_to_its_cell() -> None:
    assert [parse_cell(c.id) for c in cells(TRAINED)] == cells(TRAINED)


def test_without_a_ground_truth_there_is_nothing_to_evaluate() -> None:
    assert not PLAN.has_ground_truth("val")
    assert not list(of_stage(PLAN, "evaluate"))
    assert not list(MarginsCell.of(PLAN))
    assert ids(of_stage(PLAN, "train")) == ["train/full/1"]
    assert ids(ReportCell("val").dependencies(PLAN, ())) == ["score/val/0-10"]


def test_a_trained_ground_truth_has_a_model_for_each_subset_and_seed() -> None:
    models = [(str(subset), seed) for subset in range(3) for seed in range(2)]
    assert TRAINED.has_ground_truth
    assert list(retrained(TRAINED)) == models
    assert list(TrainCell.of(TRAINED)) == [
        TrainCell("full", 1),
        *(TrainCell(*model) for model in models),
    ]
    wanted = {MarginsCell(*model, targets) for model in models for targets in ("val", "test")}
    assert set(MarginsCell.of(TRAINED)) == wanted
    assert ids(of_stage(TRAINED, "evaluate")) == ["evaluate/val", "evaluate/test"]


def test_a_imported_ground_truth_trains_nothing() -> None:
    assert BROUGHT.has_ground_truth("val")
    assert not BROUGHT.has_ground_truth("test")
    assert ids(of_stage(BROUGHT, "train")) == ["train/full/1"]
    assert ids(of_stage(BROUGHT, "evaluate")) == ["evaluate/val"]


def test_a_train_task_of_a_subset_is_its_seeds_each_followed_by_its_margins() -> None:
    assert [ids(task) for task in graph.tasks(TRAINED, "train")] == [
        ["train/full/1"],
        *(
            [
                *(f"train/{subset}/0", f"margins/{subset}/0/val", f"margins/{subset}/0/test"),
                *(f"train/{subset}/1", f"margins/{subset}/1/val", f"margins/{subset}/1/test"),
            ]
            for subset in range(3)
        ),
    ]
    skip = {TrainCell("1", 0), MarginsCell("1", 1, "val")}
    assert ids(graph.tasks(TRAINED, "train", skip=skip)[2]) == [
        *("margins/1/0/val", "margins/1/0/test", "train/1/1", "margins/1/1/test")
    ]


def test_an_evaluation_needs_scores_margins_and_what_its_curves_are_made_of() -> None:
    scores, margins = ["score/val/0-10"], [f"margins/{s}/{m}/val" for s, m in retrained(TRAINED)]
    cell = EvaluateCell("val")
    assert ids(cell.dependencies(TRAINED, ())) == scores + margins
    assert ids(cell.dependencies(BROUGHT, ())) == scores
    done: set[Cell] = set(ScoreCell.of_targets(TRAINED, "val"))
    found = ids(cell.dependencies(TRAINED, done))
    assert set(found) == {*scores, *margins, "kernel/0", "kernel/1"}
    found = ids(cell.dependencies(TRAINED, done | {KernelCell(0), KernelCell(1)}))
    blocks = {"train": ("0-4", "4-8", "8-10"), "val": ("0-3",)}
    grads = {f"featurize/{m}/{s}/{b}" for m in (0, 1) for s in blocks for b in blocks[s]}
    assert set(found) == {*scores, *margins, *grads, "gram/0", "gram/1", "kernel/0", "kernel/1"}
    assert len(found) == len(set(found))


def test_a_report_waits_for_the_evaluation() -> None:
    cell = ReportCell("val")
    for plan in (TRAINED, BROUGHT):
        assert ids(cell.dependencies(plan, ())) == ["evaluate/val"]
        done = {EvaluateCell("val")}
        assert ids(cell.dependencies(plan, done)) == ["evaluate/val", "score/val/0-10"]


def test_an_evaluation_that_lacks_margins_waits_for_the_tasks_that_make_them() -> None:
    lost = [MarginsCell("1", 0, "val"), MarginsCell("2", 1, "val")]
    later = {c for c in everything(TRAINED) if c.kind in ("evaluate", "report")}
    done = set(everything(TRAINED)) - later - set(lost)
    train, *evaluations, _, _ = submit(TRAINED, done)
    assert train.tasks == tuple((cell,) for cell in lost)
    assert {a.tasks[0][0]: set(a.after) for a in evaluations} == {
        EvaluateCell("val"): {"train.1.0", "train.1.1"},
        EvaluateCell("test"): set(),
    }
    arrays = submit(TRAINED, done, skip={lost[0]})
    lacking = {a.tasks[0][0].id: a.missing_inputs for a in arrays if a.missing_inputs}
    assert lacking == {"evaluate/val": (lost[0],), "report/val": (EvaluateCell("val"),)}


def test_the_whole_graph_is_submitted_once_and_featurize_waits_for_no_retraining() -> None:
    arrays = submit(TRAINED, ())
    submitted = [c for a in arrays for task in a.tasks for c in task]
    assert sorted(ids(submitted)) == sorted(ids(cells(TRAINED)))
    assert not any(a.missing_inputs for a in arrays)
    # Of all train tasks, features wait for that of their own checkpoint alone.
    assert {frozenset(a.after) for a in arrays if a.step == "featurize"} == {
        frozenset(),
        frozenset({"train.1.0"}),
    }


def changed(other: Plan) -> set[str]:
    """The ids of the cells of `TRAINED` whose keys are others in `other`, or that are not there."""
    kept = {c.id for c in set(cells(TRAINED)) & set(cells(other)) if c.key(TRAINED) == c.key(other)}
    return set(ids(cells(TRAINED))) - kept


EVALUATED = {"evaluate/val", "evaluate/test", "report/val", "report/test"}
MADE = {c.id for c in cells(TRAINED) if c.kind in ("train", "margins")} - {"train/full/1"}


@pytest.mark.parametrize(
    ("truth", "stages"),
    [
        (GroundTruth(subsets=3, seeds=2), set()),
        (GroundTruth(subsets=4, seeds=2), EVALUATED),
        (GroundTruth(subsets=3, seeds=3), EVALUATED),
        (GroundTruth(subsets=3, seeds=2, alpha=0.4), EVALUATED | MADE),
    ],
)
def test_of_a_larger_ground_truth_only_what_is_concluded_is_made_again(
    truth: GroundTruth, stages: set[str]
) -> None:
    assert changed(replace(TRAINED, ground_truth=truth)) == stages


def test_a_checkpoint_or_a_target_set_that_joins_leaves_the_retrained_models() -> None:
    more = (*TRAINED.checkpoints, Checkpoint(2, "2.pt", False))
    scored = {"score/val/0-10", "score/test/0-10"}
    assert changed(replace(TRAINED, checkpoints=more)) == EVALUATED | scored
    assert (
        changed(
            replace(TRAINED, targets=(*TRAINED.targets, Split("more", 5, 4, ProbedDataset("t"))))
        )
        == set()
    )


def test_a_ground_truth_leaves_all_cells_but_the_reports_as_they_were() -> None:
    for plan in (TRAINED, BROUGHT):
        differing = {c.id for c in cells(PLAN) if c.key(PLAN) != c.key(plan)}
        assert differing == {f"report/{t}" for t in ("val", "test") if plan.has_ground_truth(t)}
    other = replace(BROUGHT, imported_truth=ImportedTruth("other", "val"))
    differing = {c.id for c in cells(BROUGHT) if c.key(BROUGHT) != c.key(other)}
    assert differing == {"evaluate/val", "report/val"}


def test_a_plan_with_a_ground_truth_comes_back_from_its_file() -> None:
    for plan in (TRAINED, BROUGHT):
        assert plan_file.load(plan_file.dump(plan).encode(), where="plan.json") == plan
