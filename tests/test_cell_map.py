"""Series and maps of cells: the same cells, ids, keys and rows as the kinds say one by one."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import PLAN, plans

from trak_dist.cell_map import CellMap, Owners, others_by_checkpoint
from trak_dist.cells import KINDS, Cell, FeaturizeCell, of_run
from trak_dist.cells.series import Blocks
from trak_dist.coordinates import Rows
from trak_dist.plan import Plan


@settings(max_examples=20, deadline=None)
@given(plans())
def test_series_hold_the_cells_of_their_kind_in_order(plan: Plan) -> None:
    for kind in KINDS:
        series = list(kind.series(plan))
        assert [c for s in series for c in s] == list(kind.of(plan))
        for one in series:
            assert one.ids() == [c.id for c in one]
            assert one.keys(plan) == {c.id: c.key(plan) for c in one}
            assert len({(c.per_member, c.receipt_group(plan)) for c in one}) == 1
            if isinstance(one, Blocks):
                assert one.rows == sum(len(c.rows) for c in one)
                assert len({c.dependency_group for c in one}) == 1


@settings(max_examples=20, deadline=None)
@given(plans(), st.data())
def test_a_map_holds_what_was_put_in(plan: Plan, data: st.DataObject) -> None:
    cells = list(of_run(plan))
    expected = data.draw(st.dictionaries(st.sampled_from(cells), st.integers(1, 3)))
    found = CellMap(plan)
    for cell, number in expected.items():
        found.mark([cell], number)
    assert {cell: found[cell] for cell in found} == expected
    assert len(found) == len(expected)
    assert all((cell in found) == (cell in expected) for cell in cells)
    for number in range(4):
        chosen = found.where(number)
        assert [*chosen] == [c for c in cells if expected.get(c, 0) == number]
        assert len(chosen) == len([*chosen])
        assert chosen.rows == sum(
            len(c.rows) for c in chosen if c.shard is not None and isinstance(c.shard[1], Rows)
        )


def test_cells_of_another_plan_are_in_no_map() -> None:
    other = replace(PLAN, train=replace(PLAN.train, cell_rows=3))
    strange: list[Cell] = [c for c in of_run(other) if c not in {*of_run(PLAN)}]
    strange += [FeaturizeCell(99, "train", Rows(0, 4)), FeaturizeCell(0, "none", Rows(0, 4))]
    found = CellMap(PLAN, fill=1)
    found.mark(strange, 2)
    assert strange
    assert not any(cell in found for cell in strange)
    assert set(found) == {*of_run(PLAN)}


def test_owners_are_named_by_the_task_that_took_the_cell_last() -> None:
    first, second, *_ = FeaturizeCell.of(PLAN)
    owners = Owners(PLAN)
    owners.take([first, second], "1_0")
    copied = owners.copy()
    copied.take([second], "1_1")
    assert [copied.name(cell) for cell in (first, second)] == ["1_0", "1_1"]
    assert [owners.name(cell) for cell in (first, second)] == ["1_0", "1_0"]
    copied.drop([FeaturizeCell])
    assert not copied
    assert copied.name(first) == ""


@settings(max_examples=20, deadline=None)
@given(plans())
def test_checkpoint_by_checkpoint_each_cell_comes_once_after_what_it_needs(plan: Plan) -> None:
    seen: list[Cell] = []
    for others in others_by_checkpoint(plan):
        part = [*others.where(0)]
        before = {*seen, *part}
        assert all(needed in before for c in part for needed in c.dependencies(plan, ()))
        assert len({c.checkpoint(plan) for c in part}) == 1
        seen += part
    assert len(seen) == len(set(seen))
    assert set(seen) == {*of_run(plan)}
