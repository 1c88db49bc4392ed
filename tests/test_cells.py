"""Cell ids: every cell has its own, which names it alone, and nothing else names a cell."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trak_dist import cells
from trak_dist.cells import Cell, parse_cell
from trak_dist.coordinates import Rows, check_name
from trak_dist.errors import ConfigError

names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", fullmatch=True)
numbers = st.integers(0, 10**7)
blocks = st.builds(lambda start, count: Rows(start, start + count), numbers, st.integers(1, 10**6))
any_cell = st.one_of(
    st.builds(cells.TrainCell, subset=names, seed=numbers),
    st.builds(cells.FeaturizeCell, model_id=numbers, split=names, rows=blocks),
    st.builds(cells.FisherCell, model_id=numbers, draw=numbers, rows=blocks),
    st.builds(cells.GramCell, model_id=numbers),
    st.builds(cells.KernelCell, model_id=numbers),
    st.builds(cells.PreconditionCell, model_id=numbers, targets=names),
    st.builds(cells.ScoreCell, targets=names, rows=blocks),
    st.builds(cells.ReportCell, targets=names),
)

NO_CELL = [
    "",
    " ",
    "/",
    "kernel",
    "kernel/",
    "kernel/x",
    "kernel/1/2",
    "/kernel/1",
    "kernel//1",
    "nonsense/1",
    "KERNEL/1",
    "kernel/1.0",
    "report/",
    "report/..",
    "report/.hidden",
    "report/-option",
    "report/a b",
    "report/a\n",
    "report/a\\b",
    "report/ä",
    "report//etc/passwd",
    "report/../../etc",
    "/etc/passwd",
    "../kernel/1",
    "report/" + "a" * 101,
    "featurize/0/../0-4",
    "featurize/0/train/0",
    "featurize/0/train/0-4-8",
    "featurize/0/train/-4",
    "score/val/a-b",
]
NOT_CANONICAL = [
    "kernel/ 1",
    "kernel/1 ",
    "kernel/1\n",
    "kernel/+1",
    "kernel/01",
    "kernel/1_0",
    "kernel/\u0661",
    "kernel/-1",
    "featurize/0/train/0 - 4",
    "featurize/0/train/00-4",
    "featurize/0/train/4-0",
    "featurize/0/train/4-4",
    "score/val/0-+4",
]


@given(any_cell)
def test_every_id_parses_back_to_its_cell(cell: Cell) -> None:
    assert parse_cell(cell.id) == cell
    assert parse_cell(cell.id).id == cell.id


@given(any_cell, any_cell)
def test_different_cells_have_different_ids(a: Cell, b: Cell) -> None:
    assert (a.id == b.id) == (a == b)


@pytest.mark.parametrize("text", NO_CELL)
def test_what_names_no_cell_is_refused_and_quoted(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_cell(text)
    assert str(raised.value) == (
        f"{text!r} is not a cell id\n  next:  use the id of a cell of the run"
    )


@pytest.mark.parametrize("text", NOT_CANONICAL)
def test_a_second_spelling_of_a_cell_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a cell id"):
        parse_cell(text)


@given(any_cell.map(lambda cell: cell.id), st.data())
def test_an_edited_id_is_refused_or_names_exactly_what_it_says(
    text: str, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(text)))
    edited = text[:at] + data.draw(st.sampled_from([*"/.-+ _019a\n", ""])) + text[at + 1 :]
    try:
        cell = parse_cell(edited)
    except ConfigError:
        return
    assert cell.id == edited


@pytest.mark.parametrize("name", ["val", "a", "0", "_", "a.b-c_d", "a" * 100])
def test_plain_names_are_accepted(name: str) -> None:
    assert check_name(name, what="the target set") == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a b", "-a", "a\n", "a" * 101, "ü"])
def test_names_unfit_for_a_path_are_refused(name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_name(name, what="the target set")
    assert raised.value.what == f"the target set {name!r} is not usable as a name"
