"""What every kind of cell promises, and what one that leaves something out meets."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from golden import describe

from trak_dist import plan_file, resources
from trak_dist.cells import KINDS, STEPS, Cell, FeaturizeCell, GramCell, of_run, parse_cell
from trak_dist.cells.catalogue import in_order
from trak_dist.plan import Plan

PLANS = sorted((Path(__file__).parent / "golden/plans").glob("*.json"))


@pytest.fixture(params=PLANS, ids=lambda path: path.stem)
def plan(request: pytest.FixtureRequest) -> Plan:
    return plan_file.load(request.param.read_bytes(), where="")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_what_runs_a_kind_is_there(kind: type[Cell]) -> None:
    module, name = kind.run.split(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_counting_cells_is_listing_them(plan: Plan) -> None:
    for kind in KINDS:
        assert kind.count(plan) == len(set(kind.of(plan))) == len(list(kind.of(plan))), kind


def test_cells_depend_on_cells_that_there_are_of_the_kinds_that_they_name(plan: Plan) -> None:
    before = dict.fromkeys(of_run(plan))
    for cell in before:
        assert parse_cell(cell.id) == cell
        for done in (set(), set(before)):
            needed = set(cell.dependencies(plan, done))
            assert needed <= before.keys()
            assert {type(n) for n in needed} <= set(cell.depends_on)


def test_cells_that_depend_alike_depend_on_the_same_of_earlier_steps(plan: Plan) -> None:
    for step, kinds in STEPS.items():
        found: dict[object, set[Cell]] = {}
        for kind in kinds:
            for cell in kind.of(plan):
                earlier = {c for c in cell.dependencies(plan, set()) if c.step != step}
                assert found.setdefault(cell.dependency_group, earlier) == earlier


def test_each_array_has_one_cell_to_make_it_by_and_its_chunks_one_owner(plan: Plan) -> None:
    for kind in KINDS:
        made = [o.path for c in kind.one_per_array(plan) for o in c.arrays(plan).values()]
        assert len(made) == len(set(made))
        chunks: set[tuple[str, int]] = set()
        for cell in kind.of(plan):
            for owned in cell.arrays(plan).values():
                assert owned.path in made
                size = owned.spec.chunks[0]
                mine = {(owned.path, at // size) for at in range(owned.start, owned.stop, size)}
                assert owned.start % size == 0
                assert not mine & chunks
                chunks |= mine


def test_disk_is_what_the_arrays_and_checkpoints_hold(tmp_path: Path) -> None:
    run = describe.planned(tmp_path / "run", PLANS[-1].read_text())
    sizes = {"float16": 2, "float32": 4, "float64": 8, "uint8": 1, "int8": 1}
    stored = 0
    for array in describe.arrays(run).values():
        if array != "group":
            chunk = array["chunks"]
            chunks = math.prod(-(-n // c) for n, c in zip(array["shape"], chunk, strict=True))
            stored += chunks * (math.prod(chunk) * sizes[array["data_type"]] + 4)
    trained = sum(cell.kind == "train" for cell in of_run(run.plan))
    assert resources.disk_bytes(run.plan) == stored + 4 * run.plan.parameters * trained


# A kind that leaves something out -----------------------------------------------------------


def made(**changes: Any) -> type[Cell]:
    """A kind as it should be, but for `changes`; of None it says nothing."""
    body: dict[str, Any] = {
        "kind": "made_up",
        "step": "kernel",
        "depends_on": (GramCell,),
        "runs_problem": False,
        "memory_is_bound": True,
        "threads_from": "reduce",
        "per_member": False,
        "receipt_group": GramCell.receipt_group,
        "run": "nowhere:at_all",
        "gpu": False,
        "if_too_large": "nothing",
        "if_too_long": "nothing",
        "work_unit": "products",
        "__annotations__": {"model_id": int},
        **{name: getattr(GramCell, name) for name in ("identity", "needs", "work")},
        **{n: classmethod(lambda cls, plan: 0) for n in ("of", "count", "memory")},
    }
    body = {name: value for name, value in {**body, **changes}.items() if value is not None}
    return dataclass(frozen=True)(type("MadeUp", (Cell,), body))


def test_a_kind_as_it_should_be_comes_after_those_that_it_depends_on() -> None:
    kind = made()
    assert in_order([kind, FeaturizeCell, GramCell]) == (FeaturizeCell, GramCell, kind)


def test_two_kinds_of_one_name_are_refused() -> None:
    with pytest.raises(TypeError, match="two kinds of cells are called gram"):
        in_order([FeaturizeCell, GramCell, made(kind="gram")])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        *(({name: None}, f"leaves out {name}") for name in ("kind", "step", "depends_on", "run")),
        *(({name: None}, f"leaves out {name}") for name in ("gpu", "runs_problem", "if_too_large")),
        *(({name: None}, f"leaves out {name}") for name in ("memory_is_bound", "threads_from")),
        *(({name: None}, f"leaves out {name}") for name in ("of", "count", "memory", "work")),
        *(({name: None}, f"leaves out {name}") for name in ("if_too_long", "work_unit")),
        *(({name: None}, f"leaves out {name}") for name in ("identity", "needs")),
        *(({name: None}, f"leaves out {name}") for name in ("receipt_group", "per_member")),
        ({"kind": None, "memory": None}, "leaves out kind, memory"),
        ({"step": "featurise"}, "belongs to step 'featurise', which no stage has"),
        ({"step": "train"}, "made_up cells depend on gram, which come later"),
        ({"arrays": GramCell.arrays}, "one of arrays and one_per_array without the other"),
        ({"shard": FeaturizeCell.shard}, "one of shard and series without the other"),
        (
            {"__annotations__": {"model_id": float}},
            "MadeUp.model_id is no str, int, Rows or Selection",
        ),
    ],
)
def test_a_kind_that_leaves_something_out_fails_at_import(
    changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(TypeError, match=told):
        in_order([made(**changes)])
