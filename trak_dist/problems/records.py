"""Rows of a data file, by column: JSON lines, CSV, parquet, plain text, or a `datasets` folder.

The kind follows from the name's end. Only the columns that are asked for are kept. None of these
formats holds code, and nothing of them is run.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trak_dist.errors import DatasetError
from trak_dist.listing import first_few
from trak_dist.problems.extras import package

TEXT = "text"  # the one column of a file of plain text


@dataclass(frozen=True)
class Records:
    """Some columns of a file, each a value for each row."""

    file: Path
    columns: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        """The number of rows."""
        return len(next(iter(self.columns.values())))

    def texts(self, column: str) -> Sequence[str]:
        """A column of texts, none of them empty.

        Raises
        ------
        DatasetError
            Naming the rows that are empty, or hold anything else.
        """
        values = self.columns[column]
        other = [row for row, v in enumerate(values) if not isinstance(v, str)]
        if other:
            kind = type(values[other[0]]).__name__
            raise self.error(f"column {column!r} holds {kind}, not text, in {_rows(other)}")
        empty = [row for row, v in enumerate(values) if not v.strip()]
        if empty:
            raise self.error(f"column {column!r} is empty in {_rows(empty)}", "leave them out")
        return values

    def error(self, what: str, next: str = "see the settings of the problem") -> DatasetError:
        """An error about this file."""
        return DatasetError(what, where=str(self.file), next=next)


def read(path: str | Path, columns: Sequence[str] = (), *, setting: str) -> Records:
    """Some columns of a file, all where none are named; rows are in the file's order.

    Parameters
    ----------
    setting : str
        The setting that names the file, for errors.

    Raises
    ------
    DatasetError
        If it is not there, not of a kind that is known, damaged, empty, or lacks a column.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DatasetError("there is no such file", where=str(path), next=f"see {setting}")
    kind = _read_folder if path.is_dir() else _KINDS.get(path.suffix.lower())
    if kind is None:
        raise DatasetError(
            f"files that end on {path.suffix!r} are not read",
            where=str(path),
            next=f"{', '.join(_KINDS)}, or a folder that datasets' save_to_disk wrote",
        )
    found = Records(path, kind(path, columns))
    if not found.columns or not len(found):
        raise DatasetError("there are no rows in it", where=str(path), next=f"see {setting}")
    return found


def _rows(rows: Sequence[int]) -> str:
    return f"{'row' if len(rows) == 1 else 'rows'} {first_few(rows)}"


def _check_columns(
    path: Path, wanted: Sequence[str], there: Sequence[str], where: str = ""
) -> None:
    missing = [name for name in wanted if name not in there]
    if missing:
        raise DatasetError(
            f"there is no column {first_few(missing)}; there {'is' if len(there) == 1 else 'are'} "
            f"{first_few(there, 30) or 'none'}",
            where=f"{path}{where}",
            next="name the columns: problem.text=…, or prompt, completion, label, target",
        )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file, numbered from 1, without their ends."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DatasetError(
                    f"not UTF-8: {error.reason} at byte {error.start} of the line",
                    where=f"{path}, line {number}",
                    next="save the file as UTF-8",
                ) from None


def _read_json_lines(path: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {name: [] for name in columns}
    for number, line in _lines(path):
        where = f", line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(
                f"not JSON: {error or type(error).__name__}",
                where=f"{path}{where}",
                next="one JSON object a line, and no empty lines",
            ) from None
        if not isinstance(row, dict):
            raise DatasetError(
                f"a JSON {type(row).__name__} and not an object",
                where=f"{path}{where}",
                next="one JSON object a line",
            )
        if number == 1 and not columns:
            found = {name: [] for name in row}
        _check_columns(path, list(found), list(row), where)
        for name, values in found.items():
            values.append(row[name])
    return found


def _read_csv(path: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    rows = csv.reader((f"{line}\n" for _, line in _lines(path)), strict=True)
    try:
        header = next(rows, [])
        _check_separator(path, header, columns)
        if len(set(header)) < len(header):
            raise DatasetError("two columns have one name", where=str(path), next="rename one")
        _check_columns(path, columns, header)
        places = [header.index(name) for name in columns or header]
        values: list[list[str]] = [[] for _ in places]
        for row in rows:
            if len(row) != len(header):
                raise DatasetError(
                    f"{len(row)} values for {len(header)} columns",
                    where=f"{path}, line {rows.line_num}",
                    next="a value for each column, in quotes where it has a comma",
                )
            for column, place in zip(values, places, strict=True):
                column.append(row[place])
    except csv.Error as error:
        raise DatasetError(
            f"not CSV: {error}", where=f"{path}, line {rows.line_num}", next="fix the line"
        ) from None
    return dict(zip(columns or header, values, strict=True))


def _check_separator(path: Path, header: Sequence[str], columns: Sequence[str]) -> None:
    """Raise `DatasetError` if the one column of a file looks like several, and is not asked for."""
    found = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    if found and header[0] not in columns:
        raise DatasetError(
            f"columns are separated by {found!r}, not by commas: {header[0][:60]!r}",
            where=f"{path}, line 1",
            next="save it with commas between columns, and points in numbers",
        )


def _read_text(path: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    _check_columns(path, columns, [TEXT])
    return {TEXT: [line for _, line in _lines(path)]}


def _read_parquet(path: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    parquet = package("pyarrow.parquet", needed_for="reading parquet")
    try:
        with parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            _check_columns(path, columns, there)
            table = file.read(columns=list(columns or there))
        return {name: table[name].to_pylist() for name in columns or there}
    except DatasetError:
        raise
    except Exception as error:  # of pyarrow, many types
        raise DatasetError(
            f"not a readable parquet file: {type(error).__name__}: {error}",
            where=str(path),
            next="write it anew",
        ) from error


def _read_folder(path: Path, columns: Sequence[str]) -> dict[str, Sequence[Any]]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.parent.name for p in path.glob("*/state.json"))
        raise DatasetError(
            f"a folder of several splits: {first_few(splits)}",
            where=str(path),
            next=f"name one: {path / (splits or ['train'])[0]}",
        )
    if not (path / "state.json").is_file():
        raise DatasetError(
            "no folder that datasets' save_to_disk wrote: state.json is not in it",
            where=str(path),
            next="dataset.save_to_disk(…), or a file",
        )
    datasets = package("datasets", needed_for="reading a folder of datasets")
    try:
        loaded = datasets.load_from_disk(str(path.absolute()), keep_in_memory=False)
        there = loaded.column_names
        _check_columns(path, columns, there)
        chosen = loaded.with_format(None).select_columns(list(columns or there))
        return {name: chosen[name][:] for name in columns or there}
    except DatasetError:
        raise
    except Exception as error:  # of datasets and pyarrow, many types
        raise DatasetError(
            f"not a readable folder of datasets: {type(error).__name__}: {error}",
            where=str(path),
            next="save it anew",
        ) from error


_KINDS: dict[str, Callable[[Path, Sequence[str]], Mapping[str, Sequence[Any]]]] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _read_json_lines),
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
