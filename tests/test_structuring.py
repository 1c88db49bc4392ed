"""Mappings to dataclasses: nothing is converted, all that is bad is told, no defect is hidden."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from trak_dist.configuration.structuring import attempt, structure, unstructure
from trak_dist.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    rows: int = field(metadata={"min": 1})
    name: str = ""

    def __post_init__(self) -> None:
        if self.name == "taken":
            raise ConfigError("the name 'taken' is taken", next="another one")
        if self.name == "defect":
            raise ZeroDivisionError


@dataclass(frozen=True)
class Outer:
    flag: bool = False
    count: int = 0
    share: float = field(default=0.5, metadata={"min": 0, "below": 9})
    label: str = field(default="a", metadata={"choices": ("a", "b")})
    line: str = field(default="", metadata={"one_line": True})
    names: tuple[str, ...] = ()
    numbers: tuple[int, ...] = field(default=(1,), metadata={"not_empty": True})
    tasks: tuple[tuple[str, ...], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    inner: Inner = Inner(1)
    several: tuple[Inner, ...] = ()


def bad(raw: Mapping[str, Any]) -> list[str]:
    found, lines = attempt(Outer, raw)
    assert found is None
    return lines


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("flag", value) for value in (1, 0, "true", None)],
        *[("count", value) for value in (True, 1.0, "3", None, [], float("nan"))],
        *[("share", value) for value in (True, "0.5", None)],
        *[("label", value) for value in (1, None, ["a"], b"a")],
    ],
)
def test_no_value_is_converted(name: str, value: object) -> None:
    kind = {"flag": "bool", "count": "int", "share": "float", "label": "str"}[name]
    assert bad({name: value}) == [f"{name}: {value!r} is not of type {kind}"]


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ({"count": -(10**40)}, "count: a number of 41 digits is too large"),
        ({"share": float("nan")}, "share: nan is not a finite number of at least 0"),
        ({"share": 9}, "share: 9 is too large"),
        ({"label": "c"}, "label: 'c' is not one of a, b"),
        ({"line": "a\nb"}, "line: the control character '\\n' would begin another line"),
        ({"names": ["a", 1]}, "names: ['a', 1] is not a name or a list of names"),
        ({"numbers": [True]}, "numbers: [True] is not a number or a list of numbers"),
        ({"numbers": []}, "numbers: [] is not a number or a list of numbers"),
        ({"tasks": ["a"]}, "tasks: ['a'] is not a list of lists"),
        ({"tasks": [["a"], [1]]}, "tasks.1: [1] is not a name or a list of names"),
        ({"facts": [1]}, "facts: [1] is not a mapping"),
        ({"inner": 3}, "inner: 3 is not a section of settings"),
        ({"inner": {}}, "inner.rows: missing"),
        ({"inner": {"rows": 1, "row": 2}}, "inner.row: unknown; did you mean 'rows'?"),
        ({"several": {}}, "several: {} is not a list of sections"),
        ({"several": [{"rows": 1}, None]}, "several.1: None is not a section of settings"),
        ({"several": [{"rows": 0}]}, "several.0.rows: 0 is not a finite number of at least 1"),
        ({"inner": {"rows": 1, "name": "taken"}}, "inner: the name 'taken' is taken"),
        (
            {"../x": 1, **dict.fromkeys("ab", 0)},
            "../x: unknown; valid: count, facts, flag, inner, ",
        ),
    ],
)
def test_what_is_bad_is_reported_by_its_dotted_key(raw: Mapping[str, Any], line: str) -> None:
    assert bad(raw)[0].startswith(line)


def test_all_that_is_bad_is_reported_at_once() -> None:
    raw = {"flag": 1, "inner": {"rows": "x", "z": 0}, "several": [{"rows": 0}, {}], "zz": 0}
    assert [line.partition(":")[0] for line in bad(raw)] == [
        *("flag", "inner.rows", "inner.z", "several.0.rows", "several.1.rows", "zz"),
    ]
    with pytest.raises(ConfigError, match="it is no outer:\n  flag: 1 is not of type bool\n  inn"):
        structure(Outer, raw, "it is no outer:")


def test_a_whole_number_stands_for_a_float_and_one_name_for_a_list() -> None:
    found = structure(Outer, {"share": 2, "names": "a", "numbers": 3}, "")
    assert (found.share, type(found.share)) == (2.0, float)
    assert (found.names, found.numbers) == (("a",), (3,))


def test_a_defect_in_a_dataclass_is_not_taken_for_a_bad_field() -> None:
    with pytest.raises(ZeroDivisionError):
        attempt(Outer, {"inner": {"rows": 1, "name": "defect"}})


def test_a_dataclass_comes_back_from_its_own_mapping() -> None:
    outer = Outer(tasks=(("a", "b"), ()), facts={"x": [1, {"y": None}]}, several=(Inner(2, "b"),))
    assert structure(Outer, unstructure(outer), "") == outer
