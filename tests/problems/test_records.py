"""Files of data: what is read of each kind, and what is refused, word for word."""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from trak_dist.errors import DatasetError, ProblemError
from trak_dist.problems.records import Records, read

ROWS = {"text": ["one, two", 'a "b"'], "label": [3, 1]}
JSON = '{"text": "one, two", "label": 3, "id": 0}\n{"label": 1, "text": "a \\"b\\"", "id": 1}\n'


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text(JSON)
    (tmp_path / "rows.csv").write_text('text,id,label\n"one, two",0,3\n"a ""b""",1,1\n')
    (tmp_path / "rows.txt").write_text('one, two\na "b"\n')
    table = {**ROWS, "id": [0, 1]}
    parquet.write_table(pa.table(table), tmp_path / "rows.parquet")
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "rows")
    return tmp_path


def found(path: Path, columns: tuple[str, ...] = ()) -> Records:
    return read(path, columns, setting="problem.train")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "rows", "rows.txt"])
def test_each_kind_gives_the_columns_that_are_asked_for(name: str, files: Path) -> None:
    text_only = name == "rows.txt"
    records = found(files / name, ("text",) if text_only else ("text", "label"))
    assert list(records.texts("text")) == ROWS["text"]
    assert set(records.columns) == ({"text"} if text_only else {"text", "label"})
    if not text_only:
        assert [int(v) for v in records.columns["label"]] == ROWS["label"]
    assert len(records) == 2


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "rows", "rows.txt"])
def test_a_missing_column_is_refused_with_those_that_there_are(name: str, files: Path) -> None:
    with pytest.raises(DatasetError, match=r"there is no column body; there (are|is) .*text"):
        found(files / name, ("body",))


def test_a_column_that_a_later_line_lacks_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"texts": "b"}\n')
    with pytest.raises(DatasetError) as raised:
        found(path, ("text",))
    assert str(raised.value).startswith(
        f"there is no column text; there is texts\n  where: {path}, line 2\n"
    )


@pytest.mark.parametrize(
    ("name", "content", "what", "line"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "not JSON: Expecting value", 2),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"}\n', "not JSON: Expecting value", 2),
        ("a.jsonl", b'[{"text": "a"}]\n', "a JSON list and not an object", 1),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "not JSON: ", 1),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "not UTF-8: invalid start byte", 2),
        ("a.csv", b"text,label\na,1\n\xe9,2\n", "not UTF-8: ", 3),
        ("a.csv", b"text,label\na,1\nb\n", "1 values for 2 columns", 3),
        ("a.csv", b'text,label\n"a"b,1\n', "not CSV: ", 2),
        ("a.txt", b"one\ntwo\n\xff\n", "not UTF-8: ", 3),
    ],
)
def test_a_damaged_line_is_named(
    name: str, content: bytes, what: str, line: int, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DatasetError) as raised:
        found(path, ("text",))
    assert raised.value.what.startswith(what)
    assert raised.value.where == f"{path}, line {line}"


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_file_with_another_separator_is_refused_by_it(mark: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"text{mark}label\n1,5{mark}2\n")
    for columns in ((), ("label",)):
        with pytest.raises(DatasetError) as raised:
            found(path, columns)
        assert str(raised.value) == (
            f"columns are separated by {mark!r}, not by commas: {f'text{mark}label'!r}\n"
            f"  where: {path}, line 1\n"
            "  next:  save it with commas between columns, and points in numbers"
        )
    path.write_text(f"text{mark}label\n15{mark}2\n")
    assert len(found(path, (f"text{mark}label",))) == 1


def test_empty_texts_are_refused_with_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("one\n\ntwo\n  \n")
    with pytest.raises(DatasetError) as raised:
        found(path, ("text",)).texts("text")
    assert str(raised.value) == (
        f"column 'text' is empty in rows 1, 3\n  where: {path}\n  next:  leave them out"
    )


def test_what_is_no_text_is_refused_with_its_rows(files: Path) -> None:
    with pytest.raises(DatasetError, match="column 'label' holds int, not text, in rows 0, 1"):
        found(files / "rows.jsonl", ("label",)).texts("label")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.parquet"])
def test_a_file_without_rows_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("text\n" if name == "a.csv" else "")
    if name == "a.parquet":
        parquet.write_table(pa.table({"text": pa.array([], "string")}), tmp_path / name)
    with pytest.raises(DatasetError, match="there are no rows in it"):
        found(tmp_path / name, ("text",))


def test_files_that_are_not_there_or_of_no_known_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as raised:
        found(tmp_path / "no.jsonl")
    assert str(raised.value) == (
        f"there is no such file\n  where: {tmp_path / 'no.jsonl'}\n  next:  see problem.train"
    )
    (tmp_path / "a.pkl").touch()
    with pytest.raises(DatasetError, match=r"files that end on '.pkl' are not read"):
        found(tmp_path / "a.pkl")


def test_damaged_parquet_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DatasetError, match="not a readable parquet file"):
        found(tmp_path / "a.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"state.json is not in it"):
        found(tmp_path / "empty")
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "cut")
    (tmp_path / "cut/data-00000-of-00001.arrow").write_bytes(b"no arrow")
    with pytest.raises(DatasetError, match="not a readable folder of datasets"):
        found(tmp_path / "cut")


def test_a_folder_of_splits_says_which_to_name(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict(ROWS)
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "both")
    with pytest.raises(DatasetError) as raised:
        found(tmp_path / "both")
    assert raised.value.what == "a folder of several splits: test, train"
    assert raised.value.next == f"name one: {tmp_path / 'both/test'}"


def test_selected_and_formatted_rows_of_a_folder_are_those_that_were_saved(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"text": list("abcdef")}).select([4, 2])
    made.with_format("torch").save_to_disk(tmp_path / "some")
    assert list(found(tmp_path / "some", ("text",)).texts("text")) == ["e", "c"]


@pytest.mark.parametrize(("name", "module"), [("rows.parquet", "pyarrow"), ("rows", "datasets")])
def test_a_package_that_is_missing_is_named_with_the_command(
    name: str, module: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"{module}.parquet", raising=False)
    with pytest.raises(ProblemError) as raised:
        found(files / name)
    assert f"needs the package {module}" in raised.value.what
    assert raised.value.next == "pip install 'trak_dist[hf]'"
