"""Records in columns: many in one file, from which a reader takes what it needs.

A record is a mapping of strings and, one level below, of anything that JSON has. What all records
share is kept once; numbers and strings are arrays; what is neither is in the header. Any file that
is not whole is a `ValueError`, or one of the errors of zip, npy and JSON.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from trak_dist import decoding

Path: TypeAlias = tuple[str, ...]  # of a value: its field, and its name there
_ABSENT = object()
_HEADER, _NOTES = "header", "notes"
_HEX = frozenset("0123456789abcdef")


def dump(records: Sequence[Mapping[str, Any]], *, notes: Mapping[str, Any]) -> bytes:
    """Records, and notes that are read without them, as the content of a file."""
    values: dict[Path, list[Any]] = {}
    for at, record in enumerate(records):
        for path, value in _flattened(record):
            values.setdefault(path, [_ABSENT] * len(records))[at] = value
    sections = sorted({f for r in records for f, value in r.items() if isinstance(value, Mapping)})
    shared, others, arrays = [], [], dict[str, NDArray[Any]]()
    columns: list[Path] = []
    for path, column in values.items():
        if _all_equal(column):
            shared.append([path, column[0]])
        elif (array := _array(column)) is not None:
            arrays[str(len(columns))] = array
            columns.append(path)
        else:
            others.append([path, [[i, v] for i, v in enumerate(column) if v is not _ABSENT]])
    header = {"rows": len(records), "sections": sections}
    header |= {"shared": shared, "columns": columns, "others": others}
    for name, content in ((_HEADER, header), (_NOTES, notes)):
        arrays[name] = np.frombuffer(json.dumps(content).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def read_notes(file: NpzFile) -> dict[str, Any]:
    """The notes of an opened file, of which nothing else is read."""
    return _mapping(file, _NOTES)


class Columns:
    """The records of an opened file, each column decoded when it is asked for."""

    def __init__(self, file: NpzFile) -> None:
        if damaged := file.zip and file.zip.testzip():
            raise ValueError(f"{damaged} is not what was written")
        header = _mapping(file, _HEADER)
        self._rows: int = header["rows"]
        self._sections: list[str] = header["sections"]
        self._shared = {tuple(path): value for path, value in header["shared"]}
        self._others = {tuple(path): dict(pairs) for path, pairs in header["others"]}
        self._arrays = {
            tuple(path): _checked(file[str(i)], self._rows)
            for i, path in enumerate(header["columns"])
        }

    def __len__(self) -> int:
        return self._rows

    def column(self, *path: str) -> list[Any]:
        """The value of each record at a path; None of those that have none."""
        if path in self._shared:
            return [self._shared[path]] * self._rows
        if path in self._arrays:
            return _values(self._arrays[path])
        found = self._others.get(path, {})
        return [found.get(i) for i in range(self._rows)]

    def records(self, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Some of the records, whole."""
        columns = {path: _values(array[list(rows)]) for path, array in self._arrays.items()}
        for at, row in enumerate(rows):
            record: dict[str, Any] = {section: {} for section in self._sections}
            for path, value in self._shared.items():
                _put(record, path, value)
            for path, column in columns.items():
                _put(record, path, column[at])
            for path, found in self._others.items():
                if row in found:
                    _put(record, path, found[row])
            yield record


def _mapping(file: NpzFile, name: str) -> dict[str, Any]:
    return decoding.mapping(file[name].tobytes())


def _flattened(record: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    for field, value in record.items():
        if isinstance(value, Mapping):
            yield from (((field, name), inner) for name, inner in value.items())
        else:
            yield (field,), value


def _put(record: dict[str, Any], path: Path, value: Any) -> None:
    *section, name = path
    (record[section[0]] if section else record)[name] = value


def _all_equal(column: Sequence[Any]) -> bool:
    first = column[0]
    if isinstance(first, str | int):
        return all(type(v) is type(first) and v == first for v in column)
    return _ABSENT not in column and len({json.dumps(v) for v in column}) == 1


def _array(column: Sequence[Any]) -> NDArray[Any] | None:
    """Integers, floating-point numbers, bytes of strings, or of hexadecimal ones of one length."""
    kinds = set(map(type, column))
    if kinds == {int} and all(-(2**63) <= v < 2**63 for v in column):
        return np.array(column, np.int64)
    if kinds == {float}:
        return np.array(column, np.float64)
    if kinds != {str} or any("\0" in v for v in column):
        return None
    length = len(column[0])
    if length and length % 2 == 0 and all(len(v) == length and _HEX.issuperset(v) for v in column):
        return np.frombuffer(bytes.fromhex("".join(column)), np.uint8).reshape(len(column), -1)
    return np.array([v.encode(errors="surrogatepass") for v in column])


def _checked(array: NDArray[Any], rows: int) -> NDArray[Any]:
    dimensions = 2 if array.dtype == np.uint8 else 1
    if len(array) != rows or array.ndim != dimensions or array.dtype.kind not in "ifSu":
        raise ValueError(f"{array.dtype} {array.shape} is no column of {rows} values")
    return array


def _values(array: NDArray[Any]) -> list[Any]:
    if array.dtype == np.uint8:
        text, digits = array.tobytes().hex(), 2 * array.shape[1]
        return [text[at : at + digits] for at in range(0, len(text), digits)]
    if array.dtype.kind == "S":
        return [v.decode(errors="surrogatepass") for v in array.tolist()]
    values: list[Any] = array.tolist()
    return values
