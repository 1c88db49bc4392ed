"""Columns: records come back as they were, with their types."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trak_dist.store import columns
from trak_dist.store.columns import Columns

VALUES = st.one_of(
    st.integers(-(2**70), 2**70),
    st.integers(0, 2),
    st.floats(allow_nan=False),
    st.booleans(),
    st.none(),
    st.text(),
    st.sampled_from(["", "00ff", "ABCD", "abc", "a\0", "\ud800"]),
    st.lists(st.integers(), max_size=2),
)
RECORDS = st.lists(
    st.fixed_dictionaries(
        {"cell": st.text(), "facts": st.dictionaries(st.sampled_from("xyz"), VALUES)}
    ),
    min_size=1,
    max_size=4,
)


def text(value: object) -> str:
    """Equal texts have equal types too."""
    return json.dumps(value, sort_keys=True)


def read(content: bytes) -> Columns:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return Columns(file)


@given(RECORDS)
@settings(max_examples=100)
def test_records_come_back_with_their_types(records: Sequence[Mapping[str, Any]]) -> None:
    found = read(columns.dump(records, notes={}))
    assert list(map(text, found.records(range(len(records))))) == list(map(text, records))
    assert list(map(text, found.records([len(records) - 1]))) == [text(records[-1])]
    assert found.column("cell") == [r["cell"] for r in records]
    assert list(map(text, found.column("facts", "x"))) == [
        text(r["facts"].get("x")) for r in records
    ]


def test_what_all_share_is_kept_once() -> None:
    one, many = (
        len(columns.dump([{"cell": f"{i:06}", "text": "a" * 1000} for i in range(n)], notes={}))
        for n in (1, 1000)
    )
    assert many - one < 10 * 1000


@pytest.mark.parametrize("column", [np.arange(3), np.zeros((2, 2)), np.array([1j, 2j])])
def test_an_array_that_is_no_column_is_refused(column: np.ndarray) -> None:
    content = io.BytesIO(columns.dump([{"number": 1}, {"number": 2}], notes={}))
    with np.load(content, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file} | {"0": column}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with pytest.raises(ValueError, match="is no column of 2 values"):
        read(buffer.getvalue())
