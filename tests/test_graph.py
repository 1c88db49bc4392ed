"""The job graph: tasks cover their step once, and arrays wait for what they need and no more."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from test_plan import PLAN, plans

from trak_dist import graph
from trak_dist.cell_map import Owners
from trak_dist.cells import (
    STEPS,
    Cell,
    FeaturizeCell,
    GramCell,
    PreconditionCell,
    ScoreCell,
    of_step,
    parse_cell,
)
from trak_dist.configuration.config import Counterfactuals, GroundTruth
from trak_dist.plan import Plan


def ids(found: Iterable[Cell]) -> list[str]:
    return [cell.id for cell in found]


def everything(plan: Plan) -> list[Cell]:
    return [cell for step in STEPS for cell in of_step(plan, step)]


def submit(plan: Plan, done: Collection[Cell], **changed: object) -> list[graph.TaskGroup]:
    """The arrays of all steps, each task owned under the name `step.array.task` once it is seen."""
    owners = Owners(plan)
    seen = []
    settings = {"done": done, "owners": owners, "skip": (), "rows_per_task": 8, **changed}
    for array in graph.task_groups(plan, list(STEPS), **settings):  # type: ignore[arg-type]
        seen.append(array)
        for index, task in enumerate(() if array.missing_inputs else array.tasks):
            owners.take(task, f"{array.step}.{len(seen)}.{index}")
    return seen


def made_by(arrays: list[graph.TaskGroup]) -> dict[Cell, str]:
    """The name, as `submit` gives it, of the task that makes each cell."""
    return {
        cell: f"{array.step}.{number}.{index}"
        for number, array in enumerate(arrays, 1)
        for index, task in enumerate(array.tasks)
        for cell in task
    }


@given(plans(), st.integers(1, 60), st.data())
def test_the_tasks_of_a_step_hold_each_of_its_cells_once(
    plan: Plan, rows: int, data: st.DataObject
) -> None:
    for step in STEPS:
        cells = list(of_step(plan, step))
        skip = set(data.draw(st.lists(st.sampled_from(cells)))) if cells else set()
        tasks = graph.tasks(plan, step, skip=skip, rows_per_task=rows)
        assert [c for task in tasks for c in task if step == "featurize"] == [
            c for c in cells if c not in skip and step == "featurize"
        ]
        assert {c for task in tasks for c in task} == set(cells) - skip
        assert sum(map(len, tasks)) == len(set(cells) - skip)


@given(plans(), st.integers(1, 60), st.data())
def test_a_data_shard_is_neighbouring_cells_of_one_checkpoint_and_split(
    plan: Plan, rows: int, data: st.DataObject
) -> None:
    cells = list(of_step(plan, "featurize"))
    skip = set(data.draw(st.lists(st.sampled_from(cells))))
    for shard in graph.tasks(plan, "featurize", skip=skip, rows_per_task=rows):
        assert len({c.shard[0] for c in shard}) == 1
        assert all(a.rows.stop == b.rows.start for a, b in pairwise(shard))
        assert len(shard) == 1 or shard[-1].rows.stop - shard[0].rows.start <= rows


def test_a_kernel_task_is_what_one_checkpoint_needs_in_order() -> None:
    chains = graph.tasks(PLAN, "kernel")
    assert [[c.id for c in chain] for chain in chains] == [
        [f"gram/{m}", f"kernel/{m}", f"precondition/{m}/val", f"precondition/{m}/test"]
        for m in (0, 1)
    ]


@given(plans(), st.data())
def test_of_any_plan_and_progress_all_is_submitted_once(plan: Plan, data: st.DataObject) -> None:
    asked = Counterfactuals(targets=data.draw(st.integers(0, 3)), remove=(1, 2), seeds=1)
    truth = GroundTruth(subsets=data.draw(st.sampled_from([0, 3])))
    plan = replace(plan, counterfactuals=asked, ground_truth=truth, self_influence=True)
    every = everything(plan)
    done = set(data.draw(st.lists(st.sampled_from(every))))
    arrays = submit(plan, done)
    submitted = [c for array in arrays for task in array.tasks for c in task]
    assert len(submitted) == len(set(submitted))
    assert set(submitted) == set(every) - done
    assert not any(array.missing_inputs for array in arrays)
    made = made_by(arrays)
    for array in arrays:
        for task in array.tasks:
            needed = {c for cell in task for c in cell.dependencies(plan, done)}
            waited = {made[c] for c in needed - done - set(task)}
            assert waited == set(array.after), ids(task)


def test_without_training_featurize_is_one_array_and_a_kernel_waits_for_its_own_checkpoint() -> (
    None
):
    trained = {c for c in everything(PLAN) if c.kind == "train"}
    arrays = submit(PLAN, trained)
    assert [a.step for a in arrays] == [
        *("featurize", "kernel", "kernel", "score", "report", "report")
    ]
    features, first, second, score, *_ = arrays
    tasks = [f"featurize.1.{i}" for i in range(len(features.tasks))]
    assert not features.after
    assert first.after | second.after == set(tasks)
    assert not first.after & second.after
    assert score.after == {"kernel.2.0", "kernel.3.0"}


def test_a_cell_revoked_is_made_again_and_what_reads_it_waits() -> None:
    """`verify repair=true` took one featurize cell; what was made of it before stays valid."""
    cell = parse_cell("featurize/1/train/4-8")
    scored = [c for c in everything(PLAN) if isinstance(c, ScoreCell)]
    done = set(everything(PLAN)) - {cell, *scored}
    features, *scores = submit(PLAN, done)
    assert [*map(list, features.tasks)] == [[cell]]
    assert all(array.after == {"featurize.1.0"} for array in scores)


def test_what_lacks_an_input_that_nobody_makes_says_so() -> None:
    lost = parse_cell("featurize/1/train/4-8")
    arrays = submit(PLAN, {c for c in everything(PLAN) if c.kind == "train"}, skip={lost})
    lacking = {array.step: array.missing_inputs for array in arrays if array.missing_inputs}
    assert set(lacking) == {"kernel", "score", "report"}
    assert lacking["kernel"] == (lost,)
    assert any(isinstance(c, PreconditionCell) and c.model_id == 1 for c in lacking["score"])
    made = [t for a in arrays if not a.missing_inputs for t in a.tasks]
    assert all(c != lost for t in made for c in t)
    assert all(isinstance(c, FeaturizeCell) or c.model_id == 0 for t in made for c in t)


def test_a_task_that_begins_with_a_kernel_waits_beside_the_one_that_makes_its_gram() -> None:
    """As it is where the members of a sweep differ in λ: another run's job makes the Gram."""
    done = {c for c in everything(PLAN) if c.kind in ("train", "featurize")}
    owners = Owners(PLAN)
    for model_id in (0, 1):
        owners.take([GramCell(model_id)], f"7_{model_id}")
    steps = ("kernel",)
    arrays = list(
        graph.task_groups(PLAN, steps, done=done, owners=owners, skip=(), rows_per_task=1)
    )
    assert [(a.after, a.after_any, a.missing_inputs) for a in arrays] == [
        (frozenset(), frozenset({name}), ()) for name in ("7_0", "7_1")
    ]
    assert all(array.tasks[0][0].kind == "kernel" for array in arrays)
