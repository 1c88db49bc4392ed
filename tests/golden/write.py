"""Golden values: `python tests/golden/write.py` writes `expected.json` anew from `plans/`.

The plans are `plan.json` as they were written, and are not made anew: a version that reads them
otherwise is what the test is there to find. A further plan is a further file.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import describe

HERE = Path(__file__).parent
EXPECTED = HERE / "expected.json"
PLANS = {path.stem: path.read_text() for path in sorted((HERE / "plans").glob("*.json"))}
MEMBERS = {"member": "rich"}  # of which other plan's run it is a member
LONG = 4


def golden(name: str, directory: Path) -> dict[str, Any]:
    """All that follows from one plan, as JSON has it."""
    run = describe.planned(directory, PLANS[name], PLANS.get(MEMBERS.get(name, "")))
    cells = describe.everything(run)
    found = {
        "numbers": describe.numbers(run),
        "threads": describe.threads(run),
        "order": describe.order(run),
        "cells": {cell.id: describe.cell(run, cell) for cell in cells},
        "arrays": describe.arrays(run),
        "alike": describe.alike(run),
    }
    for rows in (1, 16):
        found[f"tasks of {rows} rows"] = describe.tasks(run, rows)

    def of(*stages: str) -> list[Any]:
        return [cell for cell in cells if cell.id.startswith(stages)]

    half = [cell for cell in cells if hashlib.sha256(cell.id.encode()).digest()[0] % 2]
    for title, state in {
        "nothing done": {},
        "half done": {"done": half},
        "a split lost": {"skip": of("featurize/0/train")},
        "Grams made by others": {"done": of("train", "featurize"), "owners": of("gram")},
    }.items():
        found[f"graph, {title}"] = list(describe.graph_arrays(run, **state))
    return json.loads(json.dumps(_short(found)))


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """A line for each value that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            yield from differences(old.get(key), new.get(key), f"{path} › {key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{path} › {i}")
    elif old != new:
        yield f"{path}: {old!r} is expected, {new!r} found"


def contained(old: Any, new: Any) -> Any:
    """What of `new` is in `old` too, by its keys."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {k: contained(v, new[k]) for k, v in old.items() if k in new}
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [contained(a, b) for a, b in zip(old, new, strict=True)]
    return new


def _short(value: Any) -> Any:
    """`value`, where long lists of names are their first, number and digest."""
    if isinstance(value, dict):
        return {str(k): _short(v) for k, v in value.items()}
    if not isinstance(value, list | tuple):
        return value
    if len(value) <= LONG or not all(isinstance(v, str) for v in value):
        return [_short(v) for v in value]
    digest = hashlib.sha256("\n".join(value).encode()).hexdigest()[:16]
    return f"{value[0]} and {len(value) - 1} more, {digest}"


def _dumped(value: Any, depth: int = 0) -> str:
    """JSON with a line for each cell, array or number of a plan."""
    if depth == 3 or not isinstance(value, dict | list) or not value:
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, list):
        lines = [_dumped(v, depth + 1) for v in value]
        return f"[{inner}{f',{inner}'.join(lines)}{outer}]"
    lines = [f"{json.dumps(k)}: {_dumped(value[k], depth + 1)}" for k in sorted(value)]
    return f"{{{inner}{f',{inner}'.join(lines)}{outer}}}"


def main() -> None:
    found = {}
    for name in PLANS:
        with tempfile.TemporaryDirectory() as directory:
            found[name] = golden(name, Path(directory))
    old = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    EXPECTED.write_text(_dumped(found) + "\n")
    print("\n".join(differences(old, found)) if old else f"{EXPECTED} is new", file=sys.stderr)


if __name__ == "__main__":
    main()
